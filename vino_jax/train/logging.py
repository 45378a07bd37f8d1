"""Metrics of a run as JSONL and TensorBoard, and a progress bar."""
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from vino_jax.batch import TASKS
from vino_jax.checkpoint.atomic import write_text
from vino_jax.flow.path import TIME_BINS

# tensorboardX imports PyTorch where it finds it, which nothing here needs: seconds of each start, and 200 MB. A None makes that import fail.
_torch = sys.modules.setdefault("torch", None)
from tensorboardX import SummaryWriter  # noqa: E402

if _torch is None:
    del sys.modules["torch"]

FILES = ("metrics", "held_out")  # of the training loss and its like, and of the held-out loss


class MetricWriter:
    """Appends one JSON object a record to DIR/metrics.jsonl or DIR/held_out.jsonl, and the same numbers to TensorBoard files in
    DIR/tensorboard, there by the steps of the whole run.

    steps: of the stages in their order. resume_at: steps done by stage; of what a former run wrote, records of later steps are dropped,
    so that no step stands twice.
    """

    def __init__(self, directory: pathlib.Path, steps: Mapping[str, int], *, resume_at: Mapping[str, int]):
        directory.mkdir(parents=True, exist_ok=True)
        self._before = {name: sum(list(steps.values())[:i]) for i, name in enumerate(steps)}
        self._paths, self._files = {name: directory / f"{name}.jsonl" for name in FILES}, {}
        for path in self._paths.values():
            if path.exists():
                _drop_after(path, resume_at)
        done = max((self._before[name] + step for name, step in resume_at.items() if step), default=-1)
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=done + 1)

    def write(self, stage: str, step: int, values: dict[str, Any], file: str = "metrics") -> None:
        """step: of the stage. values: floats, or None for what was not seen since the last record. file: of FILES."""
        total = self._before[stage] + step
        if file not in self._files:
            self._files[file] = self._paths[file].open("a")
        self._files[file].write(json.dumps({"stage": stage, "step": step, "total_step": total, **values}) + "\n")
        self._files[file].flush()
        where = stage if file == "metrics" else f"{stage}/{file}"
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{where}/{name}", value, total)

    def picture(self, stage: str, step: int, name: str, picture_HWC: np.ndarray) -> None:
        """uint8 picture into TensorBoard."""
        self._board.add_image(f"{stage}/{name}", picture_HWC, self._before[stage] + step, dataformats="HWC")

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._board.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _drop_after(path: pathlib.Path, resume_at: Mapping[str, int]) -> None:
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]  # a kill may have cut the last line
    records = [json.loads(line) for line in lines]
    # a stage that is at its start measures step 0 again
    kept = [r for r in records if r["stage"] not in resume_at or r["step"] <= (resume_at[r["stage"]] or -1)]
    write_text(path, "".join(json.dumps(r) + "\n" for r in kept))


class NoWriter(MetricWriter):
    """What the processes of a run write but the first: nothing."""

    def __init__(self):
        pass

    def write(self, stage: str, step: int, values: dict[str, Any], file: str = "metrics") -> None:
        pass

    def picture(self, stage: str, step: int, name: str, picture_HWC: np.ndarray) -> None:
        pass

    def close(self) -> None:
        pass


class Accumulator:
    """Sums what steps report between two log records and turns it into means."""

    def __init__(self):
        self._rows: list[dict[str, np.ndarray]] = []

    def add(self, metrics: dict[str, Any]) -> None:
        self._rows.append({k: np.asarray(v) for k, v in metrics.items()})

    def take(self) -> dict[str, float | None]:
        """Means since the last call: loss, gradient norms, loss by time bin ("loss_t0.0".."loss_t0.9") and by task."""
        rows, self._rows = self._rows, []
        out: dict[str, float | None] = {
            name: float(np.mean([r[name] for r in rows])) for name in ("loss", "gradient_norm", "gradient_norm_queries") if name in rows[0]}

        def weighted(kind, labels):
            loss, weight = (np.sum([r[f"{kind}_{what}"] for r in rows], axis=0) for what in ("loss", "weight"))
            return {f"loss_{label}": float(v / w) if w else None for label, v, w in zip(labels, loss, weight)}

        return {**out, **weighted("bin", [f"t{i / TIME_BINS:.1f}" for i in range(TIME_BINS)]), **weighted("task", TASKS)}


def progress_bar(total: int, initial: int, name: str, quiet: bool, unit: str = "step") -> tqdm:
    return tqdm(total=total, initial=initial, desc=name, unit=unit, disable=quiet, mininterval=2.0, dynamic_ncols=True)
