"""Encode the media of a training config once: VAE moments and VLM patches of every sample, for training to read in their place.

    python -m launch.precompute --config FILE --output DIR [--shard I/N] [--batch ROWS] [--config.KEY=VALUE ...] [--quiet]
    python -m launch.train --config FILE --workdir DIR2 --config.data.precomputed=DIR

N processes, on as many hosts, share the work: process I of 0..N-1 takes every N-th sample, on the mesh of its own devices, and writes
files of its own names (data_pipelines/latents.py). Started again, it encodes what is not there yet: after a kill the shard under way,
after changes what has changed.
"""
import argparse
import contextlib
import dataclasses
import math
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from data_pipelines.latent_source import Job, jobs_of, read_jobs
from data_pipelines.latents import HASHES, SHARD_BYTES, Hashes, Keys, LatentWriter, finished, shard_name, to_record
from data_pipelines.packing import pack_visuals
from data_pipelines.problems import Problems
from data_pipelines.processes import locked
from data_pipelines.prompts import Prompter
from data_pipelines.samples import Sample, check_finite
from launch import cli
from launch.config import parse
from launch.convert import import_parts
from launch.data import StageData, check_data, check_ends, check_manifest, make_keys, problems_file, write_unplaced
from vino_jax.batch import Batch
from vino_jax.checkpoint import model as model_checkpoint
from vino_jax.convert.parts import Given
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.settings import VinoConfig
from vino_jax.sharding.mesh import make_mesh
from vino_jax.sharding.rules import preset
from vino_jax.train.config import RunConfig, run_config
from vino_jax.train.initial import param_structs, resolve_model
from vino_jax.train.logging import progress_bar
from vino_jax.train.loop import make_encoder, place_batch

NO_ROWS = Batch(**dict.fromkeys(field.name for field in dataclasses.fields(Batch)))  # to be given what is encoded


