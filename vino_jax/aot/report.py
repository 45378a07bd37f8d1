"""Rows of the report: one a program, as plain data for JSON and as tables to read."""
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from vino_jax.aot.chips import GIB, Chip
from vino_jax.aot.measure import Measured
from vino_jax.aot.roofline import estimate

Row = dict[str, Any]


def row(measured: Measured, chip: Chip, *, stage: str, bucket: str, remat: str, rows_a_chip: float, model_flops: float | None) -> Row:
    """All numbers of one program, of one chip and one step: bytes, FLOPs, seconds. model_flops: None where no formula counts them."""
    cost, out = measured.cost, {"stage": stage, "bucket": bucket, "remat": remat, "rows_a_chip": rows_a_chip, "fits": measured.fits,
                                "compile_seconds": round(measured.seconds, 1), "memory": dataclasses.asdict(measured.memory)}
    if cost is None:
        return {**out, "flops": None, "collectives": None, "kernels": None, "host": None, "unknown_loops": None, "unknown_cycles": None,
                "estimate": None}
    flops = {"matmul": cost.matmul, "kernels": cost.kernel, "executed": cost.executed, "model": model_flops,
             "executed_over_model": cost.executed / model_flops if model_flops else None}
    return {**out, "flops": flops, "collectives": [dataclasses.asdict(one) for one in cost.collectives],
            "kernels": [dataclasses.asdict(one) for one in cost.kernels], "host": {"to": cost.to_host, "from": cost.from_host},
            "unknown_loops": cost.unknown_loops, "unknown_cycles": cost.unknown_cycles,
            "estimate": dataclasses.asdict(estimate(cost, chip, model_flops))}


_HEAD = ("stage", "bucket", "remat", "rows a chip", "HBM peak of limit, GiB", "arguments", "temporaries", "TFLOP", "over model",
         "collectives, GB", "unhidden", "host, GB", "compile, s", "step, s", "MFU")


def _cells(one: Row) -> list[str]:
    memory, begin = one["memory"], [one["stage"], one["bucket"], one["remat"], f"{one['rows_a_chip']:g}"]
    if not one["fits"]:
        return [*begin, fit(one), *["-"] * 7, f"{one['compile_seconds']:.0f}", "-", "-"]
    begin += [fit(one), f"{memory['arguments'] / GIB:.1f}", f"{memory['temporaries'] / GIB:.1f}"]
    flops, guess, collectives = one["flops"], one["estimate"], one["collectives"]
    return [*begin, f"{flops['executed'] / 1e12:.4g}",
            _or_dash(flops["executed_over_model"], ".3f"), f"{sum(c['bytes'] for c in collectives) / 1e9:.3g}",
            f"{sum(c['bytes'] for c in collectives if not c['overlapped']) / 1e9:.3g}", f"{sum(one['host'].values()) / 1e9:.3g}",
            f"{one['compile_seconds']:.0f}", f"{guess['step']:.3g}", _or_dash(guess["mfu"], ".1%")]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def fit(one: Row) -> str:
    """Of a row: peak and limit, or what it would need."""
    memory = one["memory"]
    if one["fits"]:
        return f"{memory['peak'] / GIB:.1f} of {memory['limit'] / GIB:.2f}"
    needed = "" if memory["needed"] is None else f" ({memory['needed'] / GIB:.1f} of {memory['limit'] / GIB:.2f} GiB)"
    return f"does not fit{needed}"


def table(rows: Sequence[Row], *, markdown: bool = False) -> str:
    """One line a program."""
    lines = [list(_HEAD), *map(_cells, rows)]
    if markdown:
        lines.insert(1, ["---"] * len(_HEAD))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def details(one: Row) -> list[str]:
    """A line for each kind of collective and each kernel of a program, largest first."""
    if not one["fits"]:
        return []
    lines = [f"{c['kind']} over {c['group']} chips, {'overlapped' if c['overlapped'] else 'alone'}"
             f"{', zero-padded where a gather would do' if c['padded'] else ''}: {c['count']:.0f} calls, {c['bytes'] / 1e9:.3g} GB whole, "
             f"{c['wire'] / 1e9:.3g} GB on the wire" for c in one["collectives"]]
    lines += [f"kernel {k['name']} {k['operands']}: {k['count']:.0f} calls, {k['flops'] / 1e12:.4g} TFLOP"
              f"{'' if k['known'] else ' (unknown, counted as 0)'}" for k in one["kernels"]]
    lines += [f"loop {name}: its turns cannot be read, counted as one" for name in one["unknown_loops"]]
    return lines + [f"{name}: the compiler has no estimate of its cycles, counted as none" for name in one["unknown_cycles"]]


def text(rows: Iterable[Row], heading: str, assumptions: Sequence[str], *, markdown: bool = False) -> str:
    """The whole report."""
    rows, bullet = list(rows), "- " if markdown else "  "
    parts = [f"## {heading}\n" if markdown else heading, table(rows, markdown=markdown), ""]
    for one in rows:
        if lines := details(one):
            parts += [f"{one['stage']}, {one['bucket']}:" + "\n" * markdown, *(bullet + line for line in lines), *[""] * markdown]
    return "\n".join([*parts, "Steps and MFU are estimates:" + "\n" * markdown, *(bullet + line for line in assumptions)])
