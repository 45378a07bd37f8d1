"""What a run's seconds go to: steps that count, and all else."""
import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vino_jax.checkpoint.atomic import write_text

T = TypeVar("T")

# kind -> what its seconds are spent on
KINDS = {
    "restart": "between the last record of the former run and the start of this one",
    "start": "imports, devices, import of parts, data, parameters, restore",
    "compile": "programs of training, before a bucket's first step",
    "data": "waiting for batches",
    "save": "what of saves training waits for",
    "preview": "previews",
    "evaluate": "the held-out loss",
    "redone": "steps whose results a restart lost, done again since",
    "step": "steps that count",
}


def process_start() -> float:
    """When this process began, in seconds since the epoch; now, where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / 100
    except (OSError, AttributeError):
        return time.time()


class Goodput:
    """Counts seconds by kind, of which one is current, and appends them to `path` (None: nowhere), a JSON object {"time": seconds since
    the epoch, "stage", "step_done", kind: seconds since the record before} each. Before the first of a run stands {"time", "resume_at": steps
    done by stage, "restart"}: what a former run did beyond these steps is done again.

    begun: since when this run counts; resume_at: see above, None where nothing is to be read or written.
    """

    def __init__(self, path: Path | None = None, *, begun: float | None = None, resume_at: Mapping[str, int] | None = None):
        now = time.time()
        begun = begun or now
        self._path, self._kind, self._since = path, "start", time.perf_counter() - (now - begun)
        records = _read(path) if path else []
        if records:
            write_text(path, "".join(json.dumps(record) + "\n" for record in records))
        self.total = _spent([*records, {"resume_at": resume_at or {}}])
        self._told = dict(self.total)
        if records and "finished" not in records[-1]:
            self.total["restart"] += max(begun - records[-1]["time"], 0.0)
        self._append(resume_at=dict(resume_at or {}))

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """The seconds of this block go to `kind`, those after it to what was current before."""
        former = self._kind
        self.switch(kind)
        try:
            yield
        finally:
            self.switch(former)

    def switch(self, kind: str) -> None:
        """The seconds from now on go to `kind`."""
        now = time.perf_counter()
        self.total[self._kind] += now - self._since
        self._kind, self._since = kind, now

    def write(self, stage: str, step: int) -> None:
        """A record after `step` steps of `stage`."""
        self.switch(self._kind)
        self._append(stage=stage, step_done=step)

    def _append(self, **entries: Any) -> None:
        spent = {kind: round(self.total[kind] - self._told[kind], 3) for kind in KINDS if self.total[kind] > self._told[kind]}
        if self._path:
            with self._path.open("a") as file:
                file.write(json.dumps({"time": time.time(), **entries, **spent}) + "\n")
        self._told |= self.total

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; the seconds that they take to come are spent on data."""
        iterator = iter(items)
        while True:
            with self.spend("data"):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def finish(self) -> None:
        """The last record of a run that came to its end: what passes until it is gone on with is no loss."""
        self.switch(self._kind)
        self._append(finished=True)

    def summary(self) -> str:
        """Of this workdir, with its former runs: "goodput 91.2 % of 3,600 s: start 12 s, compile 80 s"."""
        self.switch(self._kind)
        whole = sum(self.total.values())
        rest = ", ".join(f"{kind} {seconds:,.0f} s" for kind, seconds in self.total.items() if kind != "step" and seconds >= 0.5)
        return f"goodput {100 * self.total['step'] / max(whole, 1e-9):.1f} % of {whole:,.0f} s" + f": {rest}" * bool(rest)


def _read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]  # a kill may have cut the last line


def _spent(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by kind of a log; those of steps that a later run began before are redone."""
    total, steps = dict.fromkeys(KINDS, 0.0), []
    for record in records:
        for kind in KINDS.keys() & record.keys():
            total[kind] += record[kind]
        steps.append(record)
        for stage, done in record.get("resume_at", {}).items():
            lost = [r.get("stage") == stage and r["step_done"] > done for r in steps]
            seconds = sum(r.get("step", 0.0) for r, gone in zip(steps, lost) if gone)
            steps = [r for r, gone in zip(steps, lost) if not gone]
            total["step"] -= seconds
            total["redone"] += seconds
    return total
