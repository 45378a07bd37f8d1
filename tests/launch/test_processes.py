"""One process of several fails alone: its exit code is its own, though JAX waits for the others and would abort."""
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


@pytest.mark.parametrize("error, code, line", [("UserError", 2, "error: process 1 alone has failed"),
                                               ("ValueError", 1, "ValueError: process 1 alone has failed")])  # a bug
def test_a_process_that_fails_alone_keeps_its_exit_code(error, code, line):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = []
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