class Encoder:
    """Samples of pixels -> the same samples with moments, in batches of a fixed size on the config's mesh.

    directory: the model checkpoint with the VAE. batch: rows over the mesh, 0 for each bucket's own; more where its data shards do not
    divide it. Raises UserError where config and checkpoint do not go together.
    """

    def __init__(self, config: RunConfig, directory: pathlib.Path, batch: int = 0):
        self._mesh, self._rules, self._batch = make_mesh(config.mesh.sizes), preset(config.mesh.preset), batch
        self._shards = math.prod(self._mesh.shape[axis] for axis in self._rules["batch"])
        vino = Vino(resolve_model(directory, config.model), config.runtime)
        structs = param_structs(vino, list(config.stages.values()), self._mesh, self._rules)
        self._vae = model_checkpoint.restore(directory, {"vae": structs["vae"]})["vae"]
        self._encode = make_encoder(vino, self._mesh, self._rules)

    def rows(self, bucket) -> int:
        """Of a batch in this bucket."""
        return -(-(self._batch or bucket.batch) // self._shards) * self._shards

    def start(self, samples: Sequence[Sample], bucket) -> Callable[[], list[Sample]]:
        """Begin with at most `rows` samples; what is returned waits for their moments."""
        packed = [pack_visuals(sample, bucket) for sample in samples]
        rows = {name: np.stack([row[name] for row in packed]) for name in packed[0]}
        empty = self.rows(bucket) - len(samples)
        filled = {name: np.pad(array, [(0, empty)] + [(0, 0)] * (array.ndim - 1)) for name, array in rows.items()}
        encoded = self._encode(self._vae, place_batch(NO_ROWS.replace(**filled), self._mesh, self._rules))

        def moments() -> list[Sample]:
            target, images, video = jax.device_get((encoded.target, encoded.images, encoded.video))
            return [dataclasses.replace(sample, target=target[i], images=tuple(images[i][:len(sample.images)]) if sample.images else (),
                                        video=video[i] if sample.video is not None else None) for i, sample in enumerate(samples)]

        return moments


@contextlib.contextmanager
def vae_checkpoint(config: RunConfig, output: pathlib.Path) -> Iterator[pathlib.Path]:
    """The model checkpoint that the config names, or one of its VAE alone, imported for as long as the block lasts."""
    if config.init.checkpoint:
        yield pathlib.Path(config.init.checkpoint)
        return
    if not config.init.vae:
        raise UserError("config table 'init' names neither a checkpoint nor a VAE to encode with; set config.init.vae=DIR")
    with tempfile.TemporaryDirectory(prefix="vae.", dir=output) as folder:
        import_parts(pathlib.Path(folder) / "init", Given(vae=pathlib.Path(config.init.vae)), queries=VinoConfig.queries)
        yield pathlib.Path(folder) / "init"


def processor_of(config: RunConfig) -> pathlib.Path:
    """The folder of tokenizer and processor files that training would use. Raises UserError where there is none."""
    init = config.init
    if config.data.processor or init.checkpoint:
        return pathlib.Path(config.data.processor) if config.data.processor else model_checkpoint.processor_folder(init.checkpoint)
    if not init.vlm:
        raise UserError("config table 'init' names no VLM, whose processor is needed; set config.init.vlm=DIR or config.data.processor=DIR")
    vlm = pathlib.Path(init.vlm)
    return vlm if vlm.is_dir() else vlm.parent


def missing_jobs(jobs: Sequence[Job], keys: Keys, done: set[str], problems: Problems, quiet: bool) -> dict[str, Job]:
    """By key, those that are not done; the media of all are looked at, and read where their content is not known."""
    found: dict[str, Job] = {}
    with progress_bar(len(jobs), 0, "media", quiet, "sample") as bar:
        for job in jobs:
            with problems.of(job.window.where):
                key = keys.of(job.window, job.bucket)
                if key not in done:
                    found.setdefault(key, job)
            bar.update()
    return found


def precompute(config: RunConfig, output: pathlib.Path, *, shard: tuple[int, int] = (0, 1), batch: int = 0, quiet: bool = False,
               shard_bytes: int = SHARD_BYTES) -> int:
    """Encode what this process has to and `output` does not hold yet; the number of samples that were.

    Args: shard: (process, of how many); batch: see Encoder; shard_bytes: at which a file is finished.
    Raises UserError, for bad items too where config.data.bad_items is "stop".
    """
    check_data(config)
    check_ends(config)
    check_manifest(config)
    cli.make_output(output)
    name = shard_name(*shard)
    with locked(output / f"{name}.lock", f"another launch.precompute is writing shard {shard[0]}/{shard[1]} of {output}: give each its own"):
        return _precompute(config, output, name, shard, batch, quiet, shard_bytes)


def _precompute(config: RunConfig, output: pathlib.Path, name: str, shard: tuple[int, int], batch: int, quiet: bool, shard_bytes: int) -> int:
    prompter, problems = Prompter(processor_of(config)), Problems(problems_file(config, output))
    datas = [StageData(config, stage, prompter, problems) for stage in config.stages.values()]
    write_unplaced(output, {data.stage.name: data for data in datas})
    jobs = jobs_of([(data.pixels, data.named) for data in datas])
    own = jobs[shard[0]::shard[1]]
    with vae_checkpoint(config, output) as directory:
        keys = make_keys(config, directory, prompter, Hashes(output, output / (name + HASHES)))
        todo = missing_jobs(own, keys, finished(output), problems, quiet)
        encoder = Encoder(config, directory, batch) if todo else None
    written = 0
    with progress_bar(len(todo), 0, "encode", quiet, "sample") as bar, LatentWriter(output, *shard, shard_bytes) as writer:

        def write(moments: list[tuple[str, Job, Sample]]) -> None:
            nonlocal written
            for key, job, sample in moments:
                with problems.of(job.window.where):
                    check_finite(sample)
                    writer.add(key, to_record(key, sample))
                    written += 1

        for moments in encoded(todo, encoder, prompter, keys, problems, config.data.threads, bar.update):
            write(moments)
    if not quiet:
        listed = problems.listed()
        print(f"{len(jobs)} samples, {len(own)} of this process: {written} encoded, {len(own) - len(todo)} there or alike, "
              f"{len(todo) - written} left out; {output}" + (f"; {len(listed)} problems in {problems.file}" if listed else ""), flush=True)
    return written


def encoded(todo: dict[str, Job], encoder: Encoder | None, prompter: Prompter, keys: Keys, problems: Problems, threads: int,
            tell: Callable[[int], object]) -> Iterator[list[tuple[str, Job, Sample]]]:
    """(key, job, sample with moments), batch by batch; the device has the next batch while one is used. tell: takes numbers of samples."""
    groups: dict[str, list[tuple[str, Job]]] = {}
    for key, job in todo.items():
        groups.setdefault(job.bucket.name, []).append((key, job))
    batches = [group[at:at + size] for group in groups.values() for size in [encoder.rows(group[0][1].bucket)]
               for at in range(0, len(group), size)]
    last: tuple[list, Callable[[], list[Sample]]] | None = None
    for asked, read in read_jobs(batches, prompter, keys.clips, problems, threads):
        begun = (read, encoder.start([sample for *_, sample in read], read[0][1].bucket)) if read else None
        if last:
            yield [(key, job, sample) for (key, job, _), sample in zip(last[0], last[1]())]
        last = begun
        tell(asked)
    if last:
        yield [(key, job, sample) for (key, job, _), sample in zip(last[0], last[1]())]


def shard_of(text: str) -> tuple[int, int]:
    """ "I/N" -> (I, N). Raises argparse's error for anything else."""
    try:
        number, count = map(int, text.split("/"))
    except ValueError:
        number, count = -1, 0
    if not 0 <= number < count:
        raise argparse.ArgumentTypeError(f"{text!r} is no I/N with I from 0 to N-1")
    return number, count


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="launch.precompute", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder of the latents; what it holds is kept")
    parser.add_argument("--shard", type=shard_of, default=(0, 1), metavar="I/N", help="this process and how many there are, I from 0 to N-1")
    parser.add_argument("--batch", type=int, default=0, help="rows that are encoded at a time; by default as many as the bucket has")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, no summary")
    flags, values = parse(parser, argv)
    if flags.batch < 0:
        raise UserError(f"--batch is {flags.batch} and must not be negative")
    precompute(run_config(values), flags.output, shard=flags.shard, batch=flags.batch, quiet=flags.quiet)


if __name__ == "__main__":
    cli.run(main)
