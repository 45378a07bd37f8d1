"""Media files on the host: where their bytes lie, what their headers say, and their pictures and frames (PIL and PyAV)."""
import contextlib
import functools
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from PIL import Image

from vino_jax.errors import UserError

WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N")  # 16 bits a value, of which PIL's own conversion would clip all above 255


class Media(Protocol):
    """A picture or clip: a Path, or bytes that lie in a larger file. Its str() is what messages call it; it is hashable."""

    @property
    def name(self) -> str: ...

    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class Span:
    """A file within a file, uncompressed: a member of a tar."""

    file: Path
    offset: int
    size: int
    name: str

    def read_bytes(self) -> bytes:
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.size)

    def __str__(self):
        return f"{self.file}:{self.name}"


@dataclass(frozen=True)
class Facts:
    """What is known of a picture (frames 1) or clip before its pixels are used."""

    frames: int
    height: int
    width: int
    seconds: float = 0.0  # from the first frame to the last

    @property
    def rate(self) -> float:
        """Frames a second, 0 where there is no time in it."""
        return (self.frames - 1) / self.seconds if self.seconds > 0 else 0.0

    def at_rate(self, rate: float) -> int:
        """How many frames the clip has when it is sampled at `rate` frames a second."""
        return 1 + int(self.seconds * rate + 1e-3) if self.seconds > 0 else self.frames


@functools.cache
def picture_facts(media: Media | str | Path) -> Facts:
    """Size of a picture, from its header. Raises UserError."""
    with _picture(media) as image:
        return Facts(1, image.height, image.width)


@functools.cache
def clip_facts(media: Media | str | Path) -> Facts:
    """Frames, size and seconds of a clip, its frames counted packet by packet, never as duration times rate. Raises UserError.

    What a packet holds may still not decode: `launch.ingest` decodes every clip once (`decoded_facts`).
    """
    with _container(media) as container:
        codec = container.streams.video[0].codec_context
        times = [float(p.pts * p.time_base) if p.pts is not None else 0.0 for p in container.demux(video=0)
                 if p.size and not p.is_corrupt]
        if not times:
            raise UserError(f"the video {media} has no frame")
        return Facts(len(times), codec.height, codec.width, max(times) - min(times))


def decoded_facts(media: Media | str | Path) -> Facts:
    """As `clip_facts`, by decoding every frame. Raises UserError."""
    times, height, width = [], 0, 0
    for frame in decoded_frames(media):
        times.append(frame.time or 0.0)
        height, width = frame.height, frame.width
    return Facts(len(times), height, width, max(times) - min(times))


def read_image(media: Media | str | Path) -> np.ndarray:
    """A picture as uint8 RGB (H, W, 3); transparency is dropped, of 16 bits the upper 8 are kept. Raises UserError when it cannot
    be read, or holds values without a range (32 bits)."""
    with _picture(media) as image:
        if image.mode in WIDE_MODES:
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, -1)
        if image.mode in ("I", "F"):
            raise UserError(f"cannot read the image {media}: its values have 32 bits, 8 or 16 are read")
        return np.asarray(image.convert("RGB"))


def decoded_frames(media: Media | str | Path) -> Iterator[av.VideoFrame]:
    """Every frame of a file's first video stream, in the order in which they are shown. Raises UserError for a file without one, and at
    the first frame that is damaged: a decoder would paint over it."""
    none = True
    with _container(media) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            if frame.is_corrupt:
                raise UserError(f"the video {media} is damaged at {frame.time or 0:.2f} s")
            none = False
            yield frame
    if none:
        raise UserError(f"the video {media} has no frame")


def _file(media: Media | str | Path):
    return str(media) if isinstance(media, (str, Path)) else io.BytesIO(media.read_bytes())


@contextlib.contextmanager
def _picture(media: Media | str | Path) -> Iterator[Image.Image]:
    with _told("image", media, Exception), Image.open(_file(media)) as image:  # broken bytes make PIL's readers raise nearly anything
        yield image


@contextlib.contextmanager
def _container(media: Media | str | Path) -> Iterator[av.container.InputContainer]:
    with _told("video", media, (av.FFmpegError, OSError, ValueError)), av.open(_file(media)) as container:
        if not container.streams.video:
            raise UserError(f"{media} has no video stream")
        yield container


@contextlib.contextmanager
def _told(what: str, media: Media | str | Path, errors: type | tuple[type, ...]) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except errors as error:
        raise UserError(f"cannot read the {what} {media}: {error or type(error).__name__}") from None
