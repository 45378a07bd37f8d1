"""A training run's config: the frozen dataclass that a config file of configs/ must fill."""
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vino_jax.batch import BucketSpec, check_sampled
from vino_jax.errors import UserError
from vino_jax.nn.runtime import Runtime
from vino_jax.settings import SamplingConfig, build, nearest
from vino_jax.train.optim import OPTIMIZERS
from vino_jax.train.stage import StageConfig

# What numbers of a config may be at least; stages and buckets check their own.
_LEAST = {
    "seed": 0, "data.threads": 1, "data.workers": 0, "data.prefetch": 0, "data.shift_image": 1e-3, "data.shift_video": 1e-3, "log.every": 0,
    "log.checkpoint_every": 0, "log.keep": 1, "log.preview_every": 0, "log.preview_count": 1, "log.preview_sampling_steps": 1,
    "log.evaluate_every": 0, "log.evaluate_rows": 1, "log.hang_minutes": 0, "log.profile_port": 0,
}
_SEEDS = 2**32  # seeds are below this


@dataclass(frozen=True)
class InitConfig:
    """Where parameters come from: a model checkpoint, or PyTorch folders and files that are imported at the start.

    A part that none of them holds is initialised at random; `require` names the parts for which that is an error.
    """

    checkpoint: str = ""
    vino: str = ""
    mmdit: str = ""
    vae: str = ""
    vlm: str = ""
    require: tuple[str, ...] = ("vae", "vlm", "mmdit")


@dataclass(frozen=True)
class MeshConfig:
    """Sharding preset and sizes of the mesh axes; -1: what is left of the devices."""

    preset: str = "fsdp"
    data: int = 1
    fsdp: int = -1
    seq: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        return {"data": self.data, "fsdp": self.fsdp, "seq": self.seq, "tensor": self.tensor}


@dataclass(frozen=True)
class DataConfig:
    """source: "shapes" (procedural) or "media" (a manifest of pictures and clips, paths relative to root: data_pipelines/manifest.py)."""

    source: str = "shapes"
    manifest: str = ""
    held_out: str = ""  # manifest of items that training does not draw: the held-out loss is measured on them; `shapes` has its own
    root: str = "."
    bad_items: str = "stop"  # at the first item that is wrong, or "skip" it and list it in the workdir's skipped.jsonl
    clips: dict[str, Any] = field(default_factory=dict)  # which frames of clips are taken: data_pipelines.media.Clips
    precomputed: str = ""  # folder of launch.precompute, read in the place of the media's pixels
    processor: str = ""  # tokenizer and processor folder; by default the checkpoint's
    shift_image: float = 5.0
    shift_video: float = 7.0
    threads: int = 1  # of every process that packs batches
    workers: int = 0  # processes that pack batches; 0: threads of the training process do
    prefetch: int = 8


@dataclass(frozen=True)
class LogConfig:
    """Cadences in steps; 0 switches off. keep: how many last checkpoints stay. compile_cache: a folder for compiled programs, which a run
    that is started again then need not compile; "": that of JAX's variable JAX_COMPILATION_CACHE_DIR, if it is set."""

    every: int = 10
    checkpoint_every: int = 100
    keep: int = 2
    preview_every: int = 0
    preview_count: int = 4
    preview_sampling_steps: int = 20
    preview_guidance: float = 3.0
    evaluate_every: int = 0  # the held-out loss, of the averaged weights where a stage keeps them
    evaluate_rows: int = 8  # of each task
    profile_port: int = 0  # of a server that profiles are taken from; 0: none
    hang_minutes: float = 0.0  # without a finished step (compiling aside) after which the run ends with exit code 43; 0: never
    compile_cache: str = ""


@dataclass(frozen=True)
class RunConfig:
    seed: int
    model: dict[str, Any]  # VinoConfig's keys, for parts that the checkpoint lacks; see train/initial.py
    init: InitConfig
    runtime: Runtime
    mesh: MeshConfig
    data: DataConfig
    buckets: dict[str, BucketSpec]
    stages: dict[str, StageConfig]  # run in the order of their names
    log: LogConfig = field(default_factory=LogConfig)
    sampling: dict[str, Any] = field(default_factory=dict)  # defaults that the exported checkpoint hands to launch.sample


def run_config(values: Mapping[str, Any]) -> RunConfig:
    """RunConfig from plain nested dicts; buckets and stages take their names from their keys.

    Raises UserError for an unknown or missing key, a value that would fail only later in the run, and a stage that names a bucket
    or an optimizer that is not there.
    """
    values = dict(values)
    for table in ("buckets", "stages"):
        if not isinstance(values.get(table), Mapping):
            raise UserError(f"config key {table!r} is missing")
        values[table] = {name: _named(entry, table, name) for name, entry in sorted(values[table].items())}
    config = build(RunConfig, values)
    for key, least in _LEAST.items():
        if not (value := operator.attrgetter(key)(config)) >= least:
            raise UserError(f"config key {key!r} is {value}; it must be at least {least}")
    if config.seed >= _SEEDS:
        raise UserError(f"config key 'seed' is {config.seed}; it must be below {_SEEDS}")
    for stage in config.stages.values():
        if stage.optimizer not in OPTIMIZERS:
            raise UserError(f"stage {stage.name!r} has the unknown optimizer {stage.optimizer!r}{nearest(stage.optimizer, OPTIMIZERS)}")
        if stage.lora and config.runtime.quantize:
            raise UserError(f"stage {stage.name!r} has 'lora', which does not go with runtime.quantize {config.runtime.quantize!r}: take one "
                            "of them out")
        for name in stage.buckets:
            if name not in config.buckets:
                raise UserError(f"stage {stage.name!r} uses unknown bucket {name!r}{nearest(name, config.buckets)}")
    sampling = build(SamplingConfig, config.sampling, "sampling.")
    for picture in (True, False):
        check_sampled(sampling.num_frames, *sampling.size(picture), "config table 'sampling': ")
    return config


def _named(entry: Any, table: str, name: str) -> dict[str, Any]:
    """An entry of a table with its key as its name."""
    if not isinstance(entry, Mapping):
        raise UserError(f"config key '{table}.{name}' must be a table, not {entry!r}")
    return {**entry, "name": name}
