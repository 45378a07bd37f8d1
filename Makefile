# make demo   sets up an environment, trains VINO's three stages at a small size, samples, scores, and writes a report
# make test   sets up an environment and runs all tests
# make lint   ruff
# Both work on a fresh machine with Python 3.11 and pip; the environment is .venv here. pip compiles nothing: most of what it would
# compile is never imported, and Python does it at the first import. It is to keep that, whatever the machine says elsewhere (containers
# often forbid it): else each of hundreds of processes spends half of its start on compiling the same modules.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO ?= runs/demo
DEMO_FLAGS ?=
export PYTHONDONTWRITEBYTECODE :=
# A file goes to one of two workers, in the order of tests/conftest.py.
PYTEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test lint env env-test clean

env: $(VENV)/.installed
env-test: $(VENV)/.installed-test

$(VENV)/.installed: setup.py
	@echo "== environment: $(VENV) with the packages that setup.py names (about a minute)"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-compile -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "== test packages: PyTorch on the CPU, diffusers, pytest (about a minute)"
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-compile -e '.[test]'
	@touch $@

demo: env
	$(RUN) -m launch.demo --output $(DEMO) $(DEMO_FLAGS)

test: env-test
	@echo "== tests on 8 virtual CPU devices"
	JAX_PLATFORMS=cpu $(RUN) -m pytest $(PYTEST_FLAGS)

lint: env-test
	$(RUN) -m ruff check .

clean:
	rm -rf $(VENV) build *.egg-info
