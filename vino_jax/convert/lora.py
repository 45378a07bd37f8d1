"""Adapters of the MMDiT as one file of PEFT's names, which diffusers' HunyuanVideoPipeline.load_lora_weights reads, and back.

Names come from the MMDiT's one table: `transformer.<module>.lora_A.weight` (rank, inputs) and `lora_B.weight` (outputs, rank), one pair a layer.
Ranks and alphas stand in the file's metadata, as diffusers writes them; where there are none, alpha is the rank, as it is for diffusers.
"""
import collections
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from vino_jax.checkpoint.atomic import atomic_folder
from vino_jax.convert.io import open_source
from vino_jax.convert.ops import LINEAR
from vino_jax.convert.tables.mmdit import MMDIT
from vino_jax.errors import UserError
from vino_jax.nn.lora import LowRank

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
_PREFIX = "transformer."
_METADATA = "lora_adapter_metadata"
_SIDES = {"a": ".lora_A.weight", "b": ".lora_B.weight"}
# Path of a kernel in the MMDiT -> its module, {i} for the layer.
_MODULES = {rule.jax: rule.torch.removesuffix(".weight") for rule in MMDIT.rules if rule.op is LINEAR}


def write(folder: Path, adapters: Mapping[str, LowRank]) -> None:
    """`folder`/FILE from {path of a kernel in the MMDiT: adapter}. Raises UserError where the folder already holds something."""
    tensors: dict[str, np.ndarray] = {}
    settings: dict[str, tuple[int, float]] = {}
    for path, adapter in adapters.items():
        for module, a, b in _layers(path, adapter):
            settings[module] = adapter.rank, adapter.alpha
            for side, array in (("a", a), ("b", b)):
                tensors[_PREFIX + module + _SIDES[side]] = np.ascontiguousarray(array.T)
    (rank, alpha), _ = collections.Counter(settings.values()).most_common(1)[0]
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted(settings),
              "rank_pattern": {module: r for module, (r, _) in settings.items() if r != rank},
              "alpha_pattern": {module: a for module, (_, a) in settings.items() if a != alpha}}
    metadata = {"format": "pt", _METADATA: json.dumps({_PREFIX + key: value for key, value in values.items()}, indent=2, sort_keys=True)}
    with atomic_folder(folder) as place:
        save_file(tensors, place / FILE, metadata)


def _layers(path: str, adapter: LowRank) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(module, A, B) of every layer, or of the one."""
    module = _MODULES[path]
    if "{i}" not in module:
        yield module, adapter.a, adapter.b
    else:
        yield from ((module.replace("{i}", str(i)), a, b) for i, (a, b) in enumerate(zip(adapter.a, adapter.b)))


def read(path: Path, kernels: Mapping[str, tuple[int, ...]]) -> dict[str, LowRank]:
    """{path of a kernel in the MMDiT: adapter} of a file, or of a folder's one file. kernels: shapes of all kernels, by path.

    Layers of a stack that the file leaves out get zeros; where they have several ranks all get the largest, filled up with zeros.
    Raises UserError for a file that is none of adapters, and naming all tensors that no kernel takes.
    """
    source = open_source(path)
    metadata = _metadata(source.files[0]) if source.manifest else {}
    places = {module: place for kernel, shape in kernels.items() if kernel in _MODULES for module, place in _places(kernel, shape)}
    found: dict[str, dict[int | None, dict[str, Any]]] = {}
    wrong = []
    for name, (shape, _) in source.manifest.items():
        side, module = next(((side, name[len(_PREFIX):-len(end)]) for side, end in _SIDES.items()
                             if name.startswith(_PREFIX) and name.endswith(end)), (None, ""))
        kernel, layer = places.get(module, (None, None))
        if side is None or kernel is None or len(shape) != 2 or shape[side == "a"] != kernels[kernel][-2:][side == "b"]:
            wrong.append(f"{name} {list(shape)}")
            continue
        entry = found.setdefault(kernel, {}).setdefault(layer, {"module": module})
        entry[side] = source.read(name).astype(np.float32).T
    wrong += [f"{entry['module']} without an A and a B of one rank" for layers in found.values() for entry in layers.values()
              if len(entry) < 3 or entry["a"].shape[-1] != entry["b"].shape[0]]
    if wrong or not found:
        raise UserError(f"{path}: {len(wrong)} tensors fit no kernel of the MMDiT: {', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}; "
                        f"names are {_PREFIX}<module>{_SIDES['a']} and {_SIDES['b']}" if wrong else f"{path} holds no adapters")
    return {kernel: _stacked(layers, kernels[kernel], metadata) for kernel, layers in found.items()}


def _places(kernel: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[str, int | None]]]:
    """(module, (path, layer)) of a kernel; None for one that is not stacked."""
    module = _MODULES[kernel]
    layers = range(shape[0]) if "{i}" in module else (None,)
    yield from ((module.replace("{i}", str(i)), (kernel, i)) for i in layers)


def _metadata(file: Path) -> dict[str, Any]:
    """PEFT's LoraConfig of the transformer, where the file holds it."""
    if file.suffix != ".safetensors":
        return {}
    with safe_open(file, "numpy") as opened:
        text = (opened.metadata() or {}).get(_METADATA, "{}")
    try:
        values = {key.removeprefix(_PREFIX): value for key, value in json.loads(text).items()}
    except (ValueError, AttributeError):
        raise UserError(f"{file}: its metadata {_METADATA} is no JSON object") from None
    for name in ("use_rslora", "use_dora", "lora_bias"):
        if values.get(name):
            raise UserError(f"{file}: {name} is not supported; only plain LoRA is")
    return values


def _alpha(module: str, rank: int, metadata: Mapping[str, Any]) -> float:
    """Of one module, by PEFT's rules: the first pattern that matches the end of its name, else the adapter's own."""
    for pattern, alpha in metadata.get("alpha_pattern", {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(alpha)
    return float(metadata.get("lora_alpha", rank))


def _stacked(layers: Mapping[int | None, dict[str, Any]], shape: tuple[int, ...], metadata: Mapping[str, Any]) -> LowRank:
    """One adapter of a kernel's layers. Where their scales differ, B holds them and alpha is the rank."""
    rank = max(entry["a"].shape[-1] for entry in layers.values())
    scales = {layer: _alpha(entry["module"], entry["a"].shape[-1], metadata) / entry["a"].shape[-1] for layer, entry in layers.items()}
    same = len(set(scales.values())) == 1
    a, b = np.zeros((*shape[:-1], rank), np.float32), np.zeros((*shape[:-2], rank, shape[-1]), np.float32)
    for layer, entry in layers.items():
        own = entry["a"].shape[-1]
        place = () if layer is None else (layer,)
        a[place][:, :own] = entry["a"]
        b[place][:own] = entry["b"] if same else np.float32(scales[layer]) * entry["b"]
    return LowRank(a, b, next(iter(scales.values())) * rank if same else float(rank))
