"""Train: the stages of a config, one after another, on a mesh, going on where a former run of the same workdir stopped.

    python -m launch.train --config configs/shapes.py --workdir DIR [--config.KEY=VALUE ...] [--quiet]

The workdir gets config.json, init/ (imported parts), checkpoints/<stage>/, metrics.jsonl, tensorboard/, previews/ and, at the end,
model/: a model checkpoint (averaged weights where the last stage keeps an average) that launch.sample and launch.evaluate read.
"""
import argparse
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from data_pipelines.buckets import table
from data_pipelines.loader import Loader
from data_pipelines.media import MediaSource
from data_pipelines.mixture import Mixture, Schedule
from data_pipelines.packing import SamplingOptions
from data_pipelines.prompts import Prompter
from data_pipelines.shapes import held_out
from data_pipelines.sources import ShapesSource
from launch import cli
from launch.config import parse
from launch.convert import import_parts
from launch.previews import Previews, preview_tasks
from vino_jax.batch import BucketSpec, PackedTask
from vino_jax.checkpoint import model as model_checkpoint
from vino_jax.checkpoint.run import RunCheckpoints
from vino_jax.convert.parts import Given
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.nn.module import Params
from vino_jax.settings import VinoConfig, nearest
from vino_jax.sharding.mesh import make_mesh
from vino_jax.sharding.resolve import describe, shardings
from vino_jax.sharding.rules import preset
from vino_jax.train.config import RunConfig, run_config
from vino_jax.train.initial import initial_params, resolve_model
from vino_jax.train.logging import MetricWriter
from vino_jax.train.loop import StagePlan, make_encoder, run_stage
from vino_jax.train.stage import StageConfig

# name -> source(config, stage's buckets, stage's tasks, prompter, seed of the stream)
SOURCES = {
    "shapes": lambda config, buckets, tasks, prompter, seed: ShapesSource(seed),
    "media": lambda config, buckets, tasks, prompter, seed: MediaSource(config.data.manifest, config.data.root, buckets, prompter, tasks),
}


def initial_checkpoint(config: RunConfig, workdir: pathlib.Path) -> pathlib.Path:
    """The model checkpoint that the config names, or its PyTorch parts imported into the workdir."""
    init = config.init
    if init.checkpoint:
        return pathlib.Path(init.checkpoint)
    directory = workdir / "init"
    if not (directory / "model.json").exists():
        given = {name: pathlib.Path(getattr(init, name)) for name in ("vino", "mmdit", "vae", "vlm") if getattr(init, name)}
        if not given:
            raise UserError("config table 'init' names neither a checkpoint nor parts to import; set config.init.checkpoint=DIR")
        import_parts(directory, Given(**given), queries=config.model.get("queries", VinoConfig.queries))
    return directory


@dataclasses.dataclass(frozen=True)
class StageData:
    """The samples of one stage."""

    config: RunConfig
    stage: StageConfig
    prompter: Prompter
    buckets: tuple[BucketSpec, ...]
    mixture: Mixture
    source: Any

    @classmethod
    def of(cls, config: RunConfig, stage: StageConfig, prompter: Prompter, seed: int) -> "StageData":
        """seed: of the stream of samples, where the source is endless."""
        buckets = tuple(config.buckets[name] for name in stage.buckets)
        mixture = Mixture(stage.tasks, stage.texts, stage.text_dropout, stage.image_dropout)
        return cls(config, stage, prompter, buckets, mixture, SOURCES[config.data.source](config, buckets, stage.tasks, prompter, seed))

    @property
    def seed(self) -> int:
        """Of the plan: stages draw different samples."""
        return self.config.seed + sum(map(ord, self.stage.name))

    @property
    def shift(self) -> tuple[float, float]:
        return self.config.data.shift_image, self.config.data.shift_video

    def loader(self, start: int) -> Loader:
        """Batches from step `start` on, this process's rows."""
        return Loader(self.source, self.mixture, self.buckets, self.prompter, self.seed, start, self.stage.steps, jax.process_index(),
                      jax.process_count(), self.config.data.threads, self.config.data.prefetch, self.shift)

    def schedule(self) -> Schedule:
        return Schedule(self.seed, self.mixture, self.buckets, self.source)

    def table(self) -> str:
        """Buckets, tasks, tokens and shares, and what fits nowhere."""
        return table(self.schedule().assigned, self.source.unplaced())

    def preview_tasks(self) -> list[PackedTask]:
        log = self.config.log
        options = SamplingOptions(guidance=log.preview_guidance, negative_prompt="", seed=self.config.seed)
        return preview_tasks(self.schedule(), self.source, self.prompter, log.preview_count, options, self.shift)


