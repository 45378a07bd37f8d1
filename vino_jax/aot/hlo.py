"""The text of a compiled program: its instructions, and how often each of its computations runs.

XLA's own `cost_analysis()` counts a loop's body once; here a computation inside loops runs as often as they turn.
"""
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

BYTES = {
    "pred": 1, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3b11fnuz": 1, "f8e4m3": 1, "f8e8m0fnu": 1,
}
FLOATS = ("bf16", "f16", "f32")

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = ")
_OWN_LINE = re.compile(r"^(\s+(ROOT )?%\S+ = |%|ENTRY|\}|HloModule)")  # other lines continue the attributes of the one above
_PARENTHESIS = re.compile(r"[()]")
_TRIPS = re.compile(r'known_trip_count"?[:=]\{"?n"?:"?(\d+)')
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%([^\s,]+)")


@dataclass(frozen=True, slots=True)
class Array:
    dtype: str
    dims: tuple[int, ...]
    layout: str  # with the memory space: "S(5)" is the host's

    @property
    def bytes(self) -> float:
        return BYTES[self.dtype] * math.prod(self.dims)

    @property
    def on_host(self) -> bool:
        return "S(5)" in self.layout


@dataclass(frozen=True, slots=True)
class Instruction:
    """`shape` is the text of its type, `arguments` what stands in its parentheses, `attributes` all that follows."""

    name: str
    shape: str
    op: str
    arguments: str
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names."""
        return re.findall(r"%([^\s,()]+)", self.arguments)

    @property
    def arrays(self) -> list[Array]:
        """Of its result: one, or those of a tuple."""
        found = _ARRAY.findall(_COMMENT.sub("", self.shape))
        return [Array(d, tuple(int(n) for n in dims.split(",") if n), layout) for d, dims, layout in found if d in BYTES]

    def attribute(self, pattern: str) -> str | None:
        """The first group of the regex in its attributes."""
        found = re.search(pattern, self.attributes)
        return found and found[1]


@dataclass(frozen=True)
class Module:
    """computations: name -> {name: instruction}, in order."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    partitions: int


def parse(text: str) -> Module:
    """The module of `Compiled.as_text()`, or of the text that the compiler dumps."""
    lines: list[str] = []
    for line in text.split("\n"):
        if lines and line and not _OWN_LINE.match(line):
            lines[-1] += " " + line
        else:
            lines.append(line)
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in lines:
        if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
            name = re.match(r"(?:ENTRY )?%?([^\s(]+)", line)[1]
            current = computations[name] = {}
            entry = name if line.startswith("ENTRY") else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current[found[2]] = _instruction(found[2], line[found.end():], bool(found[1]))
    return Module(computations, entry, int((re.search(r"num_partitions=(\d+)", lines[0]) or [0, "1"])[1]))


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    """rest: `type op(operands), attributes`, where a type may be a tuple in parentheses."""
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = _closing(rest, start)
    return Instruction(name, shape, rest[:start], rest[start + 1:end - 1], rest[end:], root)


def _closing(text: str, start: int) -> int:
    """Behind the parenthesis that closes the one at `start`."""
    depth = 0
    for found in _PARENTHESIS.finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


@dataclass(frozen=True)
class Runs:
    """count: name of a computation -> how often it runs. place: "main", "fused" (part of one instruction above it) or "async" (beside what
    follows). unknown: loops whose trip count cannot be read; they count as one turn."""

    count: Counter
    place: dict[str, str]
    unknown: list[str]


def runs(module: Module) -> Runs:
    """How often and where every computation runs."""
    found = Runs(Counter(), {}, [])
    _visit(module, module.entry, 1, "main", found)
    return found


def _visit(module: Module, name: str, count: float, place: str, found: Runs) -> None:
    found.count[name] += count
    found.place[name] = place
    for instruction in module.computations.get(name, {}).values():
        for called, times, where in _calls(module, instruction, place, found.unknown):
            _visit(module, called, count * times, where, found)


def _calls(module: Module, instruction: Instruction, place: str, unknown: list[str]) -> Iterator[tuple[str, int, str]]:
    """(computation, times, place) of what an instruction calls; not what it applies to single values, as a reduce does."""
    if instruction.op == "while":
        trips = _trips(module, instruction)
        if trips is None:
            unknown.append(instruction.name)
        yield instruction.attribute(r"body=%([^\s,]+)"), 1 if trips is None else trips, place
    elif instruction.op == "conditional":
        for several, one in _BRANCHES.findall(instruction.attributes):
            for name in re.findall(r"%?([^\s,%]+)", several or one):
                yield name, 1, place
    elif called := instruction.attribute(r"calls=%([^\s,]+)") or (instruction.op == "call" and instruction.attribute(r"to_apply=%([^\s,]+)")):
        yield called, 1, {"async-start": "async", "fusion": "fused"}.get(instruction.op, place)


def _trips(module: Module, loop: Instruction) -> int | None:
    """Of a loop that counts up from 0 by 1 to a constant, as scans and maps do."""
    if known := _TRIPS.search(loop.attributes):
        return int(known[1])
    condition = module.computations.get(loop.attribute(r"condition=%([^\s,]+)"), {})
    root = next((i for i in condition.values() if i.root), None)
    if root is None or not (root.op == "fusion" or root.op == "compare" and "direction=LT" in root.attributes):
        return None
    limits = [condition[name] for name in root.operands if name in condition and condition[name].op == "constant"]
    return int(limits[0].arguments) if len(limits) == 1 else None
