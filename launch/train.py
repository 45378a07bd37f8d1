"""Train: the stages of a config, one after another, on a mesh, going on where a former run of the same workdir stopped.

    python -m launch.train --config configs/shapes.py --workdir DIR [--config.KEY=VALUE ...] [--quiet]

The workdir gets config.json, init/ (imported parts), checkpoints/<stage>/, metrics.jsonl, held_out.jsonl, tensorboard/, previews/ and, at
the end, model/: a model checkpoint (averaged weights where the last stage keeps an average) that launch.sample and launch.evaluate read.
A workdir belongs to its config (vino_jax/train/workdir.py says what may change); with more steps of the last stage it goes on, and
model/ is written anew.
"""
import contextlib
import functools
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from data_pipelines.problems import Problems
from data_pipelines.prompts import Prompter
from launch import cli
from launch.config import parse
from launch.convert import import_parts
from launch.data import StageData, check_data, check_manifest, check_order, precomputed_source, problems_file, write_unplaced
from launch.held_out import HeldOutLoss, record
from launch.previews import Previews
from vino_jax import processes
from vino_jax.checkpoint import model as model_checkpoint
from vino_jax.checkpoint.run import RunCheckpoints
from vino_jax.convert.parts import Given, processor_files
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.nn.lora import kernel_of, low_ranks, merged, within
from vino_jax.nn.module import Params, by_path
from vino_jax.settings import VinoConfig
from vino_jax.sharding.mesh import make_mesh
from vino_jax.sharding.resolve import data_shards, describe
from vino_jax.sharding.rules import preset
from vino_jax.train import compile_cache
from vino_jax.train.config import LogConfig, RunConfig, run_config
from vino_jax.train.goodput import Goodput, process_start
from vino_jax.train.initial import finished_params, held_paths, initial_params, param_structs, resolve_model, trained_parts, training_model
from vino_jax.train.logging import MetricWriter, NoWriter
from vino_jax.train.loop import Hook, StagePlan, check_batches, make_encoder, run_stage
from vino_jax.train.workdir import checkpoints_folder, claim, initial_folder, steps_done


def initial_checkpoint(config: RunConfig, workdir: pathlib.Path) -> pathlib.Path:
    """The model checkpoint that the config names, or its PyTorch parts imported into the workdir."""
    init, directory = config.init, initial_folder(workdir, config)
    if not init.checkpoint and not (directory / "model.json").exists():
        given = {name: pathlib.Path(getattr(init, name)) for name in ("vino", "mmdit", "vae", "vlm") if getattr(init, name)}
        if not given:
            raise UserError("config table 'init' names neither a checkpoint nor parts to import; set config.init.checkpoint=DIR")
        queries = config.model.get("queries", VinoConfig.queries)
        if jax.process_count() == 1:
            import_parts(directory, Given(**given), queries=queries)
        else:
            _import_apart(directory, given, queries)
    return directory


def _import_apart(directory: pathlib.Path, given: Mapping[str, pathlib.Path], queries: int) -> None:
    """The same in a process of its own, which belongs to no others: here writing arrays takes all processes of the run."""
    command = [sys.executable, "-m", "launch.convert", "import", "--output", str(directory), "--queries", str(queries)]
    flags = [f"--{name}={path}" for name, path in given.items()]
    done = subprocess.run([*command, *flags], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"the import into {directory} failed: {done.stderr.strip().removeprefix('error: ')}")


def train(config: RunConfig, workdir: pathlib.Path, *, quiet: bool = False, begun: float | None = None) -> pathlib.Path:
    """Run all stages and return the directory of the model checkpoint at their end. begun: see Goodput. On several processes, which see
    the same workdir, call it on every one.

    Raises UserError where the config does not go with the machine or with what stands in the workdir, before it touches anything, and, once
    parts are imported, where it does not go with the model or the data.
    """
    quiet = quiet or not processes.is_first()
    say = (lambda text: None) if quiet else (lambda text: print(text, flush=True))
    compile_cache.use(config.log.compile_cache)
    if config.log.profile_port:
        jax.profiler.start_server(config.log.profile_port)
    check_data(config)
    check_manifest(config)
    mesh, rules = make_mesh(config.mesh.sizes), preset(config.mesh.preset)
    for stage in config.stages.values():
        check_batches(stage, [config.buckets[name] for name in stage.buckets], mesh, rules)
    before = processes.of_first(lambda: claim(workdir, config) or steps_done(workdir, config.stages))
    directory = pathlib.Path(processes.of_first(lambda: str(initial_checkpoint(config, workdir))))
    vino = training_model(resolve_model(directory, config.model), config.runtime, config.stages.values())
    processor = pathlib.Path(config.data.processor) if config.data.processor else model_checkpoint.processor_folder(directory)
    prompter, files = Prompter(processor), processor_files(processor)
    problems = Problems(problems_file(config, workdir))
    precomputed = precomputed_source(config, directory, prompter)
    datas = {name: StageData(config, stage, prompter, problems, precomputed) for name, stage in config.stages.items()}
    for name, data in datas.items():
        say(f"{name}: {data.stage.steps} steps\n{data.table()}")
    if problems.met:
        say(f"{len(problems.met)} items are wrong and left out, listed in {problems.file}")
    write_unplaced(workdir, datas)
    check_order(workdir, datas, before)
    goodput = Goodput(workdir / "goodput.jsonl" if processes.is_first() else None, begun=begun, resume_at=before)
    average = run_stages(config, vino, directory, datas, mesh, rules, workdir, quiet, say, goodput)

    final = workdir / "model"
    done, written = processes.of_first(lambda: _ending(final, steps_done(workdir, config.stages)))
    if done != before or not written:
        with goodput.spend("save"):
            write_model(final, average, vino, config, directory, files, done)
    goodput.finish()
    say(f"model checkpoint: {final}\n{goodput.summary()}")
    return final