def train(config: RunConfig, workdir: pathlib.Path, *, quiet: bool = False) -> pathlib.Path:
    """Run all stages and return the directory of the model checkpoint at their end."""
    say = (lambda text: None) if quiet else (lambda text: print(text, flush=True))
    if config.data.source not in SOURCES:
        raise UserError(f"unknown data source {config.data.source!r}{nearest(config.data.source, SOURCES)}")
    mesh, rules = make_mesh(config.mesh.sizes), preset(config.mesh.preset)
    workdir.mkdir(parents=True, exist_ok=True)
    directory = initial_checkpoint(config, workdir)
    vino = Vino(resolve_model(directory, config.model), config.runtime)
    params = initial_params(vino, directory, list(config.stages.values()), mesh, rules, config.seed, config.init.require)
    sizes = describe(params, shardings(params, vino.axes, mesh, rules))
    say(f"mesh {dict(mesh.shape)}, preset {config.mesh.preset}: parameters {sizes['bytes'] / 1e6:.1f} MB, "
        f"{sizes['bytes_a_device'] / 1e6:.1f} MB a device, {100 * sizes['replicated_share']:.1f} % replicated")
    processor = pathlib.Path(config.data.processor) if config.data.processor else model_checkpoint.processor_folder(directory)
    prompter = Prompter(processor)
    datas = {name: StageData.of(config, stage, prompter, config.seed) for name, stage in config.stages.items()}
    for name, data in datas.items():
        say(f"{name}: {data.stage.steps} steps\n{data.table()}")
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
    average = run_stages(config, vino, params, datas, mesh, rules, workdir, quiet, say)

    final = workdir / "model"
    if not (final / "model.json").exists():
        sources = {name: {"source": str(workdir), "sha256": ""} for name in average}
        model_checkpoint.save(final, average, vino.config, sources, sorted(processor.iterdir()), sampling=config.sampling)
    say(f"model checkpoint: {final}")
    return final


def run_stages(config: RunConfig, vino: Vino, params: Params, datas: dict[str, StageData], mesh, rules, workdir: pathlib.Path, quiet: bool,
               say: Callable[[str], None]) -> Params:
    """Each stage from where the one before ended; the parameters at the end, averages where the last stage keeps them."""
    encode, total, average = make_encoder(vino, mesh, rules), 0, params
    with contextlib.ExitStack() as closing:  # saves under way are finished, whatever ends the run
        checkpoints = {name: closing.enter_context(RunCheckpoints(workdir / "checkpoints" / name, config.log.keep, config.log.checkpoint_every))
                       for name in datas}
        writer = closing.enter_context(MetricWriter(workdir, resume_at={name: c.latest() or 0 for name, c in checkpoints.items()}))
        previews = Previews(vino, workdir / "previews", writer, config.log.preview_sampling_steps, mesh, rules)
        for name, data in datas.items():
            plan = StagePlan(vino, data.stage, data.buckets, mesh, rules, config.seed + total, encode)
            preview = None
            if config.log.preview_every:
                preview = previews.of(StageData.of(config, data.stage, data.prompter, held_out(config.seed)).preview_tasks())
            params, average = run_stage(plan, params, data.loader, checkpoints[name], writer, config.log, total_before=total,
                                        preview=preview, quiet=quiet, say=say)
            total += data.stage.steps
    return average


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="launch.train", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="the run's directory; a run there is gone on with")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no tables")
    flags, values = parse(parser, argv)
    train(run_config(values), flags.workdir, quiet=flags.quiet)


if __name__ == "__main__":
    cli.run(main)
