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
from PIL import Image, ImageOps

from vino_jax.errors import UserError

WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N")  # 16 bits a value, of which PIL's own conversion would clip all above 255
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap height and width


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
    """Size of a picture as it is shown, from its header. Raises UserError."""
    with _picture(media) as image:
        late = image.format == "PNG" and "exif" not in image.info  # it may stand behind the pixels, which are not read for it
        turned = not late and image.getexif().get(ORIENTATION, 1) in SIDEWAYS
        return Facts(1, *((image.width, image.height) if turned else (image.height, image.width)))


@functools.cache
def clip_facts(media: Media | str | Path) -> Facts:
    """Frames, size and seconds of a clip, its frames counted packet by packet, never as duration times rate. Raises UserError.

    What a packet holds may still not decode: `launch.ingest` decodes every clip once (`decoded_facts`).
    """
    with _container(media) as container:
        times, size = [], None
        for packet in container.demux(video=0):
            if packet.size and not (packet.is_corrupt or packet.is_discard):  # an edit list hides frames
                times.append(float(packet.pts * packet.time_base) if packet.pts is not None else 0.0)
            size = size or next(map(shown_size, packet.decode()), None)  # how a clip is turned stands beside its frames
        if not times or not size:
            raise UserError(f"the video {media} has no frame")
        return Facts(len(times), *size, max(times) - min(times))


def decoded_facts(media: Media | str | Path) -> Facts:
    """As `clip_facts`, by decoding every frame. Raises UserError."""
    times, height, width = [], 0, 0
    for frame in decoded_frames(media):
        times.append(frame.time or 0.0)
        height, width = shown_size(frame)
    return Facts(len(times), height, width, max(times) - min(times))


def read_image(media: Media | str | Path) -> np.ndarray:
    """A picture as uint8 RGB (H, W, 3), upright where its EXIF says how it is turned; transparency is dropped, of 16 bits the upper 8
    are kept. Raises UserError when it cannot be read, or holds values without a range (32 bits)."""
    with _picture(media) as opened:
        image = ImageOps.exif_transpose(opened)
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


def shown_size(frame: av.VideoFrame) -> tuple[int, int]:
    """Height and width of a frame as it is shown: phones film turned, and write down how."""
    return (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)


def frame_pixels(frame: av.VideoFrame, height: int = 0, width: int = 0, interpolation: str = "BICUBIC") -> np.ndarray:
    """A frame as it is shown, scaled to height x width where they are given: uint8 (H, W, 3)."""
    if height and frame.rotation % 180:
        height, width = width, height
    size = {"height": height, "width": width, "interpolation": interpolation} if height else {}
    return np.rot90(frame.to_ndarray(format="rgb24", **size), round(frame.rotation / 90))


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
        if container.streams.video[0].codec_context is None:
            raise UserError(f"the video {media} is of a kind that is not known here")
        yield container


@contextlib.contextmanager
def _told(what: str, media: Media | str | Path, errors: type | tuple[type, ...]) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except errors as error:
        raise UserError(f"cannot read the {what} {media}: {error or type(error).__name__}") from None
