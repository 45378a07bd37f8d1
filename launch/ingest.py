"""Ingest a manifest into ArrayRecord shards, which training reads (config.data.manifest=OUT) and tfds.data_source loads.

    python -m launch.ingest --manifest FILE|FOLDER|TAR --root DIR --output OUT [--workers N] [--skip]

Every picture and clip is decoded once, whole: what is broken is found now, and the numbers of frames that training relies on are exact.
Manifests: data_pipelines/manifest.py; the layout of OUT: data_pipelines/records.py.

A run makes OUT hold what the manifest lists. An item is known by its content: its entry and the SHA-256 of its files, wherever they
lie. What OUT has already is not written again; what the manifest lists no more is dropped, by writing its shard anew without it, but not
by a run that had to skip items; an entry that is listed twice is there twice. Whatever ends a run, the next goes on from the shards that
were finished. Shards that are missing or cut off are made again; one with flipped bytes must be deleted first, which the message about it
says.

Items lie in the order of the manifest where OUT was empty; later runs add theirs at the end. Shards are the same for any number of workers.
"""
import concurrent.futures
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from data_pipelines.buckets import NEEDS
from data_pipelines.files import Facts, Media, decoded_facts, read_image
from data_pipelines.manifest import Item, read_items
from data_pipelines.problems import Problems
from data_pipelines.processes import end_with_parent, locked
from data_pipelines.records import INFO, encode, folder_of, shard_lengths
from data_pipelines.shards import clean, drop, publish, put, renumber, sweep, write_records
from launch import cli
from vino_jax.errors import UserError

MAX_BYTES = 256 << 20  # of media in a shard that has more than one item
MAX_ITEMS, MIN_ITEMS = 1024, 8  # in a shard, where there are enough
SHARDS = 16  # that a run writes at least, of MIN_ITEMS or more: work for that many processes
MAX_RECORD = (2 << 30) - (16 << 20)  # bytes of media; a tf.train.Example ends at 2 GiB

_count = None  # items that all workers have done, in shared memory


@dataclass(frozen=True)
class Digest:
    """Of a file, or why it has none."""

    size: int = 0
    sha256: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Job:
    """An item to write."""

    where: str  # in the manifest
    item: Item
    key: str
    size: int  # bytes of its media
    digests: dict[str, str]  # SHA-256 by part


@dataclass(frozen=True)
class Held:
    """A Media in memory: what is decoded is what is written."""

    name: str
    data: bytes
    label: str

    def read_bytes(self) -> bytes:
        return self.data

    def __str__(self):
        return self.label


@dataclass(frozen=True)
class Summary:
    """What a run did, in items and shards."""

    written: int
    shards: int
    kept: int
    dropped: int
    wrong: int = 0


def ingest(manifest: Path, root: Path, output: Path, workers: int = 1, skip: bool = False, quiet: bool = True) -> Summary:
    """Make `output` hold what the manifest lists; see above.

    skip: list items that are wrong in output/skipped.jsonl and go on, instead of ending with the first; what was finished by then stays.
    Raises UserError for a manifest that cannot be read or of which no item can be used, and where nothing can be written.
    """
    folder, skipped = folder_of(output), output / "skipped.jsonl"
    if manifest.resolve() == output.resolve():
        raise UserError(f"the manifest and the output are the same folder {output}")
    if not manifest.exists():
        raise UserError(f"cannot read the manifest {manifest}: there is no such file or folder")
    cli.make_output(folder)
    try:
        with locked(folder / ".lock", f"another launch.ingest is writing to {folder}"):
            skipped.unlink(missing_ok=True)  # it lists what this run leaves out
            try:
                return _update(folder, manifest, root, workers, Problems(skipped if skip else None), quiet)
            finally:
                sweep(folder)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error}") from None


