"""Ingested data: the layout that launch.ingest writes and training reads.

    OUT/vino_media/1.0.0/train-00000.array_record    a shard: one record an item, a tf.train.Example of `features`
                         train-00000.jsonl           its index: a header, then a line an item with everything but the media's bytes
                         features.json, dataset_info.json    with which tfds.data_source("vino_media", data_dir=OUT) loads it
    OUT/skipped.jsonl    items that the last run with --skip left out

A data source gives an item as {key, id, task, base_image, long, short, instruction: lists of texts, target: MEDIA, images: lists by
the keys of MEDIA, video: MEDIA, its bytes empty where there is none}, texts as bytes in UTF-8. MEDIA is {bytes: of the file as it
was, name, sha256, frames, height, width, seconds}, the last four counted by decoding it.

The index header is {"format", "records", "shard_bytes", "sha256" of the lines}. A shard counts only with an index that matches it.
Training reads indexes at its start, and no media; what it reads later is checked against the SHA-256 in the index, so that a damaged
shard is a UserError that names file and record. A record number is part of the name: train-00000.array_record:7.
"""
import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from grain.sources import ArrayRecordDataSource

from data_pipelines.files import Facts
from data_pipelines.mixture import TEXTS
from vino_jax.errors import UserError

NAME, VERSION, SPLIT = "vino_media", "1.0.0", "train"
INFO = "dataset_info.json"  # without which no one reads the shards
FORMAT = 1  # of the index
OPEN_SHARDS = 256  # whose files a process keeps open
AGAIN = "delete it and run launch.ingest again"

_last = threading.local()  # the record that a thread read last: an item of several files is one record


@functools.cache
def features():
    """Of a record, as tensorflow_datasets has them; its Text holds any bytes."""
    import tensorflow_datasets as tfds  # takes most of a second

    text, several = tfds.features.Text(), tfds.features.Sequence
    media = {"bytes": text, "name": text, "sha256": text, "frames": np.int64, "height": np.int64, "width": np.int64, "seconds": np.float32}
    return tfds.features.FeaturesDict({
        "key": text, "id": text, "task": text, "base_image": np.bool_, **{kind: several(text) for kind in TEXTS},
        "target": media, "images": several(media), "video": media})


@dataclass(frozen=True)
class Field:
    """A picture or clip in a record: a Media (data_pipelines/files.py) that knows its facts. Picklable."""

    shard: Path
    record: int
    part: str  # "target", "video", "images/0", ...
    name: str
    sha256: str
    facts: Facts

    def read_bytes(self) -> bytes:
        """The file as it was ingested. Raises UserError where the shard is damaged."""
        role, _, number = self.part.partition("/")
        found = read_record(self.shard, self.record)[role]["bytes"]
        data = b"".join(found[int(number):int(number) + 1]) if number else found
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise UserError(f"{self} is not what was ingested (its SHA-256 differs): the shard is damaged, {AGAIN}")
        return data

    def __str__(self):
        return f"{self.shard}:{self.record}:{self.name}"


def folder_of(output: Path) -> Path:
    """Where the shards of an ingested folder lie."""
    return output / NAME / VERSION


def shard_path(folder: Path, number: int) -> Path:
    """The shard's file; that of its index ends in .jsonl."""
    return folder / f"{SPLIT}-{number:05}.array_record"


def is_ingested(manifest: Path) -> bool:
    """Whether launch.ingest wrote into this folder."""
    return folder_of(manifest).is_dir()


def shard_lengths(folder: Path) -> list[int]:
    """Records of each shard that the last finished run left. Raises UserError where none has finished, or its dataset_info.json is
    damaged."""
    file = folder / INFO
    try:
        (split,) = json.loads(file.read_text())["splits"]
        return [int(length) for length in split["shardLengths"]]
    except FileNotFoundError:
        raise UserError(f"{folder} is not complete: run launch.ingest again") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {file} ({error or type(error).__name__}): {AGAIN}") from None


def read_index(shard: Path) -> tuple[list[dict], str]:
    """The lines of a shard's index, and what is wrong with the shard itself, "" for nothing (only its size is looked at). Raises
    UserError for an index that is missing or damaged."""
    file = shard.with_suffix(".jsonl")
    try:
        header, _, rest = file.read_bytes().partition(b"\n")
        header = json.loads(header)
        if header["format"] != FORMAT:
            raise UserError(f"{file} is of format {header['format']}, this version reads {FORMAT}: ingest into another folder")
        if hashlib.sha256(rest).hexdigest() != header["sha256"]:
            raise UserError(f"the index {file} is damaged: {AGAIN}")
        lines = [json.loads(line) for line in rest.splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the index {file} ({error or type(error).__name__}): {AGAIN}") from None
    size = shard.stat().st_size if shard.is_file() else None
    wrong = f"has {size} bytes and not the {header['shard_bytes']} that were written: {AGAIN}"
    wrong = "is missing: run launch.ingest again" if size is None else wrong
    return lines, "" if size == header["shard_bytes"] else f"the shard {shard} {wrong}"


def write_index(shard: Path, lines: list[dict]) -> None:
    """Write the index of a shard that lies there, whole or not at all."""
    rest = "".join(json.dumps(line) + "\n" for line in lines).encode()
    header = {"format": FORMAT, "records": len(lines), "shard_bytes": shard.stat().st_size, "sha256": hashlib.sha256(rest).hexdigest()}
    temporary = shard.with_name(f".{shard.stem}.jsonl")
    with temporary.open("wb") as stream:
        stream.write(json.dumps(header).encode() + b"\n" + rest)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, shard.with_suffix(".jsonl"))


