"""The data of a training config: its sources, and what of them each stage draws."""
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from data_pipelines.buckets import table
from data_pipelines.latent_source import LatentSource
from data_pipelines.latents import Hashes, Keys, Latents
from data_pipelines.loader import Loader
from data_pipelines.media import Clips, MediaSource
from data_pipelines.mixture import Mixture, Schedule
from data_pipelines.packing import SamplingOptions
from data_pipelines.problems import Problems
from data_pipelines.prompts import Prompter
from data_pipelines.shapes import held_out
from data_pipelines.sources import ShapesSource, Source
from launch.previews import preview_tasks
from vino_jax import processes
from vino_jax.batch import BucketSpec, PackedTask
from vino_jax.checkpoint import model as model_checkpoint
from vino_jax.checkpoint.atomic import write_text
from vino_jax.errors import UserError
from vino_jax.settings import build, nearest, read_json
from vino_jax.train.config import RunConfig
from vino_jax.train.stage import StageConfig

BAD_ITEMS = ("stop", "skip")


def _media(config: RunConfig, buckets, tasks, prompter: Prompter, problems: Problems) -> MediaSource:
    return MediaSource(config.data.manifest, config.data.root, buckets, prompter, tasks, clip_options(config), problems)


# name -> source(config, stage's buckets, stage's tasks, prompter, problems)
SOURCES = {"shapes": lambda config, buckets, tasks, prompter, problems: ShapesSource(config.seed), "media": _media}
# name -> source(config) of samples that training does not draw, of an endless source; previews of one that has none are of its own
UNSEEN = {"shapes": lambda config: ShapesSource(held_out(config.seed))}
ENDLESS = ("shapes",)  # sources whose samples never end: not all can be encoded beforehand


def clip_options(config: RunConfig) -> Clips:
    """Which frames of clips are taken. Raises UserError."""
    return build(Clips, config.data.clips, "data.clips.")


def held_out_source(config: RunConfig, buckets: Sequence[BucketSpec], tasks: Sequence[str], prompter: Prompter) -> Source:
    """Samples that training does not draw: of an endless source its own, else those of the manifest config.data.held_out.

    Raises UserError where there is none (`check_held_out`), and for items that are wrong.
    """
    check_held_out(config)
    if config.data.source in UNSEEN:
        return UNSEEN[config.data.source](config)
    return MediaSource(config.data.held_out, config.data.root, buckets, prompter, tasks, clip_options(config), Problems())


def check_held_out(config: RunConfig) -> None:
    """Raises UserError where there are no samples that training does not draw."""
    if config.data.source not in UNSEEN and not config.data.held_out:
        raise UserError(f"data.source {config.data.source!r} has no samples that training does not draw, of which to measure the loss: name a "
                        "manifest of some in config.data.held_out")


def check_data(config: RunConfig) -> None:
    """Raises UserError for data settings that no run can have."""
    data = config.data
    for key, value, known in (("source", data.source, SOURCES), ("bad_items", data.bad_items, BAD_ITEMS)):
        if value not in known:
            raise UserError(f"unknown data.{key} {value!r}{nearest(value, known)}")
    clip_options(config)
    of_seed: dict[int, str] = {}
    for name in config.stages:
        other = of_seed.setdefault(plan_seed(config, name), name)
        if other != name:
            raise UserError(f"stages {other!r} and {name!r} would draw the same samples, as their names have the same letters' sum: rename one")
    if data.precomputed:
        check_ends(config)
    if config.log.evaluate_every:
        check_held_out(config)


def check_manifest(config: RunConfig) -> None:
    """Raises UserError where the samples of training are to be read from nowhere."""
    if config.data.source not in ENDLESS and not config.data.manifest:
        raise UserError(f"data.source {config.data.source!r} reads a manifest: set config.data.manifest=FILE (docs/data.md)")


def check_ends(config: RunConfig) -> None:
    """Raises UserError for a data set that cannot be encoded beforehand."""
    if config.data.source in ENDLESS:
        raise UserError(f"data.source {config.data.source!r} never ends: it cannot be encoded beforehand, train on its pixels")


def problems_file(config: RunConfig, workdir: pathlib.Path) -> pathlib.Path | None:
    """Where this process lists items that are wrong; None where they end the run. Each process has a file of its own: some network disks
    know no locks between machines."""
    name = "skipped.jsonl" if processes.is_first() else f"skipped.{jax.process_index()}.jsonl"
    return workdir / name if config.data.bad_items == "skip" else None


def vae_identity(config: RunConfig, directory: pathlib.Path) -> str:
    """What stands for the VAE of the model checkpoint `directory` as this config computes with it: other moments, another identity.

    Raises UserError where the checkpoint has none.
    """
    info = model_checkpoint.read_info(directory)
    if "vae" not in info.parts:
        raise UserError(f"{directory} has no VAE: there is nothing to encode with")
    part = info.parts["vae"]
    facts = {"weights": part.sha256 or model_checkpoint.arrays_sha256(directory, "vae", info), "stored": part.dtype,
             "vae": dataclasses.asdict(info.config.vae), "dtype": config.runtime.dtype}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def make_keys(config: RunConfig, directory: pathlib.Path, prompter: Prompter, hashes: Hashes) -> Keys:
    """What samples encoded by the VAE of the model checkpoint `directory` are found by. Raises UserError: see `vae_identity`."""
    return Keys(vae_identity(config, directory), prompter.limits, clip_options(config), hashes)