def _ending(final: pathlib.Path, done: dict[str, int]) -> tuple[dict[str, int], bool]:
    """`done`, and whether the model checkpoint `final` is that of these steps."""
    return done, (final / "model.json").exists() and model_checkpoint.read_info(final).trained == done


def run_stages(config: RunConfig, vino: Vino, directory: pathlib.Path, datas: dict[str, StageData], mesh, rules, workdir: pathlib.Path,
               quiet: bool, say: Callable[[str], None], goodput: Goodput) -> Params:
    """Each stage from where the one before ended; the parameters at the end, averages where the last stage keeps them.

    What checkpoints of this workdir hold is read from there, once; only the rest comes from the initial checkpoint `directory`.
    """
    stages = list(config.stages.values())
    structs = param_structs(vino, stages, mesh, rules)
    sizes = describe(structs, jax.tree.map(lambda struct: struct.sharding, structs))
    say(f"mesh {dict(mesh.shape)}, preset {config.mesh.preset}: parameters {sizes['bytes'] / 1e6:.1f} MB, "
        f"{sizes['bytes_a_device'] / 1e6:.1f} MB a device, {100 * sizes['replicated_share']:.1f} % replicated")
    with contextlib.ExitStack() as closing:  # saves under way are finished, whatever ends the run
        checkpoints = {name: closing.enter_context(RunCheckpoints(checkpoints_folder(workdir, name), config.log.keep)) for name in datas}
        done = {name: c.latest() or 0 for name, c in checkpoints.items()}
        steps = {stage.name: stage.steps for stage in stages}
        writer = closing.enter_context(MetricWriter(workdir, steps, resume_at=done) if processes.is_first() else NoWriter())
        previews = Previews(vino, workdir / "previews", writer, config.log.preview_sampling_steps, mesh, rules)
        begun = [stage for stage in stages if done[stage.name]]
        held = held_paths(vino, begun)
        params = initial_params(vino, directory, stages, mesh, rules, config.seed, config.init.require, skip=held)
        params = finished_params(params, structs, held, {stage.name: checkpoints[stage.name] for stage in begun[:-1]})
        encode, total, average = make_encoder(vino, mesh, rules), sum(stage.steps for stage in begun[:-1]), None
        held_out = HeldOutLoss(config, vino, mesh, rules, encode)
        for stage in stages[max(len(begun) - 1, 0):]:
            data = datas[stage.name]
            plan = StagePlan(vino, stage, data.buckets, mesh, rules, config.seed + total, encode)
            hooks = stage_hooks(config.log, data, previews, held_out, writer)
            average = None  # that of the stage before would lie in memory for the whole of this one
            shards, shard_count = data_shards(mesh, rules)
            loader = functools.partial(data.loader, shards=shards, shard_count=shard_count)
            params, average = run_stage(plan, params, loader, checkpoints[stage.name], writer, config.log, hooks=hooks, quiet=quiet,
                                        say=say, goodput=goodput)
            total += stage.steps
    return average


def stage_hooks(log: LogConfig, data: StageData, previews: Previews, held_out: HeldOutLoss, writer: MetricWriter) -> list[Hook]:
    """What a stage does at the cadences that are not 0: previews, and the held-out loss of its tasks in its buckets."""
    hooks = []
    if log.preview_every:
        hooks.append(Hook("preview", log.preview_every, previews.of(data.preview_tasks())))
    if log.evaluate_every:
        tasks = [task for task, weight in data.stage.tasks.items() if weight]
        measure = held_out.of(data.prompter, tasks, data.stage.buckets, log.evaluate_rows)
        hooks.append(Hook("evaluate", log.evaluate_every, lambda params, stage, step: writer.write(
            stage, step, record(measure(params)), file="held_out")))
    return hooks


def write_model(final: pathlib.Path, params: Params, vino: Vino, config: RunConfig, directory: pathlib.Path,
                files: Sequence[pathlib.Path], trained: dict[str, int]) -> None:
    """The model checkpoint at the end of a run. Parts of the initial checkpoint `directory` that no stage trains are copied from it to
    the bit, in their own dtype and with their sources; adapters are merged into their kernels, in float32; every part keeps its tensors
    that are left out.

    files: of the processor. trained: steps by stage.
    """
    info = model_checkpoint.read_info(directory)
    copied = info.parts.keys() - trained_parts(vino, list(config.stages.values()))
    adapters = low_ranks({path: process_allgather(leaf, tiled=True) for path, leaf in by_path(params).items() if kernel_of(path)}, vino.adapters)
    parts: dict[str, Params | model_checkpoint.Leaves] = {}
    for name, tree in params.items():
        parts[name] = model_checkpoint.iter_arrays(directory, name, info) if name in copied else tree
        if own := within(name, adapters):
            leaves = parts[name] if name in copied else by_path(tree).items()
            parts[name] = merged(((path, leaf.astype(np.float32)) for path, leaf in leaves), own)
    copied -= {path.split("/")[0] for path in vino.adapters}
    sources = {name: {"source": str(final.parent), "sha256": ""} for name in params}
    sources |= {name: {"source": info.parts[name].source, "sha256": info.parts[name].sha256} for name in copied}
    left_out = {name: model_checkpoint.read_left_out(directory, name) for name in info.parts}
    model_checkpoint.save(final, parts, vino.config, sources, files, left_out, config.sampling, trained=trained, replace=True)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="launch.train", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="the run's directory; a run there is gone on with")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no tables")
    flags, values = parse(parser, argv)
    cli.join_processes()
    train(run_config(values), flags.workdir, quiet=flags.quiet, begun=process_start())


if __name__ == "__main__":
    cli.run(main)
