"""Presets: which mesh axis each logical axis lies on. One table; the sizes of the mesh are the config's.

Parameters are stored over "fsdp" along the model width, over "tensor" along heads and hidden widths; activations are split over
"data" and "fsdp" by rows, over "seq" by tokens, over "tensor" by heads and hidden widths. A mesh axis of size 1 costs nothing.
"""
import math

from jax.sharding import Mesh

from vino_jax.errors import UserError
from vino_jax.settings import nearest
from vino_jax.sharding.axes import ACTIVATION_AXES, MESH_AXES, PARAM_AXES
from vino_jax.sharding.constrain import mesh_axes

_PARAMS = {
    "layers": None, "embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "modulation": "tensor",
    "vlm_width": "fsdp", "vlm_mlp": "tensor", "vocab": "tensor", "queries": None, "conv_in": None, "conv_out": "fsdp",
}
_ACTIVATIONS = {
    "batch": ("data", "fsdp"), "tokens": "seq", "width": None, "act_heads": "tensor", "act_mlp": "tensor", "pixels": None,
    "tiles": MESH_AXES,
}

_WIDE = ("heads", "kv_heads", "mlp", "modulation", "vlm_mlp", "vocab")  # second dims, over which more axes can store

PRESETS: dict[str, dict] = {
    # every parameter on every device: data parallel only
    "replicated": {**dict.fromkeys(_PARAMS), **_ACTIVATIONS},
    # ZeRO-3 over "fsdp", optionally tensor parallel, tokens over "seq"
    "fsdp": {**_PARAMS, **_ACTIVATIONS},
    # the same, weights and moments stored over "seq" too
    "fsdp_seq": {**_PARAMS, **dict.fromkeys(_WIDE, ("tensor", "seq")), **_ACTIVATIONS},
    # and over "data": for one slice, as gathers would go through the network between slices
    "fsdp_all": {**_PARAMS, **dict.fromkeys(_WIDE, ("tensor", "seq", "data")), **_ACTIVATIONS},
}


def preset(name: str) -> dict:
    """Rules (logical axis -> mesh axis, several, or None). Raises UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"unknown sharding preset {name!r}{nearest(name, PRESETS)}")
    rules = PRESETS[name]
    assert set(rules) == {*PARAM_AXES, *ACTIVATION_AXES}, f"preset {name} does not cover the vocabulary of sharding/axes.py"
    return rules


def for_rows(rules: dict, mesh: Mesh, rows: int) -> dict:
    """The rules for a pass of so many rows: where they divide over the mesh axes of tokens too, rows lie there and no row is shared, so that
    attention sends nothing; else as given."""
    axes = (*mesh_axes(rules["batch"]), *mesh_axes(rules["tokens"]))
    if rows % math.prod(mesh.shape[axis] for axis in axes):
        return rules
    return {**rules, "batch": axes, "tokens": None}
