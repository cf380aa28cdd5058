"""The picture of `hf-lora curve`: a metric against the number of labelled examples."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_lora._files import writing
from hf_lora._text import printable
from hf_lora.recipe.learning_curve import LORA, Curve, Point, Scores

ACCENT, MUTED, INK, GRID, BAD = "#1d5fa8", "#98a2b3", "#344054", "#e4e7ec", "#c8553d"
FORMATS = (".png", ".svg", ".pdf")
_STYLES: dict[str, dict[str, Any]] = {
    LORA: {"color": ACCENT, "marker": "o", "linewidth": 2.2, "markersize": 6, "zorder": 4},
    "linear probe": {"color": BAD, "marker": "s", "linestyle": "--", "linewidth": 1.6, "markersize": 5},
    "majority class": {"color": MUTED, "marker": "", "linestyle": ":", "linewidth": 1.8},
}
# Labels of the x axis nearer to each other than this share of its length would overlap.
_NEAR = 0.09
# Characters of a line above the axes.
_WIDTH = 105


def check_picture(path: Path) -> None:
    """Raise ValueError for a file that cannot become a picture, before hours are spent."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"plot is no picture; got {str(path)!r}; expected a file ending in {', '.join(FORMATS)}"
        )


def plot_curve(curve: Curve, path: Path) -> None:
    """Draw every line with the spread over the seeds as a band; write the file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.8), layout="constrained")
    axes = figure.subplots()
    for name in curve.lines:
        found = [(point.examples, point.lines[name]) for point in curve.points if name in point.lines]
        _draw_line(axes, name, found)
    _label_sizes(axes, curve.points)
    axes.set_ylabel(f"{curve.metric} on the {curve.split} data", color=INK)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK)
    lines = _subtitle(curve)
    axes.set_title(
        _text(textwrap.shorten(curve.data, 60, placeholder=" ...")),
        loc="left",
        pad=8 + 13 * len(lines),
        fontsize=13,
        fontweight="bold",
        color=INK,
    )
    axes.annotate(
        "\n".join(lines), (0, 1), (0, 7), "axes fraction", textcoords="offset points", fontsize=9, color=INK
    )
    # Below the axes: whatever the lines do, it hides none of them.
    figure.legend(loc="outside lower center", ncols=len(curve.lines), frameon=False, labelcolor=INK)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without a date, so that the same runs give the same file.
        figure.savefig(path, dpi=150, metadata=_undated(path))


def _draw_line(axes: Any, name: str, found: Sequence[tuple[float, Scores]]) -> None:
    examples, means = [x for x, _ in found], [scores.mean for _, scores in found]
    style = _STYLES[name] if len(found) > 1 else {**_STYLES[name], "marker": _STYLES[name]["marker"] or "D"}
    axes.plot(examples, means, label=name, **style)
    spreads = [scores.spread or 0.0 for _, scores in found]
    if not any(spreads):
        return
    low, high = ([mean + sign * s for mean, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
    axes.fill_between(examples, low, high, color=style["color"], alpha=0.15, linewidth=0)
    if name == LORA or len(found) == 1:
        axes.errorbar(
            examples, means, yerr=spreads, fmt="none", ecolor=style["color"], elinewidth=1.2, capsize=3
        )


def _label_sizes(axes: Any, points: Sequence[Point]) -> None:
    """Ticks at the sizes, the number of examples over that of each label; near ones one row lower in turn."""
    from matplotlib.ticker import NullLocator

    places = [math.log(point.examples) for point in points]
    length = (max(places) - min(places)) or 1.0
    lower, labels = False, []
    for index, point in enumerate(points):
        near = index > 0 and places[index] - places[index - 1] < _NEAR * length
        lower = near and not lower
        each = point.size.name if point.size.shots is None else f"{point.size.name} each"
        labels.append("\n" * (2 * lower) + f"{point.examples:,.0f}\n({each})")
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks([point.examples for point in points], labels, fontsize=9)
    axes.set_xlabel("labelled training examples (of each label), log scale", color=INK)


def _subtitle(curve: Curve) -> list[str]:
    band = "; mean, and standard deviation as a band" if len(curve.seeds) > 1 else ""
    model = curve.model.rstrip("/").rpartition("/")[2]
    facts = f"{model}; {curve.measured_on:,} {curve.split} examples; {curve.seeds_in_words}{band}"
    return [_text(line) for line in textwrap.wrap(printable(facts), _WIDTH)]


def _text(name: str) -> str:
    """A name of others as it is: no control characters, no mathematics between dollars."""
    return printable(name).replace("$", r"\$")


def _undated(path: Path) -> dict[str, None]:
    key = {".png": "Software", ".svg": "Date", ".pdf": "CreationDate"}[path.suffix.lower()]
    return {key: None}
