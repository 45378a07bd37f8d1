"""Writing what was generated: png, mp4, latents; and reading it back. A file appears under its name only when it is whole."""
import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vino_jax.errors import UserError

FPS = 24  # of the published model
ENDINGS = (".png", ".mp4")  # of what was generated
UNFINISHED = re.compile(r"\.\d+\.(.+)")  # what a kill leaves of `whole_file`; group 1: the name that it would have had
_CRF = "12"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` with the same ending, renamed to it at the end and removed on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_png(path: Path, pixels: np.ndarray, metadata: Mapping[str, str]) -> None:
    """One picture, uint8 (H, W, 3), with the metadata as its text entries."""
    text = PngInfo()
    for name, value in metadata.items():
        text.add_itxt(name, value)
    with whole_file(path) as temporary:
        Image.fromarray(pixels).save(temporary, pnginfo=text)


def write_mp4(path: Path, pixels: np.ndarray, metadata: Mapping[str, str]) -> None:
    """One clip, uint8 (F, H, W, 3) with even H and W, 24 frames a second: libx264, yuv420p, crf 12; metadata as container tags."""
    _, height, width, _ = pixels.shape
    with whole_file(path) as temporary:
        with av.open(str(temporary), "w", options={"movflags": "+faststart+use_metadata_tags"}) as container:
            container.metadata.update(metadata)
            stream = container.add_stream("libx264", rate=Fraction(FPS), options={"crf": _CRF})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for picture in pixels:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())


def output_path(directory: Path, index: str, frames: int) -> Path:
    """`<index>.png` for one frame, else `<index>.mp4`."""
    return directory / f"{index}{ENDINGS[frames > 1]}"


def write_output(directory: Path, index: str, pixels: np.ndarray, metadata: Mapping[str, str]) -> Path:
    """A picture or a clip, uint8 (F, H, W, 3), by its number of frames; returns the file's path."""
    path = output_path(directory, index, len(pixels))
    if len(pixels) == 1:
        write_png(path, pixels[0], metadata)
    else:
        write_mp4(path, pixels, metadata)
    return path


def write_latents(path: Path, latents_BFHWC: np.ndarray) -> None:
    """Scaled latents (1, f, h, w, C) as an npz with the key `latents` in the published layout (1, C, T, H, W), float32."""
    with whole_file(path) as temporary:
        np.savez(temporary, latents=np.moveaxis(latents_BFHWC, -1, 1).astype(np.float32))


def read_frames(path: Path) -> list[np.ndarray]:
    """Frames, uint8 (H, W, 3), of a picture or a clip. Raises UserError for a file that is neither."""
    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                return [np.asarray(image.convert("RGB"))]
        with av.open(str(path)) as container:
            return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (OSError, ValueError, IndexError, av.FFmpegError) as error:  # IndexError: of a file cut off before its stream is told of
        raise UserError(f"cannot read {path}: {error}") from None


def read_metadata(path: Path) -> dict[str, str]:
    """What `write_output` was given as metadata, and what the container adds. Raises UserError for a file that cannot be read."""
    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                return dict(image.text)
        with av.open(str(path)) as container:
            return dict(container.metadata)
    except (OSError, ValueError, av.FFmpegError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
