"""The parts of the whole model on the PyTorch side: their tables, their names in vino.ckpt, and the folders that they come from."""
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vino_jax.convert import configs
from vino_jax.convert.io import TensorSource, has_safetensors, open_source
from vino_jax.convert.rules import Table
from vino_jax.convert.tables.mmdit import MMDIT
from vino_jax.convert.tables.qwen_vl import TABLE as QWEN_VL
from vino_jax.convert.tables.tencent import as_diffusers
from vino_jax.convert.tables.vae import table as vae_table
from vino_jax.convert.tables.vino import CONNECTOR, QUERIES, VAE_CONNECTOR
from vino_jax.errors import UserError
from vino_jax.settings import MMDiTConfig, VAEConfig, VinoConfig, VLMConfig, read_json

PARTS = ("mmdit", "connector", "vae_connector", "queries", "vlm", "vae")
# What stands before a part's names in vino.ckpt; the VAE is not in it.
VINO_PREFIXES = {
    "mmdit": "transformer.", "connector": "mm_encoder.connector.", "vae_connector": "mm_encoder.connector_vae_branch.",
    "queries": "mm_encoder.metaquery", "vlm": "mm_encoder.mm_encoder.",
}
# How names begin in a single file of a part's weights; vino.ckpt's begin in none of these ways.
_FILES = {"mmdit": ("x_embedder.", "img_in."), "vae": ("encoder.", "decoder."), "vlm": ("model.",)}
# Files of a Qwen3-VL folder that are its tokenizer and processor.
_PROCESSOR = ("tokenizer*", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
              "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*")


@dataclass(frozen=True)
class Given:
    """Where the user's parts lie, folders or single files of weights; None where they were not given."""

    vino: Path | None = None
    mmdit: Path | None = None
    vae: Path | None = None
    vlm: Path | None = None


@dataclass(frozen=True)
class Found:
    """What lies there: the architecture, one source for each part that has weights, the processor's files."""

    config: VinoConfig
    sources: dict[str, TensorSource]
    processor_files: tuple[Path, ...]
    notes: tuple[str, ...]  # for the user: what was given and is not used


def tables(config: VinoConfig) -> dict[str, Table]:
    """The table of every part; the VAE's depends on its sizes."""
    return {"mmdit": MMDIT, "connector": CONNECTOR, "vae_connector": VAE_CONNECTOR, "queries": QUERIES, "vlm": QWEN_VL,
            "vae": vae_table(config.vae)}


def vino_name(part: str, name: str) -> str:
    """The name in vino.ckpt of a part's tensor."""
    return VINO_PREFIXES[part].removesuffix("metaquery") + name


def find(given: Given, queries: int) -> Found:
    """Open everything that was given. A part that is both in vino.ckpt and in a folder comes from vino.ckpt, which was trained last;
    the folder then gives its config. queries: their number where vino.ckpt has none.

    Raises UserError for absent or damaged files, unsupported configs, and names in vino.ckpt that belong to no part.
    """
    mmdit = _place(given.mmdit, "transformer", "--mmdit")
    vae = _place(given.vae, "vae", "--vae")
    vlm = _place(given.vlm, "", "--vlm")
    vino = open_source(given.vino) if given.vino else None
    sources = _split(vino) if vino else {}
    config = configs.compose(_config(mmdit, configs.read_mmdit, MMDiTConfig), _config(vae, configs.read_vae, VAEConfig),
                             _config(vlm, configs.read_vlm, VLMConfig), vino.manifest if vino else {}, queries)
    if "vlm" in sources and vlm is None:
        raise UserError(f"{given.vino} holds the VLM but not its config; give its folder with --vlm")
    notes = []
    for part, place in (("mmdit", mmdit), ("vae", vae), ("vlm", vlm)):
        if place is None:
            continue
        if part in sources:
            if place.is_file() or has_safetensors(place):
                notes.append(f"{part}: taken from {given.vino}, the weights in {place} are not used")
        else:
            sources[part] = as_diffusers(open_source(place)) if part == "mmdit" else open_source(place)
    if not sources:
        raise UserError("nothing to convert: give at least one of --vino, --mmdit, --vae, --vlm")
    files = processor_files(vlm if vlm.is_dir() else vlm.parent) if vlm else ()
    return Found(config, {part: sources[part] for part in PARTS if part in sources}, files, tuple(notes))


