"""VAE moments and VLM patches of samples, encoded once (launch.precompute) and read by training in the place of media.

    DIR/I-of-N-K.array_record   the K-th shard of process I of N: a record a sample, the bytes of a safetensors file (`to_record`)
    DIR/I-of-N-K.index.jsonl    one line {"key": ...} a record, in order; a shard without it was not finished and does not count
    DIR/I-of-N.hashes.jsonl     {"stamp": ..., "sha256": ...} of media files, so that a later start need not read them all
    DIR/skipped.jsonl           items that are wrong, where config key data.bad_items is "skip"

A process writes files of its own names alone, so that several need not talk to each other. What a sample is found by (`Keys`) follows
from the content of its media, how its bucket cuts them, and the VAE: what has changed is missed, never silently used.
"""
import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource
from safetensors import SafetensorError
from safetensors.numpy import load, save

from data_pipelines.buckets import NEEDS
from data_pipelines.files import Media
from data_pipelines.media import FPS, Clips, Window
from data_pipelines.pixels import Patches, PixelLimits
from data_pipelines.samples import Sample
from vino_jax.batch import BucketSpec
from vino_jax.errors import UserError

FORMAT = 2  # goes into every key: raise it when the same files give other pixels, moments or patches
RECORDS, INDEX, HASHES, UNFINISHED = ".array_record", ".index.jsonl", ".hashes.jsonl", ".incomplete"
OPTIONS = "group_size:1,zstd:3"  # Grain reads single records; zstd makes patches ten times smaller, moments hardly
SHARD_BYTES, SHARD_SECONDS = 1 << 28, 120.0  # at which a shard is finished: what a kill can cost


# --- keys ---


class Hashes:
    """sha256 of media files by their content. folder: whose *.hashes.jsonl are known; record: where new ones are appended, if anywhere."""

    def __init__(self, folder: Path, record: Path | None = None):
        self._known, self._record = {}, record
        self._cut = bool(record and record.exists() and not record.read_bytes().endswith(b"\n"))  # by a kill: the next line is a new one
        for file in sorted(folder.glob("*" + HASHES)):
            self._known |= {line["stamp"]: line["sha256"] for line in _lines(file, cut=True)}

    def of(self, media: Media) -> str:
        """What ingest wrote down of it, else what is known of a file of that path, size and time, else that of its bytes.
        Raises UserError for a file that cannot be read."""
        if getattr(media, "sha256", ""):
            return media.sha256
        try:
            stamp = _stamp(media)
            if stamp in self._known:
                return self._known[stamp]
            found = self._known[stamp] = hashlib.sha256(media.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"cannot read {media}: {error.strerror or error}") from None
        if self._record:
            with self._record.open("a") as stream:
                stream.write("\n" * self._cut + json.dumps({"stamp": stamp, "sha256": found}) + "\n")
            self._cut = False
        return found


def _stamp(media: Media) -> str:
    """What stands for the content of a file as long as nobody writes to it."""
    file = getattr(media, "file", media)  # a member of a tar is where it was as long as the tar is as it was
    state = os.stat(file)
    return json.dumps([os.path.abspath(file), str(media), getattr(media, "offset", 0), state.st_size, state.st_mtime_ns, state.st_ctime_ns])


def cut_of(window: Window, bucket: BucketSpec, clips: Clips) -> str:
    """What decides about a sample's pixels beside the content of its media."""
    item, needs = window.item, NEEDS[window.item.task]
    return json.dumps({
        "task": item.task, "start": window.start, "rate": [clips.compat, FPS] if needs.clip else None,
        "target": [bucket.frames, bucket.height, bucket.width],
        "images": [bucket.image_height, bucket.image_width] if needs.images else None,
        "video": [bucket.video_frames, bucket.video_height, bucket.video_width] if item.video else None})


@dataclasses.dataclass(frozen=True)
class Keys:
    """What samples are found by. vae: stands for the VAE's weights and arithmetic; limits: of the prompter, on which patches depend."""

    vae: str
    limits: PixelLimits
    clips: Clips
    hashes: Hashes

    def of(self, window: Window, bucket: BucketSpec) -> str:
        """Raises UserError for media that cannot be read."""
        item = window.item
        return hashlib.sha256(json.dumps({
            "format": FORMAT, "vae": self.vae, "limits": dataclasses.asdict(self.limits), "cut": cut_of(window, bucket, self.clips),
            "target": self.hashes.of(item.target), "images": [self.hashes.of(media) for media in item.images],
            "video": self.hashes.of(item.video) if item.video else None}, sort_keys=True).encode()).hexdigest()


# --- records ---


def to_record(key: str, sample: Sample) -> bytes:
    """A safetensors file of the sample's key (its letters, uint8), moments (target, images, video; float32) and, by reference, patches/K
    and grid/K."""
    arrays = {"key": np.frombuffer(key.encode(), np.uint8), "target": sample.target}
    if sample.images:
        arrays["images"] = np.stack(sample.images)
    if sample.video is not None:
        arrays["video"] = sample.video
    for k, seen in enumerate(sample.seen):
        arrays |= {f"patches/{k}": seen.values, f"grid/{k}": np.asarray(seen.grid, np.int32)}
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})  # of others safetensors writes other values


