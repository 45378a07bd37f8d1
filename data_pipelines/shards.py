"""Writing of ingested data (its layout: data_pipelines/records.py).

Workers write shards under temporary names, one process puts them in place: first the shard, last its index, so that whatever ends a run
leaves either both or what `clean` removes. Shards are numbered without a gap, as TFDS wants them. A shard is never changed but
replaced. TFDS' metadata is written at the end of a run: until then readers see the run before, or, while items are dropped, are told
that the folder is not complete.
"""
import contextlib
import os
import re
import uuid
from collections.abc import Collection, Iterable
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter

from data_pipelines.records import INFO, NAME, SPLIT, VERSION, features, read_index, read_raw, shard_path, write_index
from vino_jax.errors import UserError

SUFFIXES = (".array_record", ".jsonl")


def sweep(folder: Path) -> None:
    """Remove what lies under temporary names."""
    for file in folder.glob(".*.*"):
        if file.suffix in SUFFIXES:
            file.unlink()


def clean(folder: Path) -> dict[int, list[str]]:
    """Remove what no finished write left, and shards that are damaged as far as their size and index tell; number -> keys of the others,
    in order."""
    sweep(folder)
    good = {}
    named = [re.fullmatch(rf"{SPLIT}-(\d+)", file.stem) for file in folder.iterdir() if file.suffix in SUFFIXES]
    for number in sorted({int(found[1]) for found in named if found}):
        try:
            lines, wrong = read_index(shard_path(folder, number))
        except UserError as error:
            wrong = str(error)
        if wrong:
            remove(folder, number)
        else:
            good[number] = [line["key"] for line in lines]
    return good


def remove(folder: Path, number: int) -> None:
    """Remove a shard and its index, whatever of them there is."""
    for file in (shard_path(folder, number).with_suffix(".jsonl"), shard_path(folder, number)):
        file.unlink(missing_ok=True)


def write_records(folder: Path, records: Iterable[bytes]) -> Path:
    """A shard under a temporary name, on the disk. Raises UserError where it cannot be written; then nothing of it stays."""
    file = folder / f".{uuid.uuid4().hex}.array_record"
    writer = ArrayRecordWriter(str(file), "group_size:1")  # what Grain reads at random
    try:
        for record in records:
            writer.write(record)
        writer.close()
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    except BaseException as error:
        with contextlib.suppress(RuntimeError):
            writer.close()
        file.unlink(missing_ok=True)
        if isinstance(error, (RuntimeError, OSError)):
            raise UserError(f"cannot write to {folder}: {error}") from None
        raise
    return file


def put(folder: Path, number: int, file: Path, lines: list[dict]) -> None:
    """Put a shard that `write_records` wrote in place, with its index."""
    shard = shard_path(folder, number)
    shard.with_suffix(".jsonl").unlink(missing_ok=True)
    os.replace(file, shard)
    write_index(shard, lines)


def drop(folder: Path, number: int, wanted: Collection[str]) -> None:
    """Write a shard anew without the items whose keys are not wanted. Raises UserError for a record that is damaged."""
    shard = shard_path(folder, number)
    kept = [(record, line) for record, line in enumerate(read_index(shard)[0]) if line["key"] in wanted]
    if kept:
        put(folder, number, write_records(folder, (read_raw(shard, record) for record, _ in kept)), [line for _, line in kept])
    else:
        remove(folder, number)


def renumber(folder: Path, numbers: list[int]) -> None:
    """Move shards down to 0, 1, ..., in their order. What is cut off in the middle of a move counts no more."""
    for number, was in enumerate(numbers):
        if number != was:
            before, after = shard_path(folder, was), shard_path(folder, number)
            os.replace(before, after)
            os.replace(before.with_suffix(".jsonl"), after.with_suffix(".jsonl"))


def publish(folder: Path, lengths: list[int]) -> None:
    """Write TFDS' metadata, for shards of these lengths, each file whole or not at all, dataset_info.json last."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=NAME, split=SPLIT, filetype_suffix="array_record",
                                             template="{SPLIT}-{SHARD_INDEX}.{FILEFORMAT}")
    size = sum(shard_path(folder, number).stat().st_size for number in range(len(lengths)))
    split = tfds.core.SplitInfo(name=SPLIT, shard_lengths=lengths, num_bytes=size, filename_template=template)
    identity = DatasetIdentity(name=NAME, version=tfds.core.Version(VERSION), data_dir=str(folder), module_name="")
    info = tfds.core.DatasetInfo(builder=identity, features=features(), description="Pictures and clips, ingested by vino_jax.")
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict([split]))
    temporary = folder / ".metadata"
    temporary.mkdir(exist_ok=True)
    info.write_to_directory(temporary)
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == INFO):
        os.replace(file, folder / file.name)
    temporary.rmdir()