def _update(folder: Path, manifest: Path, root: Path, workers: int, problems: Problems, quiet: bool) -> Summary:
    present = clean(folder)
    jobs = plan(read_items(manifest, root, problems), workers, problems, quiet)
    known, wanted = {key for keys in present.values() for key in keys}, {job.key for job in jobs}
    shards = list(divide([job for job in jobs if job.key not in known]))
    first = number = max(present, default=-1) + 1
    for file, lines in write(folder, shards, workers, problems, quiet):
        if lines:
            put(folder, number, file, lines)
            present[number] = [line["key"] for line in lines]
            number += 1
        else:  # all of its items are wrong
            file.unlink()
    if not any(key in wanted for keys in present.values() for key in keys):
        raise UserError(f"no item of the manifest {manifest} can be used")
    if problems.listed():  # what cannot be read today may be there tomorrow
        wanted |= {key for keys in present.values() for key in keys}
    dropped = tidy(folder, present, wanted)
    lengths = [len(keys) for keys in present.values()]
    if number > first or dropped or not published(folder, lengths):
        publish(folder, lengths)
    kept = len(known & wanted)
    return Summary(sum(lengths) - kept, number - first, kept, dropped, len(problems.listed()))


def tidy(folder: Path, present: dict[int, list[str]], wanted: set[str]) -> int:
    """Drop the items that are not wanted and close the gaps between shards; how many were dropped. present: number -> keys, in order;
    the shards that stay are left in it, in order, under the numbers that they had."""
    stale = [number for number, keys in present.items() if not wanted.issuperset(keys)]
    before = sum(map(len, present.values()))
    if stale or list(present) != list(range(len(present))):
        (folder / INFO).unlink(missing_ok=True)  # until the end no one reads what is half done
    for number in stale:
        drop(folder, number, wanted)
        present[number] = [key for key in present[number] if key in wanted]
        if not present[number]:
            del present[number]
    renumber(folder, list(present))
    return before - sum(map(len, present.values()))


def published(folder: Path, lengths: list[int]) -> bool:
    """Whether TFDS' metadata is that of shards of these lengths."""
    try:
        return shard_lengths(folder) == lengths
    except UserError:
        return False


def parts_of(item: Item) -> dict[str, tuple[Media, bool]]:
    """part -> (media, whether it is a clip)"""
    video = {"video": (item.video, True)} if item.video else {}
    return {"target": (item.target, NEEDS[item.task].clip), **{f"images/{i}": (m, False) for i, m in enumerate(item.images)}, **video}


def plan(items: Sequence[tuple[str, Item]], workers: int, problems: Problems, quiet: bool) -> list[Job]:
    """The items with their keys, in order; those whose files cannot be read go to `problems`."""
    media = list(dict.fromkeys(m for _, item in items for m, _ in parts_of(item).values()))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:  # hashing and reading hold no lock of Python's
        found = dict(zip(media, list(tqdm(pool.map(_digest, media), "hash", len(media), unit="file", disable=quiet))))
    jobs, times = [], {}
    for where, item in items:
        with problems.of(where):
            parts = {part: (m.name, found[m]) for part, (m, _) in parts_of(item).items()}
            for _, file in parts.values():
                if file.problem:
                    raise UserError(file.problem)
            size = sum(file.size for _, file in parts.values())
            if size > MAX_RECORD:
                raise UserError(f"its files have {size / 1e9:.2f} GB together, a record holds {MAX_RECORD / 1e9:.2f}")
            entry = [item.id, item.task, item.texts, item.base_image, [(part, name, file.sha256) for part, (name, file) in parts.items()]]
            key = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
            times[key] = times.get(key, 0) + 1
            numbered = key if times[key] == 1 else f"{key}-{times[key]}"
            jobs.append(Job(where, item, numbered, size, {part: file.sha256 for part, (_, file) in parts.items()}))
    return jobs


def _digest(media: Media) -> Digest:
    try:
        data = _read(media)
    except UserError as error:
        return Digest(problem=str(error))
    return Digest(len(data), hashlib.sha256(data).hexdigest())


