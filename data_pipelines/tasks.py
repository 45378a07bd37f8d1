"""Task files: what is to be generated, as the reference's JSON lists it."""
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vino_jax.batch import TASKS
from vino_jax.errors import UserError

# what sets the size of the result, where it is not what was asked for
IMAGE_SIZED = ("ti2i", "ti2i_baseimg", "i2v")  # the last reference image
VIDEO_SIZED = ("tv2v", "tiv2v")  # the reference clip, its frames too
TAKES_IMAGES = ("i2v", "ti2v", "ti2i", "ti2i_baseimg", "tiv2v")

# the reference's keys; the last two are ours
KEYS = ("index", "task", "caption", "ref_image_paths", "ref_video_path", "ref_image_have_base", "seed", "negative_prompt")

MAX_SEED = 2**32
MAX_INDEX = 240  # bytes: a file's name has 255, of which its ending and that of an unfinished file take some

# the reference's own negative prompts
NEGATIVE_IMAGE = (
    "low quality, blurry, low resolution, jpeg artifacts, noisy, bad anatomy, bad proportions, deformed face, extra limbs, extra fingers, "
    "fused fingers, malformed hands, unnatural pose, distorted eyes, poor lighting, overexposed, underexposed, bad composition, cropped, "
    "duplicate, ghosting, motion blur, watermark, logo, text, nsfw")
NEGATIVE_VIDEO = (
    "low quality, blurry, flickering, temporal inconsistency, ghosting, motion blur, jitter, unstable structure, distorted anatomy, "
    "extra limbs, extra fingers, malformed hands, warped face, inconsistent identity, poor lighting, overexposed, underexposed, "
    "bad composition, cropped, duplicate frames, color flicker, watermark, logo, text, nsfw")


@dataclass(frozen=True)
class Task:
    """One thing to generate."""

    index: str  # name of the output, without its ending
    task: str  # one of vino_jax.batch.TASKS
    caption: str
    images: tuple[Path, ...] = ()
    video: Path | None = None
    base_image: bool = False  # the last image is what is edited: image guidance keeps it
    seed: int | None = None  # of its noise, where it has one of its own
    negative_prompt: str | None = None
    entry: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # as the file has it


def read_tasks(path: str | Path, root: str | Path = ".") -> tuple[list[Task], list[UserError]]:
    """The tasks of a JSON array and, one each, what is wrong with those that cannot be run; paths in it start at `root`.

    Raises UserError when the file itself cannot be read or is no array.
    """
    try:
        entries = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read the task file {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"the task file {path} is no JSON: {error}") from None
    if not isinstance(entries, list):
        raise UserError(f"the task file {path} must be a JSON array of tasks")
    tasks, problems = [], []
    for number, entry in enumerate(entries):
        try:
            task = parse_task(entry, Path(root), f"{path}: entry {number}")
            if task.index in {t.index for t in tasks}:
                raise UserError(f"{path}: entry {number}: the index {task.index!r} occurs twice, one output would overwrite the other")
            tasks.append(task)
        except UserError as error:
            problems.append(error)
    return tasks, problems


def parse_task(entry: Mapping, root: Path, where: str) -> Task:
    """One entry of a task file; `where` starts the line of a UserError. Raises it for the first thing that is wrong."""
    if not isinstance(entry, Mapping):
        raise UserError(f"{where} is {entry!r}, not an object")
    index = entry.get("index")
    if not isinstance(index, (str, int)) or isinstance(index, bool) or not str(index) or Path(str(index)).name != str(index):
        raise UserError(f"{where}: index is {index!r}; it must be a name for the output file")
    for key in ("index", "caption", "negative_prompt"):
        if _broken(entry.get(key)):
            raise UserError(f"{where}: {key} holds half a character, a surrogate of UTF-16 that stands alone")
    if len(str(index).encode()) > MAX_INDEX:
        raise UserError(f"{where}: index {str(index)[:20]!r}... has more than {MAX_INDEX} bytes; it is a name for the output file")
    where = f"{where} (index {index})"
    for key in entry:
        close = difflib.get_close_matches(key, KEYS, 1, 0.8)
        if key not in KEYS and close:
            raise UserError(f"{where}: unknown key {key!r}, did you mean {close[0]!r}?")
    name = entry.get("task")
    if name not in TASKS:
        raise UserError(f"{where}: unknown task {name!r}; known: {', '.join(TASKS)}")
    caption = entry.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise UserError(f"{where}: it has no caption")
    base = entry.get("ref_image_have_base", name == "ti2i_baseimg")
    if not isinstance(base, bool):
        raise UserError(f"{where}: ref_image_have_base is {base!r}; it must be true or false")
    seed, negative = entry.get("seed"), entry.get("negative_prompt")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < MAX_SEED):
        raise UserError(f"{where}: seed is {seed!r}; it must be a whole number from 0 to {MAX_SEED - 1}")
    if negative is not None and not isinstance(negative, str):
        raise UserError(f"{where}: negative_prompt is {negative!r}; it must be a text")
    images, video = _references(entry, name, root, where)
    name = "ti2i_baseimg" if name == "ti2i" and base else name
    return Task(str(index), name, caption, images, video, base and bool(images), seed, negative, entry)


def _broken(text: object) -> bool:
    """Whether it is a text that no file could hold."""
    try:
        str(text).encode()
    except UnicodeEncodeError:
        return True
    return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a path, or no text for one
        return False


def _references(entry: Mapping, name: str, root: Path, where: str) -> tuple[tuple[Path, ...], Path | None]:
    listed, clip = entry.get("ref_image_paths") or [], entry.get("ref_video_path") or None
    if not isinstance(listed, list) or not all(isinstance(p, str) for p in listed):
        raise UserError(f"{where}: ref_image_paths must be a list of paths")
    if clip is not None and not isinstance(clip, str):
        raise UserError(f"{where}: ref_video_path must be one path: at most one reference video is supported")
    for takes, given, what in ((name in TAKES_IMAGES, bool(listed), "ref_image_paths"),
                               (name in VIDEO_SIZED, clip is not None, "ref_video_path")):
        if takes != given:
            raise UserError(f"{where}: task {name} {'needs' if takes else 'takes no'} {what}")
    for path in [*listed, *([clip] if clip else [])]:
        if not _is_file(root / path):
            raise UserError(f"{where}: no file {str(root / path)[:200]} (paths start at --root)")
    return tuple(root / p for p in listed), root / clip if clip else None
