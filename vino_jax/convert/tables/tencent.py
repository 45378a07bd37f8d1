"""Tencent's own names of HunyuanVideo's transformer (mp_rank_00_model_states.pt), as views that carry diffusers' names.

It fuses queries, keys and values, in single blocks with the MLP's input, and gives the last modulation as [shift ; scale] where
diffusers has [scale ; shift]. With the view, everything else reads such a file by the one table of the MMDiT.
"""
import re
from collections.abc import Callable

import numpy as np

from vino_jax.convert.io import TensorSource

Rows = Callable[[int, int], list[slice]]  # (rows of the tensor, width of the model) -> the rows of a view, in their order


def _all(rows: int, width: int) -> list[slice]:
    return [slice(0, rows)]


def _nth(n: int) -> Rows:
    return lambda rows, width: [slice(n * width, (n + 1) * width)]


def _rest(rows: int, width: int) -> list[slice]:
    return [slice(3 * width, rows)]


def _swapped(rows: int, width: int) -> list[slice]:
    return [slice(rows // 2, rows), slice(0, rows // 2)]


def _qkv(*names: str) -> dict[str, Rows]:
    return {name: _nth(n) for n, name in enumerate(names)}


_TEXT, _REFINER = "context_embedder.time_text_embed.", "context_embedder.token_refiner.refiner_blocks.{i}."
_DOUBLE, _SINGLE = "transformer_blocks.{i}.", "single_transformer_blocks.{i}."
# Tencent's name without .weight and .bias, {i} for the block -> diffusers' names and the rows of each.
NAMES: dict[str, dict[str, Rows]] = {theirs: views if isinstance(views, dict) else {views: _all} for theirs, views in {
    "img_in.proj": "x_embedder.proj",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1", "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1", "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1", "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": f"{_TEXT}timestep_embedder.linear_1", "txt_in.t_embedder.mlp.2": f"{_TEXT}timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": f"{_TEXT}text_embedder.linear_1", "txt_in.c_embedder.linear_2": f"{_TEXT}text_embedder.linear_2",
    **{f"txt_in.individual_token_refiner.blocks.{{i}}.{theirs}": views for theirs, views in {
        "norm1": f"{_REFINER}norm1", "norm2": f"{_REFINER}norm2", "self_attn_proj": f"{_REFINER}attn.to_out.0",
        "self_attn_qkv": _qkv(f"{_REFINER}attn.to_q", f"{_REFINER}attn.to_k", f"{_REFINER}attn.to_v"),
        "mlp.fc1": f"{_REFINER}ff.net.0.proj", "mlp.fc2": f"{_REFINER}ff.net.2", "adaLN_modulation.1": f"{_REFINER}norm_out.linear"}.items()},
    **{f"double_blocks.{{i}}.{theirs}": views for theirs, views in {
        "img_mod.linear": f"{_DOUBLE}norm1.linear", "txt_mod.linear": f"{_DOUBLE}norm1_context.linear",
        "img_attn_qkv": _qkv(f"{_DOUBLE}attn.to_q", f"{_DOUBLE}attn.to_k", f"{_DOUBLE}attn.to_v"),
        "txt_attn_qkv": _qkv(f"{_DOUBLE}attn.add_q_proj", f"{_DOUBLE}attn.add_k_proj", f"{_DOUBLE}attn.add_v_proj"),
        "img_attn_q_norm": f"{_DOUBLE}attn.norm_q", "img_attn_k_norm": f"{_DOUBLE}attn.norm_k",
        "txt_attn_q_norm": f"{_DOUBLE}attn.norm_added_q", "txt_attn_k_norm": f"{_DOUBLE}attn.norm_added_k",
        "img_attn_proj": f"{_DOUBLE}attn.to_out.0", "txt_attn_proj": f"{_DOUBLE}attn.to_add_out",
        "img_mlp.fc1": f"{_DOUBLE}ff.net.0.proj", "img_mlp.fc2": f"{_DOUBLE}ff.net.2",
        "txt_mlp.fc1": f"{_DOUBLE}ff_context.net.0.proj", "txt_mlp.fc2": f"{_DOUBLE}ff_context.net.2"}.items()},
    **{f"single_blocks.{{i}}.{theirs}": views for theirs, views in {
        "linear1": _qkv(f"{_SINGLE}attn.to_q", f"{_SINGLE}attn.to_k", f"{_SINGLE}attn.to_v") | {f"{_SINGLE}proj_mlp": _rest},
        "linear2": f"{_SINGLE}proj_out", "q_norm": f"{_SINGLE}attn.norm_q", "k_norm": f"{_SINGLE}attn.norm_k",
        "modulation.linear": f"{_SINGLE}norm.linear"}.items()},
    "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": {"norm_out.linear": _swapped},
}.items()}
_WIDTH = "img_in.proj.weight"  # its rows are the width


def as_diffusers(source: TensorSource) -> TensorSource:
    """`source` itself, or, where it has Tencent's names, a view of it with diffusers'. Names that Tencent's release does not have stay
    as they are, for the plan to name."""
    if _WIDTH not in source.manifest:
        return source
    width = source.manifest[_WIDTH][0][0]
    views: dict[str, tuple[str, list[slice]]] = {}
    for name, (shape, _) in source.manifest.items():
        stem, _, leaf = name.rpartition(".")
        block = re.search(r"(?<=blocks\.)\d+", stem)
        for view, rows in NAMES.get(stem.replace(f"blocks.{block[0]}.", "blocks.{i}.", 1) if block else stem, {stem: _all}).items():
            views[f"{view.replace('{i}', block[0]) if block else view}.{leaf}"] = name, rows(shape[0] if shape else 0, width)

    def read_into(view: str, out: np.ndarray, first: int) -> None:
        name, parts = views[view]
        before = 0  # rows of the view in the parts before
        for part in parts:
            rows = part.stop - part.start
            low, high = max(first - before, 0), min(first + len(out) - before, rows)
            if low < high:
                source.read_into(name, out[before + low - first:before + high - first], part.start + low)
            before += rows

    return TensorSource(source.label, source.files, {view: _shape(source, *of) for view, of in views.items()}, read_into)


def _shape(source: TensorSource, name: str, rows: list[slice]) -> tuple[tuple[int, ...], np.dtype]:
    shape, kind = source.manifest[name]
    return (sum(part.stop - part.start for part in rows), *shape[1:]) if shape else shape, kind
