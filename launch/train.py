"""Train: the stages of a config, one after another, on a mesh, going on where a former run of the same workdir stopped.

    python -m launch.train --config configs/shapes.py --workdir DIR [--config.KEY=VALUE ...] [--quiet]

The workdir gets config.json, init/ (imported parts), checkpoints/<stage>/, metrics.jsonl, tensorboard/, previews/ and, at the end,
model/: a model checkpoint (averaged weights where the last stage keeps an average) that launch.sample and launch.evaluate read.
"""
import argparse
import dataclasses
import json
import pathlib

import jax

from data_pipelines.loader import Loader
from data_pipelines.media import MediaSource
from data_pipelines.mixture import Mixture
from data_pipelines.packing import SamplingOptions
from data_pipelines.prompts import Prompter
from data_pipelines.shapes import held_out
from data_pipelines.sources import ShapesSource
from launch import cli, convert
from launch.config import parse
from launch.previews import make_preview, preview_tasks
from vino_jax.checkpoint import model as model_checkpoint
from vino_jax.checkpoint.run import RunCheckpoints
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.settings import VinoConfig, nearest
from vino_jax.sharding.mesh import make_mesh
from vino_jax.sharding.resolve import describe, shardings
from vino_jax.sharding.rules import preset
from vino_jax.train.config import RunConfig, run_config
from vino_jax.train.initial import initial_params, resolve_model
from vino_jax.train.logging import MetricWriter
from vino_jax.train.loop import StagePlan, make_encoder, run_stage
from vino_jax.train.stage import StageConfig

# name -> source(config, buckets, seed stream); training and previews draw from different streams
SOURCES = {
    "shapes": lambda config, buckets, tasks, prompter, preview: ShapesSource(held_out(config.seed) if preview else config.seed),
    "media": lambda config, buckets, tasks, prompter, preview: MediaSource(config.data.manifest, config.data.root, buckets, prompter, tasks),
}


def initial_checkpoint(config: RunConfig, workdir: pathlib.Path) -> pathlib.Path:
    """The model checkpoint that the config names, or its PyTorch parts imported into the workdir."""
    init = config.init
    if init.checkpoint:
        return pathlib.Path(init.checkpoint)
    directory = workdir / "init"
    if not (directory / "model.json").exists():
        sources = {name: pathlib.Path(getattr(init, name)) if getattr(init, name) else None for name in ("vino", "mmdit", "vae", "vlm")}
        if not any(sources.values()):
            raise UserError("config table 'init' names neither a checkpoint nor parts to import; set config.init.checkpoint=DIR")
        queries = config.model.get("queries", VinoConfig.queries)
        convert.import_parts(argparse.Namespace(output=directory, dtype=None, queries=queries, **sources))
    return directory


def stage_inputs(config: RunConfig, stage: StageConfig, prompter: Prompter, quiet: bool):
    """loader(start step, preview=False): the stage's batches; with preview from samples that training does not draw."""
    if config.data.source not in SOURCES:
        raise UserError(f"unknown data source {config.data.source!r}{nearest(config.data.source, SOURCES)}")
    buckets = tuple(config.buckets[name] for name in stage.buckets)
    mixture = Mixture(stage.tasks, stage.texts, stage.text_dropout, stage.image_dropout)
    seed = config.seed + sum(map(ord, stage.name))  # stages draw different samples

    def loader(start: int, preview: bool = False) -> Loader:
        source = SOURCES[config.data.source](config, buckets, stage.tasks, prompter, preview)
        return Loader(source, mixture, buckets, prompter, seed, start, stage.steps, jax.process_index(), jax.process_count(),
                      config.data.threads, config.data.prefetch, shift=(config.data.shift_image, config.data.shift_video))

    if not quiet:
        with loader(0) as first:
            print(f"{stage.name}: {stage.steps} steps\n{first.table()}", flush=True)
    return loader


def train(config: RunConfig, workdir: pathlib.Path, *, quiet: bool = False) -> pathlib.Path:
    """Run all stages and return the directory of the model checkpoint at their end."""
    say = (lambda text: None) if quiet else (lambda text: print(text, flush=True))
    mesh, rules = make_mesh(config.mesh.sizes), preset(config.mesh.preset)
    workdir.mkdir(parents=True, exist_ok=True)
    directory = initial_checkpoint(config, workdir)
    vino = Vino(resolve_model(directory, config.model), config.runtime)
    stages = list(config.stages.values())
    params = initial_params(vino, directory, stages, mesh, rules, config.seed, config.init.require)
    sizes = describe(params, shardings(params, vino.axes, mesh, rules))
    say(f"mesh {dict(mesh.shape)}, preset {config.mesh.preset}: parameters {sizes['bytes'] / 1e6:.1f} MB, "
        f"{sizes['bytes_a_device'] / 1e6:.1f} MB a device, {100 * sizes['replicated_share']:.1f} % replicated")
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
    processor = pathlib.Path(config.data.processor) if config.data.processor else model_checkpoint.processor_folder(directory)
    prompter = Prompter(processor)

    checkpoints = {s.name: RunCheckpoints(workdir / "checkpoints" / s.name, config.log.keep, config.log.checkpoint_every) for s in stages}
    writer = MetricWriter(workdir, resume_at={name: c.latest() or 0 for name, c in checkpoints.items()})
    encode, total = make_encoder(vino, mesh, rules), 0
    for stage in stages:
        loader = stage_inputs(config, stage, prompter, quiet)
        plan = StagePlan(vino, stage, tuple(config.buckets[name] for name in stage.buckets), mesh, rules, config.seed + total, encode)
        preview = None
        if config.log.preview_every:
            with loader(0, preview=True) as held:
                options = SamplingOptions(guidance=config.log.preview_guidance, negative_prompt="", seed=config.seed)
                shift = (config.data.shift_image, config.data.shift_video)
                tasks = preview_tasks(held.schedule, held.source, prompter, config.log.preview_count, options, shift)
            preview = make_preview(vino, tasks, workdir / "previews", writer, steps=config.log.preview_sampling_steps, mesh=mesh, rules=rules)
        params, average = run_stage(plan, params, loader, checkpoints[stage.name], writer, config.log, total_before=total, preview=preview,
                                    quiet=quiet, say=say)
        checkpoints[stage.name].close()
        total += stage.steps
    writer.close()

    final = workdir / "model"
    if not (final / "model.json").exists():
        sources = {name: {"source": str(workdir), "sha256": ""} for name in average}
        model_checkpoint.save(final, average, vino.config, sources, sorted(processor.iterdir()), sampling=config.sampling)
    say(f"model checkpoint: {final}")
    return final


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="launch.train", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="the run's directory; a run there is gone on with")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no tables")
    flags, values = parse(parser, argv)
    train(run_config(values), flags.workdir, quiet=flags.quiet)


if __name__ == "__main__":
    cli.run(main)
