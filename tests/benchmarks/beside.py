"""Ours beside the PyTorch reference: two processes that take turns, their seconds and their memory.

Each side is a process of its own with as many threads as there are cores; both compile and run once before anything is measured. Memory
is the largest resident size (VmHWM of Linux, set back after that first run, of which nothing freed is kept) during a call; in the table also
less what the process held with its libraries imported and no weights loaded.

A side is side(threads), which imports what it needs and gives load(pipe), which makes the model and gives its calls by kind. The
reference sends its weights through the pipe, by name; ours receives them.
"""
import ctypes
import gc
import os
import time
from collections.abc import Callable, Collection, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import numpy as np

Load = Callable[[Connection], dict[str, Callable[[], np.ndarray]]]
REFERENCE, OURS = "diffusers", "ours"


def run(sides: Mapping[str, Callable[[int], Load]], rounds: int, close: float, held: Collection[str]) -> int:
    """Measures and prints; sides: REFERENCE and OURS. Returns 1 where results are further apart than `close`, or a ratio of a kind in `held`
    is over 1."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    threads, context, pipes, first = len(os.sched_getaffinity(0)), get_context("spawn"), {}, {}
    for name in (REFERENCE, OURS):
        pipes[name], theirs = context.Pipe()
        context.Process(target=_serve, args=(sides[name], threads, theirs), daemon=True).start()
        if name == REFERENCE:
            weights = pipes[name].recv()
        else:
            pipes[name].send(weights)
        first[name] = pipes[name].recv()
    apart = {kind: float(np.abs(first[OURS][kind] - first[REFERENCE][kind]).max()) for kind in first[OURS]}
    print("largest difference: " + ", ".join(f"{kind} {value:.1e}" for kind, value in apart.items()), flush=True)
    figures: dict[tuple[str, str], list] = {(kind, name): [] for kind in apart for name in pipes}
    for i in range(rounds):
        for kind in apart:
            for name in (REFERENCE, OURS)[::1 if i % 2 else -1]:
                pipes[name].send(kind)
                figures[kind, name].append(pipes[name].recv())
    for pipe in pipes.values():
        pipe.send(None)
    print(f"medians of {rounds} rounds, {threads} threads\nkind; side; seconds; CPU seconds; peak memory without the imports; with them")
    over = [_told(kind, figures[kind, REFERENCE], figures[kind, OURS]) > 1 and kind in held for kind in apart]
    return int(max(apart.values()) > close or any(over))


def _told(kind: str, reference: list, ours: list) -> float:
    """Prints what a kind of call took; returns the larger of the ratios of time and of peak memory."""
    figures = []
    for name, rows in ((REFERENCE, reference), (OURS, ours)):
        took, computed, peaks, imported = zip(*rows)
        figures.append((median(took), median(computed), max(peaks) - imported[0], max(peaks)))
        seconds, cpu, alone, whole = figures[-1]
        print(f"{kind}; {name}; {seconds:.2f} s; {cpu:.2f} s; {alone / 1e9:.2f} GB; {whole / 1e9:.2f} GB")
    time_ratio, cpu_ratio, memory_ratio, whole_ratio = (own / other for other, own in zip(*figures))
    paired = median(a[0] / b[0] for a, b in zip(ours, reference))
    print(f"{kind}: {time_ratio:.2f} of {REFERENCE}' time (median of the rounds' ratios {paired:.2f}), {cpu_ratio:.2f} of its CPU time, "
          f"{memory_ratio:.2f} of its memory ({whole_ratio:.2f} with imports)")
    return max(time_ratio, whole_ratio)


def _resident(name: str) -> float:
    """Bytes: VmRSS, now, or VmHWM, the largest since it was set back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith(name))


def _serve(side: Callable[[int], Load], threads: int, pipe: Connection) -> None:
    """Sends what comes out of each kind of call, then answers each kind that it receives with (seconds, CPU seconds, peak bytes, the bytes with
    libraries imported)."""
    load = side(threads)
    imported = _resident("VmRSS")
    calls = load(pipe)
    pipe.send({kind: call() for kind, call in calls.items()})
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed since, such as a compiler's, goes back to the system
    for kind in iter(pipe.recv, None):
        Path("/proc/self/clear_refs").write_text("5")
        start, computed = time.perf_counter(), time.process_time()
        calls[kind]()
        pipe.send((time.perf_counter() - start, time.process_time() - computed, _resident("VmHWM"), imported))
