"""One process of several fails alone, or is left alone: its exit code is its own, though JAX waits for the others and would abort."""
import os
import socket
import subprocess
import sys

import pytest

from tests.data.folders import ROOT

PROGRAM = '''
import jax
from launch import cli
from vino_jax.errors import UserError

def main():
    cli.join_processes()
    if jax.distributed.is_initialized() and {index}:
        raise {error}("process {index} alone has failed")
    input()  # as in a collective that waits for the other

cli.run(main)
'''


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize("error, code, line", [("UserError", 2, "error: process 1 alone has failed"),
                                               ("ValueError", 1, "ValueError: process 1 alone has failed")])  # a bug
def test_a_process_that_fails_alone_keeps_its_exit_code(error, code, line):
    address, running = free_address(), []
    for index in range(2):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2",
                       "JAX_PROCESS_ID": str(index)}
        running.append(subprocess.Popen([sys.executable, "-c", PROGRAM.format(index=index, error=error)], cwd=ROOT, env=environment, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    waits, fails = running
    _, told = fails.communicate(timeout=120)
    waits.kill()
    waits.communicate()
    assert fails.returncode == code and line in told.splitlines(), told


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_whose_others_do_not_come_gives_up(index):
    program = f"from launch import cli\ncli.JOIN_SECONDS = 3\n{PROGRAM.format(index=index, error='ValueError')}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "2",
                   "JAX_PROCESS_ID": str(index)}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 44, done.stderr
    assert "error: the other processes of this run did not come within 0.05 minutes; see how they ended" in done.stderr.splitlines()
