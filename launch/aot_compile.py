"""Compile the training steps of a config with the TPU compiler, on a machine that needs no TPU, and report what they cost.

    python -m launch.aot_compile --config FILE --topology v5p:4x4x4 [--stage S] [--bucket B] [--json FILE] [--markdown] [--suggest]
                                 [--encode] [--sampling] [--check] [--config.KEY=VALUE ...]

One row a (stage, bucket): memory of a chip, FLOPs executed and of the model, collectives, traffic with the host, seconds of
compilation, and an estimate of step time and MFU. --suggest tries the remat policies, least recomputing first, and reports the first
that fits. --encode adds the program that encodes a bucket's pixels, which takes its own minutes. --sampling compiles, in the place of
training steps, what launch.sample runs for one sample of each bucket: --stage encode, condition, denoise (one step of it), decode.

The exit code is 0 whether or not programs fit; with --check it is 1 where one does not. A config that takes an argument gets the
topology. Nothing is read but the config and, where it names them, the shapes of its weights.
"""
import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

import jax

from launch import aot_sampling, cli
from launch.config import parse
from launch.generator import TILINGS
from vino_jax.aot import report
from vino_jax.aot.chips import chip_of, topology_devices
from vino_jax.aot.flops import step_flops
from vino_jax.aot.measure import Measured, measure
from vino_jax.aot.roofline import ASSUMPTIONS
from vino_jax.batch import BucketSpec
from vino_jax.checkpoint.atomic import write_text
from vino_jax.convert import parts
from vino_jax.errors import UserError
from vino_jax.nn.stack import REMAT_POLICIES
from vino_jax.settings import VinoConfig, nearest
from vino_jax.sharding.mesh import make_mesh
from vino_jax.sharding.rules import preset
from vino_jax.train.config import RunConfig, run_config
from vino_jax.train.initial import param_structs, resolve_model, training_model, with_model
from vino_jax.train.loop import StagePlan, check_batches, lowered_encoder, make_encoder
from vino_jax.train.stage import StageConfig, rates


def architecture(config: RunConfig) -> VinoConfig:
    """The model that a run of this config would train: of its checkpoint or parts, else of its `model` table. Reads no weights."""
    init = config.init
    if init.checkpoint:
        return resolve_model(init.checkpoint, config.model)
    given = {name: pathlib.Path(getattr(init, name)) for name in ("vino", "mmdit", "vae", "vlm") if getattr(init, name)}
    if not given:
        return with_model(VinoConfig(), config.model)
    return with_model(parts.find(parts.Given(**given), config.model.get("queries", VinoConfig.queries)).config, config.model)


class Compiler:
    """Programs of a config on a topology, measured."""

    def __init__(self, config: RunConfig, topology: str, mesh: jax.sharding.Mesh):
        self.config, self.chip, self.mesh, self.rules = config, chip_of(topology), mesh, preset(config.mesh.preset)
        self.architecture = architecture(config)
        self.vino = training_model(self.architecture, config.runtime, config.stages.values())
        self.structs = param_structs(self.vino, list(config.stages.values()), self.mesh, self.rules)

    def step(self, stage: StageConfig, bucket: BucketSpec, remat: str | None = None) -> report.Row:
        """The row of a training step; remat: in the place of the config's policy."""
        check_batches(stage, [bucket], self.mesh, self.rules)
        remat = remat or stage.remat.get(bucket.name, self.config.runtime.remat)
        stage = dataclasses.replace(stage, remat={bucket.name: remat})
        encode = make_encoder(self.vino, self.mesh, self.rules)
        plan = StagePlan(self.vino, stage, (bucket,), self.mesh, self.rules, self.config.seed, encode)
        measured = measure(plan.lowered(bucket, *plan.abstract(self.structs)), self.chip)
        flops = step_flops(self.architecture, bucket, rates(stage, self.vino.abstract)) / self.mesh.size
        return self._row(measured, stage.name, bucket, remat, flops)

    def encode(self, bucket: BucketSpec) -> report.Row:
        """The row of the program that encodes the bucket's pixels."""
        measured = measure(lowered_encoder(self.vino, self.structs["vae"], bucket, self.mesh, self.rules), self.chip)
        return self._row(measured, "encode", bucket, "-", None)

    def _row(self, measured: Measured, stage: str, bucket: BucketSpec, remat: str, flops: float | None) -> report.Row:
        return report.row(measured, self.chip, stage=stage, bucket=bucket.name, remat=remat, rows_a_chip=bucket.batch / self.mesh.size,
                          model_flops=flops)


