"""What a compiled program does on each chip: matrix products, kernels, collectives and traffic with the host, read off its HLO.

All numbers are of one chip and one call of the program, weighted by the trip counts of the loops around them.
"""
import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vino_jax.aot.hlo import FLOATS, Array, Instruction, Module, parse, runs

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast")
# Products of (queries x keys x head width) in each of splash attention's kernels; "dkv" with the gradient of queries in it has one more.
SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "fused": 5}

_NO_ESTIMATE = str((1 << 63) - 1)  # what the compiler writes where it has none
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")


@dataclass
class Collective:
    """bytes: of the whole array that is gathered, reduced or exchanged among a group. wire: what a chip sends in the ring form of it.
    overlapped: computation may run beside it. padded: XLA sums zero-padded whole arrays where a gather would do."""

    kind: str
    group: int  # chips
    overlapped: bool
    padded: bool
    count: float = 1.0
    bytes: float = 0.0
    wire: float = 0.0

    SUMS: ClassVar = ("count", "bytes", "wire")

    @property
    def kind_key(self) -> tuple:
        return self.kind, self.group, self.overlapped, self.padded


@dataclass
class Kernel:
    """Calls of a Pallas kernel with operands of one shape. known: whether its FLOPs are, else they count as 0."""

    name: str
    operands: str
    known: bool
    count: float = 1.0
    flops: float = 0.0

    SUMS: ClassVar = ("count", "flops")

    @property
    def kind_key(self) -> tuple:
        return self.name, self.operands, self.known


@dataclass
class Cost:
    """matmul, kernel: FLOPs. cycles: the compiler's estimate of all that is neither kernel nor collective. to_host, from_host: bytes.
    unknown_loops: names of loops that were counted as one turn. unknown_cycles: instructions that the compiler has no estimate of."""

    matmul: float = 0.0
    cycles: float = 0.0
    to_host: float = 0.0
    from_host: float = 0.0
    collectives: list[Collective] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    unknown_loops: list[str] = field(default_factory=list)
    unknown_cycles: list[str] = field(default_factory=list)

    @property
    def kernel(self) -> float:
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def executed(self) -> float:
        return self.matmul + self.kernel


def program_cost(text: str) -> Cost:
    """Of a program's text (`Compiled.as_text()`, or as the compiler dumps it). Of a conditional every branch counts."""
    module = parse(text)
    found, split = runs(module), _split_collectives(module)
    cost = Cost(unknown_loops=found.unknown)
    collectives: dict[tuple, Collective] = {}
    kernels: dict[tuple, Kernel] = {}
    for name, count in found.count.items():
        body, place = module.computations.get(name, {}), found.place[name]
        for instruction in body.values():
            cost.matmul += count * matmul_flops(instruction, body)
            if (one := _collective(instruction, body, name, place, split, module.partitions)) is not None:
                _add(collectives, one, count)
            if (call := _kernel(instruction, body)) is not None:
                _add(kernels, call, count)
            if place != "fused":
                cycles = instruction.attribute(r'"estimated_cycles":"(\d+)"') or "0"
                if cycles == _NO_ESTIMATE:
                    cost.unknown_cycles.append(instruction.name)
                else:
                    cost.cycles += count * int(cycles)
                sent, taken = _host_bytes(instruction, body)
                cost.to_host += count * sent
                cost.from_host += count * taken
    cost.collectives = sorted(collectives.values(), key=lambda one: -one.wire)
    cost.kernels = sorted(kernels.values(), key=lambda one: -one.flops)
    return cost


def _add(table: dict[tuple, Any], one: Collective | Kernel, count: float) -> None:
    """`count` more of its kind."""
    if one.kind_key not in table:
        table[one.kind_key] = dataclasses.replace(one, **dict.fromkeys(one.SUMS, 0.0))
    for name in one.SUMS:
        setattr(table[one.kind_key], name, getattr(table[one.kind_key], name) + count * getattr(one, name))


def matmul_flops(instruction: Instruction, body: Mapping[str, Instruction]) -> float:
    """Of a matrix product or convolution (TPU programs write the one as the other), 2 a multiply-add; 0 for anything else."""
    if instruction.op not in ("dot", "convolution"):
        return 0.0
    left, right = (body[name].arrays[0].dims for name in instruction.operands[:2])
    out = instruction.arrays[0].dims
    if instruction.op == "dot":
        contracted = [int(d) for d in instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}").split(",") if d]
        return 2.0 * math.prod(out) * math.prod(left[d] for d in contracted)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", instruction.attribute(r"window=\{([^}]*)\}") or ""))
    groups, batch_groups = (int(instruction.attribute(rf"{name}_group_count=(\d+)") or 1) for name in ("feature", "batch"))
    rows = left[labels[0].index("b")] / batch_groups
    pairs = math.prod(_taps(*(dims[label.index(c)] for dims, label in zip((left, right, out), labels)), i, window)
                      for i, c in enumerate(sorted(filter(str.isdigit, labels[0]))))
    return 2.0 * pairs * rows * left[labels[0].index("f")] / groups * out[labels[2].index("f")]


