"""A contact sheet: one picture of many results, a row each with its words and three of its frames."""
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from vino_jax.sampling.video import read_frames, write_png

_SIDE, _GAP, _TEXT, _CHARACTERS = 192, 8, 320, 46  # pixels of a frame, between frames, of the words; characters of a line
_SHOWN = 3  # frames of a clip: the first, those evenly between, the last


def write_sheet(path: Path, rows: Sequence[tuple[str, Path]]) -> None:
    """Write a png with a row for each (words, picture or clip). Raises UserError for a file that cannot be read."""
    sheet = Image.new("RGB", (_TEXT + _SHOWN * (_SIDE + _GAP), max(1, len(rows)) * (_SIDE + _GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (words, file) in enumerate(rows):
        top = i * (_SIDE + _GAP)
        lines = [line for part in words.split("\n") for line in textwrap.wrap(part, _CHARACTERS)]
        draw.multiline_text((_GAP, top + _GAP), "\n".join(lines[:_SIDE // 16]), fill="black")
        frames = read_frames(file)
        for j, at in enumerate(np.linspace(0, len(frames) - 1, min(_SHOWN, len(frames))).round().astype(int)):
            frame = Image.fromarray(frames[at])
            frame.thumbnail((_SIDE, _SIDE))
            sheet.paste(frame, (_TEXT + j * (_SIDE + _GAP), top + _GAP // 2))
    write_png(path, np.asarray(sheet), {})
