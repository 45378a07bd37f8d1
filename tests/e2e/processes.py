"""A command as several processes over loopback, as on the hosts of a pod."""
import os
import socket
import subprocess
import sys

from tests.compiling import xla_flags
from tests.data.folders import ROOT


def start(command, count, devices):
    """The processes of one run of `python -m command...`, which have so many CPU devices between them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = []
    for index in range(count):
        environment = {**os.environ, "XLA_FLAGS": xla_flags(devices // count), "PYTHONPATH": str(ROOT),
                       "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        if count > 1:
            environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
        running.append(subprocess.Popen([sys.executable, "-m", *map(str, command)], env=environment, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True))
    return running


def ended(running):
    """(exit codes, what each said)."""
    said = [process.communicate(timeout=300)[0] for process in running]
    return [process.returncode for process in running], said