def encode(line: Mapping, data: Mapping[str, bytes]) -> bytes:
    """The record of an index line and the bytes of its media by part ("target", "video", "images/0", ...)."""
    def media(part, said):
        return {**said, "bytes": data[part], "name": _utf8(said["name"])}
    nothing = {"name": "", "sha256": "", "frames": 0, "height": 0, "width": 0, "seconds": 0.0}
    example = features().encode_example({
        "key": line["key"], "id": _utf8(line["id"]), "task": line["task"], "base_image": line["base_image"],
        **{kind: line["texts"].get(kind, []) for kind in TEXTS},
        "target": media("target", line["target"]), "images": [media(f"images/{i}", said) for i, said in enumerate(line["images"])],
        "video": media("video", line["video"]) if line["video"] else {**nothing, "bytes": b""}})
    return _serializer().get_tf_example(example).SerializeToString(deterministic=True)  # else the order of its keys is random


@functools.cache
def _serializer():
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    return ExampleSerializer(features().get_serialized_info())


def _utf8(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")  # names of files need not be UTF-8


def read_raw(shard: Path, record: int) -> bytes:
    """A record as it was written. Raises UserError, naming file and record, where it cannot be read."""
    try:
        return _open(shard, _stamp(shard))[record]
    except Exception as error:  # damaged files make the reader raise nearly anything
        told = (str(error) or type(error).__name__).split("\n")[0]
        raise UserError(f"cannot read record {record} of {shard} ({told:.200}): the shard is damaged, {AGAIN}") from None


def read_record(shard: Path, record: int) -> dict:
    """A record, decoded; the last of each thread is kept. Raises UserError, naming file and record, where it cannot be read."""
    wanted = shard, record, _stamp(shard)
    if getattr(_last, "at", None) != wanted:
        _last.at = _last.value = None
        raw = read_raw(shard, record)
        try:
            _last.value = features().deserialize_example_np(raw)
        except Exception as error:  # and so does the parser for bytes that are no example
            raise UserError(f"record {record} of {shard} cannot be decoded ({type(error).__name__}): {AGAIN}") from None
        _last.at = wanted
    return _last.value


@functools.lru_cache(OPEN_SHARDS)
def _open(shard: Path, stamp: tuple[int, ...]) -> ArrayRecordDataSource:
    return ArrayRecordDataSource([str(shard)])


def _stamp(shard: Path) -> tuple[int, ...]:
    """Of the file that lies there now: one that was replaced is opened anew. Raises UserError."""
    try:
        stat = shard.stat()
    except OSError as error:
        raise UserError(f"cannot read the shard {shard}: {error.strerror}; run launch.ingest again") from None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def entries(output: Path, root: Path) -> Iterator[tuple[str, object, Callable[[str], Field]]]:
    """The reader of an ingested folder (data_pipelines/manifest.py): items in the order of their records."""
    folder = folder_of(output)
    for number, length in enumerate(shard_lengths(folder)):
        shard = shard_path(folder, number)
        try:
            lines, wrong = read_index(shard)
            if len(lines) != length:
                raise UserError(f"it has {len(lines)} items, {INFO} has {length}: run launch.ingest again")
        except UserError as error:
            yield str(shard.with_suffix(".jsonl")), error, None
            continue
        for record, line in enumerate(lines):
            resolve = functools.partial(_field, shard, record, line)
            yield f"{shard}:{record}", UserError(wrong) if wrong else _entry(line), resolve


def _entry(line: dict) -> dict:
    """The entry of an index line; its paths are names of parts."""
    return {"id": line["id"], "task": line["task"], "base_image": line["base_image"], **line["texts"], "target": "target",
            "images": [f"images/{i}" for i in range(len(line["images"]))], **({"video": "video"} if line["video"] else {})}


def _field(shard: Path, record: int, line: dict, part: str) -> Field:
    role, _, number = part.partition("/")
    said = line[role][int(number)] if number else line[role]
    return Field(shard, record, part, said["name"], said["sha256"], Facts(said["frames"], said["height"], said["width"], said["seconds"]))