def processor_files(folder: Path) -> tuple[Path, ...]:
    """Those files of a Qwen3-VL folder that are its tokenizer and processor."""
    return tuple(file for pattern in _PROCESSOR for file in sorted(folder.glob(pattern)) if file.is_file())


def classify(paths: list[Path]) -> Given:
    """Which part each path is: a HunyuanVideo folder, one of its parts, a Qwen3-VL folder, or (a folder of) vino.ckpt; a single file is
    of the part whose names it has."""
    given: dict[str, Path] = {}
    for path in paths:
        kinds = _kinds(path)
        for kind in kinds:
            if kind in given:
                raise UserError(f"{given[kind]} and {path} both hold the {kind}")
            given[kind] = path
    return Given(**given)


def _kinds(path: Path) -> list[str]:
    if not path.exists():
        raise UserError(f"{path} does not exist")
    folders = [part for part, name in (("mmdit", "transformer"), ("vae", "vae")) if (path / name / "config.json").is_file()]
    if folders:
        return folders
    if path.is_file():
        names = open_source(path).manifest
        return [part for part, start in _FILES.items() if any(name.startswith(start) for name in names)][:1] or ["vino"]
    if not (path / "config.json").is_file():
        return ["vino"]
    data = read_json(path / "config.json")
    known = {configs.MMDIT_CLASS: "mmdit", configs.VAE_CLASS: "vae", configs.VLM_TYPE: "vlm"}
    kind = data.get("_class_name", data.get("model_type"))
    if kind not in known:
        raise UserError(f"{path / 'config.json'} is of {kind!r}; known are {', '.join(known)}")
    return [known[kind]]


def _place(path: Path | None, inner: str, option: str) -> Path | None:
    """The folder of a part itself, given it or the HunyuanVideo folder around it; or the file."""
    if path is None:
        return None
    if not path.exists():
        raise UserError(f"{option} {path} does not exist")
    return path / inner if inner and (path / inner).is_dir() else path


def _config(place: Path | None, read: Callable[[Path], Any], published: Callable[[], Any]) -> Any:
    """Of a folder its config.json; of a file the one beside it, else the published sizes, which the plan compares with the shapes."""
    if place is None or place.is_dir():
        return read(place) if place else None
    return read(place.parent) if (place.parent / "config.json").is_file() else published()


def _split(vino: TensorSource) -> dict[str, TensorSource]:
    names: dict[str, dict[str, str]] = {}
    unknown = []
    for name in vino.manifest:
        matching = (p for p, prefix in VINO_PREFIXES.items() if name == prefix or (prefix.endswith(".") and name.startswith(prefix)))
        part = next(matching, None)
        if part is None:
            unknown.append(name)
        else:
            names.setdefault(part, {})[name.removeprefix(vino_name(part, ""))] = name
    if unknown:
        raise UserError(f"{vino.label} has names that belong to no part: {', '.join(unknown)}")
    return {part: vino.select(selected) for part, selected in names.items()}


def export_groups(parts: Mapping[str, object], layout: str) -> dict[str, list[str]]:
    """Folder of the export -> the parts in it. layout: "vino" (one set of files) or "diffusers" (a folder a part)."""
    if layout == "vino":
        return {"": [part for part in PARTS if part in parts and part in VINO_PREFIXES]}
    folders = {"transformer": ["mmdit"], "vae": ["vae"], "vlm": ["vlm"], "vino": ["connector", "vae_connector", "queries"]}
    groups = {folder: [part for part in members if part in parts] for folder, members in folders.items()}
    return {folder: members for folder, members in groups.items() if members}