def divide(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Shards of bounded size."""
    most, shard, size = min(MAX_ITEMS, max(MIN_ITEMS, -(-len(jobs) // SHARDS))), [], 0
    for job in jobs:
        if shard and (len(shard) == most or size + job.size > MAX_BYTES):
            yield shard
            shard, size = [], 0
        shard.append(job)
        size += job.size
    if shard:
        yield shard


def write(folder: Path, shards: Sequence[Sequence[Job]], workers: int, problems: Problems,
          quiet: bool) -> Iterator[tuple[Path, list[dict]]]:
    """(file under a temporary name, index lines) of each shard, in order; the work is done in processes where workers > 1."""
    if not shards:
        return
    spawn = multiprocessing.get_context("spawn")  # threads of this process hold locks that a fork would copy
    setup = {"initializer": _start_worker, "initargs": (spawn.Value("q", 0),)}
    workers, total = min(workers, len(shards)), sum(map(len, shards))
    pool = (concurrent.futures.ProcessPoolExecutor(workers, spawn, **setup) if workers > 1
            else concurrent.futures.ThreadPoolExecutor(1, **setup))
    with pool, tqdm(None, "write", total, unit="item", disable=quiet) as bar:
        futures = [pool.submit(write_shard, folder, shard, problems) for shard in shards]
        try:
            for future in futures:
                while not concurrent.futures.wait([future], 0.5).done:
                    bar.update(setup["initargs"][0].value - bar.n)
                yield future.result()
                bar.update(setup["initargs"][0].value - bar.n)
        except BrokenProcessPool:
            raise UserError("a worker was killed, perhaps for want of memory: run again, with fewer --workers; "
                            "what is finished is kept") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(count) -> None:
    """In every worker, first."""
    global _count
    _count = count
    end_with_parent()


def write_shard(folder: Path, jobs: Sequence[Job], problems: Problems) -> tuple[Path, list[dict]]:
    """A worker's work: (file under a temporary name, its index lines), without items that are wrong."""
    lines: list[dict] = []

    def records() -> Iterable[bytes]:
        for job in jobs:
            with problems.of(job.where):
                line, data = read_item(job)
                yield encode(line, data)
                lines.append(line)
            with _count.get_lock():
                _count.value += 1
    return write_records(folder, records()), lines


def read_item(job: Job) -> tuple[dict, dict[str, bytes]]:
    """The index line of an item and the bytes of its media by part, all of them decoded. Raises UserError."""
    facts: dict[str, dict] = {}
    data: dict[str, bytes] = {}
    for part, (media, clip) in parts_of(job.item).items():
        held = Held(media.name, _read(media), str(media))
        if hashlib.sha256(held.data).hexdigest() != job.digests[part]:
            raise UserError(f"{media} changes while it is read: run again when it is whole")
        found = decoded_facts(held) if clip else Facts(1, *read_image(held).shape[:2])
        facts[part] = {"name": media.name, "sha256": job.digests[part], **asdict(found)}
        data[part] = held.data
    images = [facts[f"images/{i}"] for i in range(len(job.item.images))]
    line = {"key": job.key, "id": job.item.id, "task": job.item.task, "base_image": job.item.base_image,
            "texts": {kind: list(texts) for kind, texts in job.item.texts.items()},
            "target": facts["target"], "images": images, "video": facts.get("video")}
    return line, data


def _read(media: Media) -> bytes:
    try:
        return media.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {media}: {error}") from None


def main(argv: Sequence[str] | None = None) -> None:
    """Raises UserError."""
    parser = cli.Parser(prog="launch.ingest", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--manifest", required=True, type=Path, help="JSONL, CSV, Parquet, a folder of captioned files, or webdataset tars")
    parser.add_argument("--root", type=Path, default=Path("."), help="where the paths in the manifest start (default: here)")
    parser.add_argument("--output", required=True, type=Path, help="folder of the shards; what is there already is kept")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--skip", action="store_true", help="list items that are wrong in OUTPUT/skipped.jsonl and go on")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    flags = parser.parse_args(argv)
    if flags.workers < 1:
        raise UserError(f"--workers is {flags.workers} and must be at least 1")
    done = ingest(flags.manifest, flags.root, flags.output, flags.workers, flags.skip, flags.quiet)
    what = f"{done.written} items written in {done.shards} shards" if done.written else "nothing to write"
    print(f"{flags.output}: {what}, {done.kept} were there already, {done.dropped} dropped")
    if done.wrong:
        print(f"{done.wrong} items are wrong and left out, listed in {flags.output / 'skipped.jsonl'}")


if __name__ == "__main__":
    cli.run(main)