def precomputed_source(config: RunConfig, directory: pathlib.Path, prompter: Prompter) -> Callable[[MediaSource, tuple], Source] | None:
    """(source, its buckets) -> the same samples from config.data.precomputed; None where that is empty. Raises UserError.

    directory: the model checkpoint that the run starts from.
    """
    if not config.data.precomputed:
        return None
    folder = pathlib.Path(config.data.precomputed)
    latents, keys = Latents(folder), make_keys(config, directory, prompter, Hashes(folder))
    return lambda source, buckets: LatentSource(source, buckets, latents, keys)


def plan_seed(config: RunConfig, stage: str) -> int:
    """The seed of a stage's plan: stages draw different samples."""
    return config.seed + sum(map(ord, stage))


class StageData:
    """The samples of one stage. problems: what becomes of items that are wrong (by default they end the run). precomputed: see
    `precomputed_source`; previews take pixels all the same.

    Raises UserError where a task of the stage's mixture has no samples or no bucket.
    """

    def __init__(self, config: RunConfig, stage: StageConfig, prompter: Prompter, problems: Problems | None = None,
                 precomputed: Callable[[MediaSource, tuple], Source] | None = None):
        self.config, self.stage, self.prompter = config, stage, prompter
        self.named = tuple(config.buckets[name] for name in stage.buckets)
        self.mixture = Mixture(stage.tasks, stage.texts, stage.text_dropout, stage.image_dropout)
        self.pixels = SOURCES[config.data.source](config, self.named, stage.tasks, prompter, problems or Problems())
        self.source = precomputed(self.pixels, self.named) if precomputed else self.pixels
        self.seed = plan_seed(config, stage.name)
        self.schedule = Schedule(self.seed, self.mixture, self.named, self.source)

    @property
    def buckets(self) -> tuple[BucketSpec, ...]:
        """Those that the mixture draws."""
        return tuple(entry.bucket for entry in self.schedule.used)

    @property
    def shift(self) -> tuple[float, float]:
        return self.config.data.shift_image, self.config.data.shift_video

    def loader(self, start: int, shards: Sequence[int] = (0,), shard_count: int = 1) -> Loader:
        """Batches from step `start` on; of the `shard_count` parts of their rows those of `shards`, by default all."""
        return Loader(self.source, self.mixture, self.named, self.prompter, self.seed, start, self.stage.steps, shards, shard_count,
                      self.config.data.threads, self.config.data.workers, self.config.data.prefetch, self.shift)

    def table(self) -> str:
        """Buckets, tasks, tokens and shares, what fits nowhere, and what this stage leaves to others."""
        undrawn = ", ".join(f"{task} ({count})" for task, count in self.source.undrawn().items())
        return table(self.schedule.assigned, self.source) + f"\nnot drawn in this stage: {undrawn}" * bool(undrawn)

    def preview_tasks(self) -> list[PackedTask]:
        log, unseen = self.config.log, UNSEEN.get(self.config.data.source)
        options = SamplingOptions(guidance=log.preview_guidance, negative_prompt="", seed=self.config.seed)
        source = unseen(self.config) if unseen else self.pixels
        return preview_tasks(self.schedule, source, self.prompter, log.preview_count, options, self.shift)


def write_unplaced(folder: pathlib.Path, datas: Mapping[str, StageData]) -> None:
    """FOLDER/unplaced.txt, of all stages: the tables name only the first of many."""
    lines = [f"{name}: {item}\n" for name, data in datas.items() for item in data.source.unplaced()]
    if lines and processes.is_first():
        (folder / "unplaced.txt").write_text("".join(lines))


def check_order(workdir: pathlib.Path, datas: Mapping[str, StageData], done: Mapping[str, int]) -> None:
    """Raises UserError where the samples of a stage that has begun (done: steps by stage) are not those that it began with, or not the
    same on all processes: the run would go on in another order, or its processes draw different buckets and wait for each other."""
    file = workdir / "data.json"
    before = processes.of_first(lambda: read_json(file) if file.exists() else {})
    now = {name: data.source.fingerprint() for name, data in datas.items()}
    agree(json.dumps(now, sort_keys=True), "the samples that they found")
    for name, data in datas.items():
        if 0 < done[name] < data.stage.steps and before.get(name, now[name]) != now[name]:
            raise UserError(f"the samples of stage {name!r} are not those that it began with, files or items were added, lost or changed: "
                            f"undo that, or remove {file} to go on with what is there, in another order")
    if now != before and processes.is_first():
        write_text(file, json.dumps(now, indent=1))


def agree(text: str, what: str) -> None:
    """Raises UserError, on all processes, where `text` is not the same on all of them."""
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    if jax.process_count() > 1 and (multihost_utils.process_allgather(digest) != digest).any():
        raise UserError(f"the processes of this run do not agree on {what}: do all see the same files?")
