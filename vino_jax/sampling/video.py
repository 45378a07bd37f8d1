"""Writing what was generated: png, mp4, latents. A file appears under its name only when it is whole."""
import contextlib
import os
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

FPS = 24  # SPEC 7
_CRF = "12"


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
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
    with _whole(path) as temporary:
        Image.fromarray(pixels).save(temporary, pnginfo=text)


def write_mp4(path: Path, pixels: np.ndarray, metadata: Mapping[str, str]) -> None:
    """One clip, uint8 (F, H, W, 3) with even H and W, 24 frames a second: libx264, yuv420p, crf 12; metadata as container tags."""
    _, height, width, _ = pixels.shape
    with _whole(path) as temporary:
        with av.open(str(temporary), "w", options={"movflags": "+faststart+use_metadata_tags"}) as container:
            container.metadata.update(metadata)
            stream = container.add_stream("libx264", rate=Fraction(FPS), options={"crf": _CRF})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for picture in pixels:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())


def output_path(directory: Path, index: str, frames: int) -> Path:
    """`<index>.png` for one frame, else `<index>.mp4`."""
    return directory / f"{index}{'.png' if frames == 1 else '.mp4'}"


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
    with _whole(path) as temporary:
        np.savez(temporary, latents=np.moveaxis(latents_BFHWC, -1, 1).astype(np.float32))