def _taps(size: int, taps: int, outputs: int, dim: int, window: Mapping[str, str]) -> int:
    """Pairs of an output and a tap of the kernel that meet a value of the input, not padding or dilation, along one dim of a window."""

    def setting(name: str, default: str) -> str:
        return window[name].split("x")[dim] if name in window else default

    stride, dilation, tap_step = (int(setting(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    before = int(setting("pad", "0_0").split("_")[0])
    total = 0
    for tap in range(taps):
        first = tap * tap_step - before  # where the first output looks, in the dilated input
        if dilation == 1:
            total += max(0, min(outputs - 1, (size - 1 - first) // stride) - max(0, -(first // stride)) + 1)
        else:
            places = range(first, first + outputs * stride, stride)
            total += sum(place >= 0 and place % dilation == 0 and place // dilation < size for place in places)
    return total


def splash_flops(name: str, operands: list[Array], results: list[Array]) -> float | None:
    """Of a splash attention call without a sparse mask, from its shapes; None for any other kernel."""
    found = _SPLASH.search(name)
    shaped = [array.dims for array in operands if array.dtype in FLOATS and len(array.dims) >= 3]
    if not found or len(shaped) < 3:
        return None
    (*heads, queries, width), keys = shaped[0], shaped[1][-2]
    kind = found[1]
    if kind == "dkv":  # its fused form gives three gradients, not two; what has fewer dims is scratch
        kind = "fused" if sum(len(array.dims) >= len(shaped[0]) for array in results) > 2 else kind
    return 2.0 * SPLASH_PRODUCTS[kind] * math.prod(heads) * queries * keys * width


def _kernel(instruction: Instruction, body: Mapping[str, Instruction]) -> Kernel | None:
    if instruction.op != "custom-call" or "tpu_custom_call" not in instruction.attributes:
        return None
    operands = [array for name in instruction.operands if name in body for array in body[name].arrays]
    flops = splash_flops(instruction.name, operands, instruction.arrays)
    if flops is None and (stated := instruction.attribute(r'"cost_estimate":\{[^}]*?"flops":"?(\d+)')):
        flops = float(stated)
    shapes = [f"{array.dtype}{list(array.dims)}" for array in operands if array.dtype in FLOATS and len(array.dims) >= 3]
    return Kernel(re.sub(r"[.\d]+$", "", instruction.name), " ".join(shapes), flops is not None, 1.0, flops or 0.0)


def _split_collectives(module: Module) -> dict[str, str]:
    """channel -> computation of the fusion that starts it, of collectives that are spread over computation: the HLO repeats them in the
    fusion that starts them, in those that they ride on and in the one that ends them."""
    started = {}
    for name, body in module.computations.items():
        for instruction in body.values():
            if instruction.op == "custom-call" and '"AsyncCollectiveStart"' in instruction.attributes:
                channels = (body[operand].attribute(r"channel_id=(\d+)") for operand in instruction.operands if operand in body)
                started.update((channel, name) for channel in channels if channel)
    return started


def _collective(instruction: Instruction, body: Mapping[str, Instruction], computation: str, place: str, split: Mapping[str, str],
                chips: int) -> Collective | None:
    kind = instruction.op.removesuffix("-start")
    channel = instruction.attribute(r"channel_id=(\d+)")
    if kind not in COLLECTIVES or split.get(channel, computation) != computation:
        return None
    group = 2 if kind == "collective-permute" else group_size(instruction, chips)
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind = "reduce-scatter"  # a fusion that sums and keeps its shard
    given = sum(array.bytes for name in instruction.operands if name in body for array in body[name].arrays)
    whole = given * group if kind == "all-gather" else given
    padded = kind == "all-reduce" and any("dynamic-update-slice" in name for name in instruction.operands)
    overlapped = instruction.op.endswith("-start") or place == "async" or channel in split
    return Collective(kind, group, overlapped, padded, 1.0, whole, wire_bytes(kind, whole, group))


def group_size(instruction: Instruction, chips: int) -> int:
    """Chips of one group of a collective."""
    found = re.search(r"replica_groups=(?:mesh\[(?P<axes>.*?)\][^{]*\{(?P<names>.*?)\}|\{\{(?P<first>[\d,]*)\}|\[\d+,(?P<size>\d+)\]<=)",
                      instruction.attributes)
    if not found:
        return chips
    if found["axes"] is not None:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found["axes"])}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found["names"])  # an axis, or some of it: 'axis':(1)2
        return math.prod(int(part) if part else sizes[name] for name, part in parts) or chips
    return len(found["first"].split(",")) if found["first"] is not None else int(found["size"])


def wire_bytes(kind: str, whole: float, group: int) -> float:
    """What a chip sends in the ring form of a collective over an array of `whole` bytes."""
    share = (group - 1) / group
    return whole * {"all-reduce": 2 * share, "collective-permute": 1, "collective-broadcast": 1}.get(kind, share)


def _host_bytes(instruction: Instruction, body: Mapping[str, Instruction]) -> tuple[float, float]:
    """(to the host, from the host) of a copy that an instruction starts."""
    if not instruction.op.endswith("-start") or "S(5)" not in instruction.shape:
        return 0.0, 0.0
    arrays = instruction.arrays
    if instruction.op == "copy-start" and arrays[0].on_host != arrays[1].on_host:  # (copy, original, ...)
        return (arrays[0].bytes, 0.0) if arrays[0].on_host else (0.0, arrays[0].bytes)
    if instruction.op == "dynamic-slice-start" and arrays[0].on_host:
        sizes = instruction.attribute(r"dynamic_slice_sizes=\{([\d,]*)\}").split(",")
        return 0.0, Array(arrays[0].dtype, tuple(map(int, sizes)), "").bytes
    if instruction.op == "dynamic-update-slice-start":
        return sum(array.bytes for array in body[instruction.operands[1]].arrays), 0.0
    return 0.0, 0.0
