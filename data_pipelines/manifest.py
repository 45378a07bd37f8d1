"""What there is to train on: items, listed in a manifest of one of the forms in `READERS`.

An item has these keys:
  task         one of vino_jax.batch.TASKS
  target       what is to be generated: a picture, or a clip for the video tasks
  images       reference images in their order (i2v without any: the target's first frame)
  video        reference clip of tv2v and tiv2v
  long, short, instruction    texts, at least one of the kinds; each one text or a list of several, of which training draws one
  base_image   whether the last reference image is what is edited (default: true for ti2i_baseimg)
  id           name in messages (default: the target's path)

FILE.jsonl     one JSON object a line
FILE.csv       a header with the keys; an empty cell is an absent key; several images or texts as a JSON list
FILE.parquet   a column a key, `images` a list of paths; null is an absent key
FOLDER         every picture or clip x.png, x.mp4, ... in it and below, with its caption in x.txt: task t2i or t2v, a long text
FILE.tar, FOLDER of tars    webdataset: members of one stem are an item, as in a folder; or x.json has the keys, and names members
               ("target": "x.target.png", or without the stem: "target.png")
FOLDER of launch.ingest     what it wrote, see data_pipelines/records.py

Paths are relative to `root` and stay below it; for a folder or a tar, it is itself the root.
"""
import csv
import functools
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_pipelines.buckets import NEEDS
from data_pipelines.files import Media, Span
from data_pipelines.mixture import TEXTS
from data_pipelines.problems import Problems
from data_pipelines.records import entries, is_ingested
from vino_jax.batch import TASKS
from vino_jax.errors import UserError

