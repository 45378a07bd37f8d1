"""Frozen settings of a model, built strictly from a config: an unknown or missing key fails with the nearest name.

Defaults are the published sizes (HunyuanVideo 13 B, its VAE, Qwen3-VL-4B); configs/models.py holds the small ones.
"""
import dataclasses
import difflib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vino_jax.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class MMDiTConfig:
    """HunyuanVideo's MMDiT. Width is heads x head_dim; `text_width` is what the connector must give."""

    in_channels: int = 16
    out_channels: int = 16
    heads: int = 24
    head_dim: int = 128
    double_blocks: int = 20
    single_blocks: int = 40
    refiner_blocks: int = 2
    mlp_ratio: float = 4.0
    patch: tuple[int, int, int] = (1, 2, 2)  # latent frames, rows, columns a token
    text_width: int = 4096
    pooled_width: int = 768  # of the pooled text embedder, whose weights exist and are unused
    rope_theta: float = 256.0
    rope_axes: tuple[int, int, int] = (16, 56, 56)  # head dims for time, row, column
    guidance: float = 1000.0  # constant input of the guidance embedding
    time_scale: float = 999.0  # timestep input = time_scale * t

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class VAEConfig:
    """HunyuanVideo's causal 3D VAE: 8x in space, 4x in time."""

    in_channels: int = 3
    latent_channels: int = 16
    block_widths: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.476986
    spatial_compression: int = 8
    temporal_compression: int = 4


@dataclass(frozen=True)
class VLMTextConfig:
    vocab: int = 151936
    width: int = 2560
    layers: int = 36
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    mlp: int = 9728
    rms_eps: float = 1e-6
    rope_theta: float = 5e6
    mrope_section: tuple[int, int, int] = (24, 20, 20)


@dataclass(frozen=True)
class VLMVisionConfig:
    layers: int = 24
    width: int = 1024
    heads: int = 16
    mlp: int = 4096
    patch: int = 16
    temporal_patch: int = 2
    merge: int = 2
    channels: int = 3
    out_width: int = 2560
    positions: int = 2304  # rows of the position embedding, a square grid
    deepstack: tuple[int, ...] = (5, 11, 17)  # taps after these vision blocks, added after text layers 0, 1, 2


@dataclass(frozen=True)
class VLMConfig:
    """Qwen3-VL."""

    text: VLMTextConfig = field(default_factory=VLMTextConfig)
    vision: VLMVisionConfig = field(default_factory=VLMVisionConfig)


@dataclass(frozen=True)
class VinoConfig:
    """The whole model: MMDiT, VAE, VLM, and what VINO adds between them."""

    mmdit: MMDiTConfig = field(default_factory=MMDiTConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    vlm: VLMConfig = field(default_factory=VLMConfig)
    queries: int = 256  # learnable query tokens
    connector_ratio: int = 4  # hidden width of a connector / its output width
    boundary_tokens: bool = True  # False, for experiments: those around references are padding

    def __post_init__(self):
        for name, least in (("queries", 0), ("connector_ratio", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.vae.latent_channels != self.mmdit.in_channels:
            raise UserError(f"the VAE gives {self.vae.latent_channels} latent channels, the MMDiT takes {self.mmdit.in_channels}")
        if self.vlm.vision.out_width != self.vlm.text.width:
            raise UserError(f"vision tower gives width {self.vlm.vision.out_width}, the text model has {self.vlm.text.width}")
        if sum(self.mmdit.rope_axes) != self.mmdit.head_dim:
            raise UserError(f"rope_axes {self.mmdit.rope_axes} must sum to head_dim {self.mmdit.head_dim}")


@dataclass(frozen=True)
class SamplingConfig:
    """What sampling uses where nothing else is said: the "sampling" table of a config and of a model checkpoint (small models give small
    pictures). The values here are the published model's.

    None: 640x640 for pictures, 480x848 for clips; text guidance and shift 5 and 5.0 for pictures, 7 and 7.0 for clips.
    Sizes are checked by `check_sampled` of batch.py.
    """

    height: int | None = None  # pixels: of the target where no reference sets it, and the budget of every reference
    width: int | None = None
    num_frames: int = 85  # of clips, 4k+1
    steps: int = 50
    guidance_image: float | None = None  # of the text, for pictures
    guidance_video: float | None = None  # and for clips
    shift_image: float | None = None
    shift_video: float | None = None
    image_guidance: float = 1.0  # above 1.0 a third branch runs

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"config key 'sampling.steps' is {self.steps}; it must be at least 1")

    def size(self, picture: bool) -> tuple[int, int]:
        """Height and width of a picture or a clip."""
        height, width = (640, 640) if picture else (480, 848)
        return self.height or height, self.width or width

    def guidance(self, picture: bool) -> float | None:
        """Of the text; None: the published value."""
        return self.guidance_image if picture else self.guidance_video

    def shift(self, picture: bool) -> float | None:
        """Of the flow time; None: the published value."""
        return self.shift_image if picture else self.shift_video


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError where there is none."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is no JSON object")
    return data


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """`, did you mean 'x'?` for the nearest known name, or a list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Dataclass `cls` from a mapping (nested for nested dataclasses), lists becoming tuples.

    Raises UserError for an unknown key (with the nearest name), a missing one, or a value of the wrong kind.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise UserError(f"unknown config key {where + str(key)!r}{nearest(str(key), fields)}")
    given = {}
    for name, f in fields.items():
        if name in values:
            given[name] = _convert(hints[name], values[name], where + name)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"config key {where + name!r} is missing")
    return cls(**given)


def _convert(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if not isinstance(value, Mapping):
            raise UserError(f"config key {where!r} must be a table, not {value!r}")
        return build(kind, value, where + ".")
    if origin is typing.Union or str(origin) == "<class 'types.UnionType'>":
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
            raise UserError(f"config key {where!r} must be a list, not {value!r}")
        value = tuple(value)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(args):
            raise UserError(f"config key {where!r} must have {len(args)} values, not {len(value)}")
        return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"config key {where!r} must be a table, not {value!r}")
        return {str(k): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise UserError(f"config key {where!r} must be {kind.__name__}, not {value!r}")
    return value
