"""The data of a training config: its sources, and what of them each stage draws."""
import pathlib

import jax

from data_pipelines.buckets import table
from data_pipelines.loader import Loader
from data_pipelines.media import Clips, MediaSource
from data_pipelines.mixture import Mixture, Schedule
from data_pipelines.packing import SamplingOptions
from data_pipelines.problems import Problems
from data_pipelines.prompts import Prompter
from data_pipelines.shapes import held_out
from data_pipelines.sources import ShapesSource
from launch.previews import preview_tasks
from vino_jax.batch import BucketSpec, PackedTask
from vino_jax.errors import UserError
from vino_jax.settings import build, nearest
from vino_jax.train.config import RunConfig
from vino_jax.train.stage import StageConfig

BAD_ITEMS = ("stop", "skip")


def _media(config: RunConfig, buckets, tasks, prompter: Prompter, problems: Problems) -> MediaSource:
    return MediaSource(config.data.manifest, config.data.root, buckets, prompter, tasks, clip_options(config), problems)


# name -> source(config, stage's buckets, stage's tasks, prompter, problems)
SOURCES = {"shapes": lambda config, buckets, tasks, prompter, problems: ShapesSource(config.seed), "media": _media}
# name -> source(config) of samples that training does not draw, for previews; a source that has none is previewed on its own
UNSEEN = {"shapes": lambda config: ShapesSource(held_out(config.seed))}


def clip_options(config: RunConfig) -> Clips:
    """Which frames of clips are taken. Raises UserError."""
    return build(Clips, config.data.clips, "data.clips.")


def check_data(config: RunConfig) -> None:
    """Raises UserError for data settings that no run can have."""
    data = config.data
    for key, value, known in (("source", data.source, SOURCES), ("bad_items", data.bad_items, BAD_ITEMS)):
        if value not in known:
            raise UserError(f"unknown data.{key} {value!r}{nearest(value, known)}")
    clip_options(config)


def problems_file(config: RunConfig, workdir: pathlib.Path) -> pathlib.Path | None:
    """Where items that are wrong are listed; None where they end the run."""
    return workdir / "skipped.jsonl" if config.data.bad_items == "skip" else None


class StageData:
    """The samples of one stage. problems: what becomes of items that are wrong (by default they end the run).

    Raises UserError where a task of the stage's mixture has no samples or no bucket.
    """

    def __init__(self, config: RunConfig, stage: StageConfig, prompter: Prompter, problems: Problems | None = None):
        self.config, self.stage, self.prompter = config, stage, prompter
        self.named = tuple(config.buckets[name] for name in stage.buckets)
        self.mixture = Mixture(stage.tasks, stage.texts, stage.text_dropout, stage.image_dropout)
        self.source = SOURCES[config.data.source](config, self.named, stage.tasks, prompter, problems or Problems())
        self.seed = config.seed + sum(map(ord, stage.name))  # of the plan: stages draw different samples
        self.schedule = Schedule(self.seed, self.mixture, self.named, self.source)

    @property
    def buckets(self) -> tuple[BucketSpec, ...]:
        """Those that the mixture draws."""
        return tuple(entry.bucket for entry in self.schedule.used)

    @property
    def shift(self) -> tuple[float, float]:
        return self.config.data.shift_image, self.config.data.shift_video

    def loader(self, start: int) -> Loader:
        """Batches from step `start` on, this process's rows."""
        return Loader(self.source, self.mixture, self.named, self.prompter, self.seed, start, self.stage.steps, jax.process_index(),
                      jax.process_count(), self.config.data.threads, self.config.data.workers, self.config.data.prefetch, self.shift)

    def table(self) -> str:
        """Buckets, tasks, tokens and shares, and what fits nowhere."""
        return table(self.schedule.assigned, self.source)

    def preview_tasks(self) -> list[PackedTask]:
        log, unseen = self.config.log, UNSEEN.get(self.config.data.source)
        options = SamplingOptions(guidance=log.preview_guidance, negative_prompt="", seed=self.config.seed)
        source = unseen(self.config) if unseen else self.source
        return preview_tasks(self.schedule, source, self.prompter, log.preview_count, options, self.shift)
