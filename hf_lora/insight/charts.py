"""Small charts as SVG text, for a page that needs no script and no other file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

from markupsafe import Markup, escape

from hf_lora._text import printable
from hf_lora.tasks.calibration import Bin

Point = tuple[float, float]

ACCENT, MUTED, INK, GRID, BAD = "#1d5fa8", "#98a2b3", "#344054", "#e4e7ec", "#c8553d"
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 14, 40


@dataclass(frozen=True)
class Series:
    """Points in the order of x, joined by a line; `dots` marks each."""

    name: str
    points: Sequence[Point]
    colour: str = ACCENT
    dots: bool = False
    dashed: bool = False


class _Frame:
    """A rectangle with axes: from numbers to places, and the pieces that were drawn."""

    def __init__(self, width: int, height: int, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.width, self.height, self.x_range, self.y_range = width, height, x, y
        self.pieces: list[str] = []

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(_LEFT + (value - low) / (high - low) * (self.width - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return round(self.height - _BOTTOM - (value - low) / (high - low) * (self.height - _TOP - _BOTTOM), 1)

    def line(self, start: Point, end: Point, colour: str = GRID, extra: str = "") -> None:
        (x1, y1), (x2, y2) = ((self.x(px), self.y(py)) for px, py in (start, end))
        self.pieces.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" {extra}/>')

    def text(self, x: float, y: float, words: str, anchor: str = "middle", extra: str = "") -> None:
        shown = escape(printable(words))
        self.pieces.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" {extra}>{shown}</text>')

    def axes(self, x_name: str, y_name: str, x_ticks: Iterable[float], y_ticks: Iterable[float]) -> None:
        for tick in y_ticks:
            self.line((self.x_range[0], tick), (self.x_range[1], tick))
            self.text(_LEFT - 8, self.y(tick) + 4, f"{tick:g}", "end")
        for tick in x_ticks:
            self.text(self.x(tick), self.height - _BOTTOM + 17, f"{tick:g}")
        middle = (_LEFT + self.width - _RIGHT) / 2, (_TOP + self.height - _BOTTOM) / 2
        self.text(middle[0], self.height - 5, x_name, extra='class="axis"')
        turn = f'class="axis" transform="rotate(-90 13 {middle[1]})"'
        self.text(13, middle[1], y_name, extra=turn)

    def curve(self, series: Series) -> None:
        places = [(self.x(x), self.y(y)) for x, y in series.points]
        dash = 'stroke-dasharray="5 4" ' if series.dashed else ""
        path = " ".join(f"{x},{y}" for x, y in places)
        self.pieces.append(
            f'<polyline points="{path}" fill="none" stroke="{series.colour}" stroke-width="2" {dash}/>'
        )
        if series.dots or len(places) == 1:
            self.pieces += [f'<circle cx="{x}" cy="{y}" r="3" fill="{series.colour}"/>' for x, y in places]

    def done(self, description: str) -> Markup:
        return Markup(
            f'<svg viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}" '
            f'role="img" aria-label="{escape(printable(description))}">{"".join(self.pieces)}</svg>'
        )


def line_chart(
    series: Sequence[Series],
    x_name: str,
    y_name: str,
    *,
    width: int = 720,
    height: int = 280,
    whole: bool = False,
) -> Markup:
    """Lines in one frame, y from 0. whole: x counts something, so that its ticks are whole numbers."""
    xs = [x for entry in series for x, _ in entry.points]
    ys = [y for entry in series for _, y in entry.points]
    x_range = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, min(xs) + 1)
    y_ticks = ticks(min(0.0, *ys), max(ys) or 1.0)
    frame = _Frame(width, height, x_range, (y_ticks[0], y_ticks[-1]))
    x_ticks = [tick for tick in ticks(*x_range, 4 if width < 400 else 8) if x_range[0] <= tick <= x_range[1]]
    frame.axes(x_name, y_name, [tick for tick in x_ticks if not whole or tick == round(tick)], y_ticks)
    for entry in series:
        frame.curve(entry)
    return frame.done(f"{y_name} by {x_name}: {', '.join(entry.name for entry in series)}")


def reliability_diagram(bins: Sequence[Bin], *, size: int = 340) -> Markup:
    """Accuracy by confidence: a bar for each bin, as strong as it has examples; on the diagonal it is calibrated."""
    frame = _Frame(size, size, (0.0, 1.0), (0.0, 1.0))
    unit = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    frame.axes("confidence", "accuracy", unit, unit)
    most = max((entry.count for entry in bins), default=1)
    for entry in bins:
        left, top = frame.x(entry.low), frame.y(entry.accuracy)
        width, height = frame.x(entry.high) - left - 1, frame.y(0) - top
        strength = 0.3 + 0.7 * entry.count / most
        words = f"{entry.count} with confidence {entry.confidence:.3f}, accuracy {entry.accuracy:.3f}"
        frame.pieces.append(
            f'<rect x="{left + 0.5:.1f}" y="{top}" width="{width:.1f}" height="{max(height, 1.5):.1f}" '
            f'fill="{ACCENT}" fill-opacity="{strength:.2f}"><title>{words}</title></rect>'
        )
        gap = (entry.confidence, entry.accuracy), (entry.confidence, entry.confidence)
        frame.line(*gap, BAD, 'stroke-width="2"')
    frame.line((0, 0), (1, 1), INK, 'stroke-dasharray="4 4"')
    return frame.done("reliability diagram: accuracy by confidence")


def scatter(points: Sequence[Point], x_name: str, y_name: str, *, size: int = 380) -> Markup:
    """Points in a square whose diagonal is x = y."""
    values = [value for point in points for value in point]
    marks = ticks(min(values), max(values))
    frame = _Frame(size, size, (marks[0], marks[-1]), (marks[0], marks[-1]))
    frame.axes(x_name, y_name, marks, marks)
    frame.line((marks[0], marks[0]), (marks[-1], marks[-1]), INK, 'stroke-dasharray="4 4"')
    frame.pieces += [
        f'<circle cx="{frame.x(x)}" cy="{frame.y(y)}" r="2.5" fill="{ACCENT}" fill-opacity="0.5"/>'
        for x, y in points
    ]
    return frame.done(f"{y_name} by {x_name}")


def shades(count: int) -> list[str]:
    """Colours from light to dark, for layers from the first to the last."""
    light, dark = (176, 206, 235), (16, 52, 96)
    steps = [index / max(1, count - 1) for index in range(count)]
    return [
        "#" + "".join(f"{round(a + (b - a) * step):02x}" for a, b in zip(light, dark, strict=True))
        for step in steps
    ]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from at most `low` to at least `high`, steps of 1, 2 or 5 times a power of ten."""
    assert isfinite(low) and isfinite(high)
    span = (high - low) or abs(high) or 1.0
    size = 10.0 ** floor(log10(span / most))
    step = next(size * factor for factor in (1, 2, 5, 10) if span / (size * factor) <= most)
    first, last = floor(low / step), ceil(high / step)
    return [float(f"{step * index:.10g}") for index in range(first, max(last, first + 1) + 1)]
