"""Line charts as inline SVG, drawn by hand: no library, no network."""
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]
LABELS = {"trained": "trained", "base": "untrained base", "no_stage1": "stage 1 skipped"}
COLOURS = ("#1f6feb", "#d9822b", "#8250df", "#1a7f37")
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 22, 34  # margins in SVG units


@dataclass(frozen=True)
class Line:
    """One curve: a name for the legend, its points by x, a colour; faint: drawn thin and pale, without legend."""

    name: str
    points: Points
    colour: str
    faint: bool = False
    dashed: bool = False


def label(name: str) -> str:
    """How a checkpoint or a run is called in words."""
    return LABELS.get(name, name.replace("_", " "))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) within low..high."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10.0 ** math.floor(math.log10(span / count))
    step *= next(m for m in (1, 2, 5, 10) if span / (m * step) <= count + 0.5)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def smooth(points: Points, window: int) -> list[tuple[float, float]]:
    """Mean over the `window` points around each."""
    half, values = window // 2, [y for _, y in points]
    out = []
    for i, (x, _) in enumerate(points):
        near = values[max(0, i - half):i + half + 1]
        out.append((x, sum(near) / len(near)))
    return out


def line_chart(lines: Sequence[Line], *, x_name: str, y_name: str, size: tuple[int, int] = (520, 240),
               marks: Mapping[float, str] | None = None, from_zero: bool = False) -> str:
    """An <svg>. marks: x -> words at a vertical line there. Without any point: a chart that says so."""
    width, height = size
    every = [p for line in lines for p in line.points if math.isfinite(p[1])]
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y_name)} by {escape(x_name)}">'
    if not every:
        return f'{head}<text x="{width / 2}" y="{height / 2}" class="axis" text-anchor="middle">no data</text></svg>'
    low_x, high_x = min(p[0] for p in every), max(p[0] for p in every)
    low_y, high_y = min(p[1] for p in every), max(p[1] for p in every)
    if from_zero:
        low_y = min(0.0, low_y)
    pad = 0.06 * (high_y - low_y) or 0.1 * abs(high_y) or 1.0
    low_y, high_y = low_y - (0 if from_zero and low_y == 0 else pad), high_y + pad
    if low_x == high_x:
        low_x, high_x = low_x - 1, high_x + 1

    def place(x: float, y: float) -> tuple[float, float]:
        return (_LEFT + (x - low_x) / (high_x - low_x) * (width - _LEFT - _RIGHT),
                height - _BOTTOM - (y - low_y) / (high_y - low_y) * (height - _TOP - _BOTTOM))

    parts = [head]
    for y in ticks(low_y, high_y):
        at = place(low_x, y)[1]
        parts.append(f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>'
                     f'<text x="{_LEFT - 6}" y="{at + 3.5:.1f}" class="axis" text-anchor="end">{y:g}</text>')
    for x in ticks(low_x, high_x, 8):
        parts.append(f'<text x="{place(x, low_y)[0]:.1f}" y="{height - _BOTTOM + 15}" class="axis" text-anchor="middle">{x:g}</text>')
    for x, words in (marks or {}).items():
        at = place(min(max(x, low_x), high_x), low_y)[0]
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP - 6}" y2="{height - _BOTTOM}" class="mark"/>'
                     f'<text x="{at + 4:.1f}" y="{_TOP - 9}" class="axis">{escape(words)}</text>')
    parts += [_curve(line, place) for line in lines]
    middle = f'class="axis" text-anchor="middle" transform="rotate(-90 12 {height / 2})"'
    parts.append(f'<text x="{(width + _LEFT) / 2}" y="{height - 4}" class="axis" text-anchor="middle">{escape(x_name)}</text>'
                 f'<text x="12" y="{height / 2}" {middle}>{escape(y_name)}</text></svg>')
    return "".join(parts)


def legend(lines: Sequence[Line]) -> str:
    """Names with their colours, as HTML."""
    named = [line for line in lines if not line.faint]
    names = (f'<span><i style="background:{line.colour}"></i>{escape(line.name)}</span>' for line in named)
    return f'<p class="legend">{"".join(names)}</p>'


def _curve(line: Line, place) -> str:
    points = [place(x, y) for x, y in line.points if math.isfinite(y)]
    if not points:
        return ""
    style = 'stroke-width="1" opacity="0.3"' if line.faint else 'stroke-width="2"' + (' stroke-dasharray="5 4"' if line.dashed else "")
    if len(points) == 1:
        return f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3" fill="{line.colour}"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-linejoin="round" {style}/>'