def from_record(key: str, record: bytes) -> dict[str, Any]:
    """target, images, video and seen of a Sample. Raises SafetensorError, KeyError or ValueError for bytes that are no record of it."""
    arrays = load(record)
    if arrays["key"].tobytes() != key.encode():
        raise ValueError("they are another sample's")
    count = sum(name.startswith("patches/") for name in arrays)
    return {"target": arrays["target"], "images": tuple(arrays.get("images", ())), "video": arrays.get("video"),
            "seen": tuple(Patches(arrays[f"patches/{k}"], tuple(arrays[f"grid/{k}"].tolist())) for k in range(count))}


class Latents:
    """What a folder holds, by key, whoever wrote it. Raises UserError for a folder without a finished shard or with a damaged index."""

    def __init__(self, folder: Path):
        self.folder, self._shards, self._places = folder, [], {}
        sizes = []
        for index in sorted(folder.glob("*" + INDEX)):
            keys = [line["key"] for line in _lines(index)]
            self._places |= {key: (len(self._shards), sum(sizes) + record) for record, key in enumerate(keys)}
            self._shards.append(index.with_name(index.name.removesuffix(INDEX) + RECORDS))
            sizes.append(len(keys))
        if not sizes:
            raise UserError(f"there are no precomputed latents in {folder}: run launch.precompute")
        # with the number of records in its name, a file is not opened before a record of it is read
        self._records = ArrayRecordDataSource([f"{shard}[0:{size}]" for shard, size in zip(self._shards, sizes)])

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def read(self, key: str) -> dict[str, Any]:
        """target, images, video and seen of a Sample (see samples.py). Raises UserError where there is none, or it is damaged."""
        if key not in self._places:
            raise UserError(f"it has no latents in {self.folder}: run launch.precompute")
        shard, record = self._places[key]
        try:
            return from_record(key, self._records[record])
        except (RuntimeError, ValueError, OSError, KeyError, IndexError, SafetensorError) as error:
            name = self._shards[shard]
            raise UserError(f"its latents in {name} cannot be read ({error}): remove that file's {INDEX[1:]} "
                            "and run launch.precompute again") from None


def finished(folder: Path) -> set[str]:
    """Keys of all samples in the finished shards of a folder."""
    return {line["key"] for index in sorted(folder.glob("*" + INDEX)) for line in _lines(index)}


class LatentWriter:
    """Writes the shards of process `shard` of `count`, after those that it finished in former runs; one that a kill left unfinished is
    written over. A context: left by an error too, it finishes the shard under way, as every record in it is whole."""

    def __init__(self, folder: Path, shard: int, count: int, shard_bytes: int = SHARD_BYTES):
        self._folder, self._name, self._limit = folder, shard_name(shard, count), shard_bytes
        self._number, self._writer, self._keys, self._bytes, self._begun = 0, None, [], 0, 0.0

    def add(self, key: str, record: bytes) -> None:
        """Into the shard under way, which is finished when it is large or old enough. Raises UserError where the disk does not take it."""
        if self._writer is None:
            while self._file(INDEX).exists():
                self._number += 1
        with self._told():
            if self._writer is None:
                self._writer, self._begun = ArrayRecordWriter(str(self._file(RECORDS + UNFINISHED)), OPTIONS), time.monotonic()
            self._writer.write(record)
        self._keys.append(key)
        self._bytes += len(record)
        if self._bytes >= self._limit or time.monotonic() - self._begun > SHARD_SECONDS:
            self.finish()

    def finish(self) -> None:
        """Give the shard under way its name, and then its index, which makes it count. Raises UserError as `add` does."""
        writer, keys = self._writer, self._keys
        self._writer, self._keys, self._bytes = None, [], 0
        if writer is None:
            return
        with self._told():
            writer.close()
            self._file(INDEX + UNFINISHED).write_text("".join(json.dumps({"key": key}) + "\n" for key in keys))
            for ending in (RECORDS, INDEX):
                os.replace(self._file(ending + UNFINISHED), self._file(ending))

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # the writer knows only RuntimeError
            self._writer = None
            raise UserError(f"cannot write {self._file(RECORDS)}: {error}") from None

    def __enter__(self) -> "LatentWriter":
        return self

    def __exit__(self, *_) -> None:
        self.finish()

    def _file(self, ending: str) -> Path:
        return self._folder / f"{self._name}-{self._number:05d}{ending}"


def shard_name(shard: int, count: int) -> str:
    """What the names of the files begin with that process `shard` of `count` writes."""
    return f"{shard:05d}-of-{count:05d}"


def _lines(file: Path, cut: bool = False) -> Iterable[dict[str, str]]:
    """The objects of a JSONL file. cut: lines may have been cut off by kills, and count for nothing. Raises UserError for others that
    are no JSON."""
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            yield json.loads(line)
        except ValueError:
            if not cut:
                raise UserError(f"{file}:{number} is damaged: remove the file and run launch.precompute again") from None