def suggest(compile_with: Callable[[str], report.Row], say: Callable[[str], None]) -> report.Row:
    """The row of the first remat policy that fits, least recomputing first; of the last where none does."""
    for remat in REMAT_POLICIES:
        row = compile_with(remat)
        say(f"{row['stage']}, {row['bucket']}: remat {remat!r}: {report.fit(row)}")
        if row["fits"]:
            break
    return row


def chosen(config: RunConfig, stage: str | None, bucket: str | None) -> list[tuple[StageConfig, BucketSpec]]:
    """The programs that the flags name, by default all. Raises UserError for a name that the config does not hold."""
    for kind, name, known in (("stage", stage, config.stages), ("bucket", bucket, config.buckets)):
        if name and name not in known:
            raise UserError(f"unknown {kind} {name!r}{nearest(name, known)}")
    found = [(one, config.buckets[name]) for one in config.stages.values() for name in one.buckets
             if stage in (None, one.name) and bucket in (None, name)]
    if not found:
        raise UserError(f"stage {stage!r} does not draw bucket {bucket!r}; it draws {', '.join(config.stages[stage].buckets)}"
                        if stage else f"no stage draws bucket {bucket!r}")
    return found


def compile_all(compiler: Compiler, programs: Sequence[tuple[StageConfig, BucketSpec]], *, suggesting: bool, encode: bool,
                say: Callable[[str], None]) -> Iterator[report.Row]:
    """A row for each program, told as soon as it is there: large ones take minutes."""
    for stage, bucket in programs:
        if suggesting:
            yield suggest(functools.partial(compiler.step, stage, bucket), say)
        else:
            row = compiler.step(stage, bucket)
            say(f"{stage.name}, {bucket.name}: {report.fit(row)}, compiled in {row['compile_seconds']:.0f} s")
            yield row
    for bucket in {bucket.name: bucket for _, bucket in programs}.values() if encode else ():
        row = compiler.encode(bucket)
        say(f"encode, {bucket.name}: {report.fit(row)}, compiled in {row['compile_seconds']:.0f} s")
        yield row


def _rows(config: RunConfig, flags: argparse.Namespace, mesh: jax.sharding.Mesh, say: Callable[[str], None]) -> Iterator[report.Row]:
    """Those that the flags ask for."""
    if flags.sampling:
        if flags.bucket and flags.bucket not in config.buckets:
            raise UserError(f"unknown bucket {flags.bucket!r}{nearest(flags.bucket, config.buckets)}")
        buckets = [config.buckets[flags.bucket]] if flags.bucket else list(config.buckets.values())
        return aot_sampling.rows(config, architecture(config), flags.topology, mesh, buckets, flags.vae_tiling, flags.stage, say)
    programs = chosen(config, flags.stage, flags.bucket)
    return compile_all(Compiler(config, flags.topology, mesh), programs, suggesting=flags.suggest, encode=flags.encode, say=say)


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="launch.aot_compile", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--topology", required=True, help="chip and shape of a TPU slice, such as v5p:4x4x4")
    parser.add_argument("--stage", help="this stage alone")
    parser.add_argument("--bucket", help="this bucket alone")
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers to this file")
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    parser.add_argument("--suggest", action="store_true", help="find the remat policy that recomputes least and fits")
    parser.add_argument("--encode", action="store_true", help="also compile the program that encodes pixels")
    parser.add_argument("--sampling", action="store_true", help="compile what launch.sample runs, in the place of training steps")
    parser.add_argument("--vae_tiling", choices=TILINGS, default="frames", help="of --sampling, as launch.sample has it")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a program does not fit")
    flags, values = parse(parser, argv, "topology")
    if flags.json:
        cli.make_output(flags.json.parent)
    jax.config.update("jax_platforms", "cpu")  # nothing runs here: a TPU that is there may be in use
    config = run_config(values)
    mesh = make_mesh(config.mesh.sizes, topology_devices(flags.topology))
    rows = list(_rows(config, flags, mesh, say=lambda line: print(line, file=sys.stderr, flush=True)))
    axes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    told = ", ".join(f"{axis} {size}" for axis, size in axes.items())
    heading = f"{flags.topology}: {mesh.size} chips, {told}, preset {config.mesh.preset}, attention {config.runtime.attention}"
    print(report.text(rows, heading, ASSUMPTIONS, markdown=flags.markdown))
    if flags.json:
        write_text(flags.json, json.dumps({"topology": flags.topology, "chips": mesh.size, "mesh": axes, "preset": config.mesh.preset,
                                           "attention": config.runtime.attention, "assumptions": ASSUMPTIONS, "rows": rows}, indent=1))
    return int(flags.check and not all(row["fits"] for row in rows))


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot hold programs of chips that are not there, and warns of each
    cli.run(main)
