"""What every entry point shares: how errors of the user end, and the setup before the first use of a device."""
import argparse
import logging
import os
import re
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Collection, Mapping, MutableMapping
from pathlib import Path

from vino_jax.errors import UserError
from vino_jax.settings import nearest

THREADS_A_DEVICE = 4  # of XLA's pool: a step of the small model takes 7 % longer than with 1, with 16 it would take 20 %

PROCESS_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
JOIN_SECONDS = 1800  # JAX's 300 are too few where machines of a pod start minutes apart
EXIT_ALONE = 44  # others did not come in that time; JAX would abort, as where others are gone
LEAVE_SECONDS = 60  # for the others to end too: all end within moments of each other, or one has failed
FAIL_SECONDS = 10  # the same, for one that has failed


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that ends on a wrong flag as on any other error of the user: a UserError, one line, exit code 2.

    Its flags of type Path are read by `local_path`; so are those of its subcommands.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register("type", Path, local_path)

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def local_path(text: str) -> Path:
    """The path. Raises UserError for an address such as gs://bucket/run, of which pathlib would make the local folder gs:/bucket/run."""
    if "://" in text:
        raise UserError(f"{text} is no local path: files are read and written on this machine's disks alone; mount or copy what lies elsewhere")
    return Path(text)


def names(flag: str, text: str, known: Collection[str], what: str = "name") -> list[str]:
    """The comma-separated names of a flag, each once, in their order. Raises UserError for one that is not known, and for none."""
    found = list(dict.fromkeys(name for name in text.split(",") if name))
    for name in found:
        if name not in known:
            raise UserError(f"{flag}: unknown {what} {name!r}{nearest(name, known)}")
    if not found:
        raise UserError(f"{flag} names none; known: {', '.join(known)}")
    return found


def make_output(folder: Path) -> None:
    """Make the folder of a command's results. Raises UserError, before hours of work are lost, where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder}: {error.strerror}") from None


def common_setup() -> None:
    """Settings that hold for every command; call it first in main(). It imports no JAX and starts no accelerator."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's C++ notes would drown the one line that matters
    roomy_thread_pool(os.environ)
    logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax tells of every array it writes at INFO


def join_processes(environment: Mapping[str, str] = os.environ) -> None:
    """Make this process one of several that run the same command, where the environment says so; call it before the first use of a device.

    VINO_DISTRIBUTED=1: one of a pod, whose machines JAX finds by itself. JAX_COORDINATOR_ADDRESS=HOST:PORT (of process 0),
    JAX_NUM_PROCESSES=N and JAX_PROCESS_ID=0..N-1: one of those, on any machines. Neither: a process of its own.
    Raises UserError for one of the three without the others, or values that are none. Where the others do not come within JOIN_SECONDS, the
    process ends with EXIT_ALONE.
    """
    named = {name: environment[name] for name in PROCESS_VARIABLES if environment.get(name)}
    pod = environment.get("VINO_DISTRIBUTED", "0") not in ("", "0")
    if not named and not pod:
        return
    if len(named) < len(PROCESS_VARIABLES) and not pod:
        missing = [name for name in PROCESS_VARIABLES if name not in named]
        raise UserError(f"{', '.join(named)} is set, but not {', '.join(missing)}: one of several processes needs all three; "
                        "on a pod set VINO_DISTRIBUTED=1 instead")
    import jax

    where = {}
    if len(named) == len(PROCESS_VARIABLES):
        address, count, index = named.values()
        if not (count.isdigit() and index.isdigit() and int(index) < int(count) and re.fullmatch(r".+:\d+", address)):
            raise UserError(f"JAX_COORDINATOR_ADDRESS={address} JAX_NUM_PROCESSES={count} JAX_PROCESS_ID={index}: they must be HOST:PORT, "
                            "a number, and a number below it")
        where = {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
    jax.config.update("jax_enable_preemption_service", False)  # train/preemption.py says why
    giving_up = threading.Timer(JOIN_SECONDS, _leave_alone)
    giving_up.daemon = True
    giving_up.start()
    try:
        jax.distributed.initialize(**where, initialization_timeout=JOIN_SECONDS + LEAVE_SECONDS, shutdown_timeout_seconds=LEAVE_SECONDS)
    finally:
        giving_up.cancel()


def _leave_alone() -> None:
    minutes = JOIN_SECONDS / 60
    print(f"error: the other processes of this run did not come within {minutes:g} minutes; see how they ended", file=sys.stderr, flush=True)
    os._exit(EXIT_ALONE)


def roomy_thread_pool(environment: MutableMapping[str, str]) -> None:
    """Several threads for each virtual CPU device in XLA's pool; to be called before the first use of a device.

    A collective of XLA's CPU backend holds a thread until all devices have come to it, and those of one device start in order but
    do not wait for each other. With one thread a device, which is all that a machine of few cores gets by itself, every thread
    can come to hold a collective whose partner still waits for a thread: after a minute XLA ends the process ("waiting for `all gather
    RendezvousKey` ... may be stuck"). It is rare: once in some ten thousand steps on two devices (jax 0.10.2).
    """
    devices = re.search(r"--xla_force_host_platform_device_count=(\d+)", environment.get("XLA_FLAGS", ""))
    if devices and int(devices[1]) > 1:
        environment.setdefault("PJRT_NPROC", str(max(THREADS_A_DEVICE * int(devices[1]), os.cpu_count() or 1)))


def run(main: Callable[[], int | None]) -> None:
    """Run an entry point and exit: 0 (or what main returns), 2 with one line `error: ...` for a UserError, 130 for Ctrl-C, 1 with its
    traceback for anything else, which is a bug."""
    common_setup()
    try:
        code = main() or 0
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    if code:
        keep_code(code)
    sys.exit(code)


def keep_code(code: int) -> None:
    """Let this process exit with `code` even where it alone has failed: JAX waits at the exit for the other processes, which may hang in a
    collective without this one, and in the end aborts."""
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized():
        leaving = threading.Timer(FAIL_SECONDS, os._exit, (code,))
        leaving.daemon = True
        leaving.start()