KEYS = {"task": str, "target": str, "images": list, "video": str, "base_image": bool, "id": str, **{kind: (str, list) for kind in TEXTS}}
WORDS = {str: "a string", list: "a list of strings", bool: "true or false", (str, list): "a string or a list of strings"}
TASK_OF_SUFFIX = {**dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"), "t2i"),
                  **dict.fromkeys((".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".gif"), "t2v")}

Entry = tuple[str, object, Callable[[str], Media]]  # where it stands, what stands there, and what a path in it means


@dataclass(frozen=True)
class Item:
    """One thing to train on; its files are known to be there, not yet to be readable."""

    id: str
    task: str
    target: Media
    images: tuple[Media, ...]
    video: Media | None
    texts: dict[str, tuple[str, ...]]
    base_image: bool


@functools.lru_cache(maxsize=1)  # the stages of a run have their items of the same manifest
def read_items(manifest: str | Path, root: str | Path, problems: Problems) -> list[tuple[str, Item]]:
    """("manifest:place", item) of every entry that is right; those that are wrong go to `problems`.

    Raises UserError for a manifest that cannot be read or has no items at all.
    """
    manifest, found, entries = Path(manifest), [], 0
    try:
        for where, entry, resolve in _reader(manifest)(manifest, Path(root)):
            entries += 1
            with problems.of(where):
                found.append((where, parse_item(entry, resolve)))
    except (OSError, UnicodeDecodeError, tarfile.TarError) as error:
        raise UserError(f"cannot read the manifest {manifest}: {error}") from None
    if not entries:
        raise UserError(f"the manifest {manifest} has no items")
    return found


def parse_item(entry: object, resolve: Callable[[str], Media]) -> Item:
    """The item of an entry: an object with the keys above, a line of JSON that is one, or what is wrong with it. Raises UserError."""
    if isinstance(entry, UserError):
        raise entry
    if isinstance(entry, str):
        try:
            entry = json.loads(entry.rstrip("\r\n"), object_pairs_hook=_once)  # else an error at the end counts as the next line's
        except json.JSONDecodeError as error:
            raise UserError(f"not JSON ({error.msg}, column {error.colno}); one object a line is expected") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"not JSON that can be read: {error}") from None
    if not isinstance(entry, dict):
        raise UserError("not a JSON object")
    for key, value in entry.items():
        _check_value(key, value)
    for key in ("task", "target"):
        if not entry.get(key):
            raise UserError(f"{key!r} is missing")
    task, images, video = entry["task"], entry.get("images", []), entry.get("video")
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    needs = NEEDS[task]
    if images and not needs.images:
        raise UserError(f"task {task} takes no 'images'")
    if needs.images and not images and task != "i2v":
        raise UserError(f"task {task} needs 'images'")
    if bool(video) != needs.video:
        raise UserError(f"task {task} {'needs a' if needs.video else 'takes no'} 'video'")
    given = {kind: [entry[kind]] if isinstance(entry.get(kind), str) else entry.get(kind, []) for kind in TEXTS}
    texts = {kind: tuple(t for t in values if t.strip()) for kind, values in given.items()}
    texts = {kind: values for kind, values in texts.items() if values}
    if not texts:
        raise UserError(f"no text: give at least one of {', '.join(TEXTS)}")
    return Item(entry.get("id") or entry["target"], task, resolve(entry["target"]), tuple(resolve(name) for name in images),
                resolve(video) if video else None, texts, entry.get("base_image", task == "ti2i_baseimg"))


def _once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object. Raises UserError for a key that it has twice, of which JSON would take the last."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise UserError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return dict(pairs)


def _check_value(key: object, value: object) -> None:
    if key not in KEYS:
        raise UserError(f"unknown key {key!r}; known: {', '.join(KEYS)}")
    if key == "video" and isinstance(value, list):
        raise UserError(f"'video' is a list of {len(value)}: at most one reference clip is supported")
    strings = value if isinstance(value, list) else [value] if isinstance(value, str) else []
    if not isinstance(value, KEYS[key]) or not all(isinstance(v, str) for v in strings):
        raise UserError(f"{key!r} must be {WORDS[KEYS[key]]}, not {value!r:.200}")
    try:
        "".join(strings).encode()
    except UnicodeEncodeError:
        raise UserError(f"{key!r} holds half of a surrogate pair: it is no text") from None


def below(root: Path, name: str) -> Path:
    """The file `name` below `root`. Raises UserError where there is none, or where its path leads out of the root (by its letters:
    links that lie below the root may lead anywhere)."""
    inside, file = os.path.abspath(root), os.path.abspath(os.path.join(root, name))
    if os.path.commonpath((inside, file)) != inside:
        raise UserError(f"the path {name} leads out of the data root {root}")
    try:
        found = os.path.isfile(file)
    except ValueError:  # a null byte
        found = False
    if not found:
        raise UserError(f"there is no file {root / name}")
    return root / name


# --- readers: (manifest, root) -> entries ---


def _jsonl(manifest: Path, root: Path) -> Iterator[Entry]:
    resolve = functools.partial(below, root)
    with manifest.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{manifest}:{number}", line, resolve


def _csv(manifest: Path, root: Path) -> Iterator[Entry]:
    resolve = functools.partial(below, root)
    try:
        with manifest.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream, restkey="cells without a column", strict=True)
            header = rows.fieldnames or []
            if len(set(header)) < len(header):
                raise UserError(f"the header of {manifest} has a column twice: {', '.join(header)}")
            for row in rows:
                yield f"{manifest}:{rows.line_num}", {key: _cell(key, cell) for key, cell in row.items() if cell}, resolve
    except csv.Error as error:
        raise UserError(f"cannot read the manifest {manifest}: {error} (near line {rows.line_num})") from None


def _cell(key: str, cell):
    """A CSV cell as JSON would have it; what cannot be read as such stays as it is, for parse_item to name."""
    if key == "base_image":
        return {"true": True, "false": False}.get(str(cell).lower(), cell)
    if key == "images" or (key in TEXTS and cell.startswith("[")):
        try:
            value = json.loads(cell)
            return value if isinstance(value, list) else [cell]
        except (ValueError, RecursionError):
            return [cell] if key == "images" else cell
    return cell


def _parquet(manifest: Path, root: Path) -> Iterator[Entry]:
    import pyarrow
    import pyarrow.parquet

    resolve, number = functools.partial(below, root), 0
    try:
        with pyarrow.parquet.ParquetFile(manifest) as table:
            for batch in table.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{manifest}:{number}", {key: value for key, value in row.items() if value is not None}, resolve
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot read the manifest {manifest}: {error}") from None


def _captioned(manifest: Path, root: Path) -> Iterator[Entry]:
    resolve = functools.partial(below, manifest)
    found = sorted(Path(folder, file) for folder, _, files in os.walk(manifest, onerror=_raise, followlinks=True) for file in files)
    media = [path for path in found if path.suffix.lower() in TASK_OF_SUFFIX]
    for path in media:
        name, text = str(path.relative_to(manifest)), path.with_suffix(".txt")
        yield str(path), _with_caption(name, text.read_bytes() if text.is_file() else None, text.name), resolve
    stems = {path.with_suffix("") for path in media}
    for path in found:
        if path.suffix == ".txt" and path.with_suffix("") not in stems:
            yield str(path), UserError(_alone(path.name)), resolve


def _raise(error: OSError) -> None:
    raise error


def _alone(caption: str) -> str:
    return f"the caption {caption} has no picture or clip beside it; known: {', '.join(TASK_OF_SUFFIX)}"


def _with_caption(name: str, caption: bytes | None, file: str) -> object:
    """The entry of a picture or clip whose caption is a file beside it, or what is wrong with it."""
    if caption is None:
        return UserError(f"its caption file {file} is missing")
    try:
        text = caption.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return UserError(f"its caption file {file} is not UTF-8: {error}")
    return {"task": TASK_OF_SUFFIX[PurePosixPath(name).suffix.lower()], "target": name, "long": text}


def _tar(manifest: Path, root: Path) -> Iterator[Entry]:
    members = _tar_members(manifest)
    groups: dict[str, dict[str, Span]] = {}
    for name, span in members.items():
        folder, _, file = name.rpartition("/")
        stem, _, suffix = file.partition(".")
        groups.setdefault(f"{folder}/{stem}" if folder else stem, {})[suffix] = span
    named: set[str] = set()
    for stem, files in sorted(groups.items(), key=lambda group: "json" not in group[1]):  # first those that name others
        resolve = functools.partial(_member, manifest, stem, members, named)
        if "json" in files:
            yield str(files["json"]), _json_of(files["json"]), resolve
            continue
        caption = files["txt"].read_bytes() if "txt" in files else None
        media = [span for span in files.values() if PurePosixPath(span.name).suffix.lower() in TASK_OF_SUFFIX]
        for span in media:
            if caption is not None or span.name not in named:
                yield str(span), _with_caption(span.name, caption, f"{stem}.txt"), resolve
        if caption is not None and not media:
            yield str(files["txt"]), UserError(_alone(files["txt"].name)), resolve


def _tar_members(manifest: Path) -> dict[str, Span]:
    """The files in a tar by their names. Raises UserError for links and for a tar that is cut off or damaged."""
    with tarfile.open(manifest, "r:") as archive:
        members = {}
        for member in archive:
            if member.isfile():
                members[member.name] = Span(manifest, member.offset_data, member.size, member.name)
            elif not member.isdir():
                raise UserError(f"{manifest} has the member {member.name}, which is a link or a device: only files are read")
        end = archive.offset
    with manifest.open("rb") as stream:  # for tarfile a damaged header is the end, and so is the end of the file
        stream.seek(end)
        if stream.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise UserError(f"the tar {manifest} is damaged or cut off at byte {end}: items behind it would be lost")
    return members


def _json_of(span: Span) -> object:
    try:
        return span.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return UserError(f"{span.name} is not UTF-8: {error}")


def _member(archive: Path, stem: str, members: dict[str, Span], named: set[str], name: str) -> Span:
    found = members.get(name) or members.get(f"{stem}.{name}")
    if not found:
        raise UserError(f"{archive} has no member {name} or {stem}.{name}")
    named.add(found.name)
    return found


def _tars(manifest: Path, root: Path) -> Iterator[Entry]:
    for file in sorted(manifest.glob("*.tar")):
        yield from _tar(file, root)


READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet, ".tar": _tar}


def _reader(manifest: Path) -> Callable[[Path, Path], Iterator[Entry]]:
    if manifest.is_dir() and is_ingested(manifest):
        return entries
    if manifest.is_dir():
        return _tars if any(manifest.glob("*.tar")) else _captioned
    if manifest.suffix not in READERS:
        raise UserError(f"the manifest {manifest} is neither a folder nor a {', '.join(READERS)} file")
    return READERS[manifest.suffix]
