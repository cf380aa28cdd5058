"""Pictures: the heat maps of `hf-lora inspect --plot`, and the charts of a report. Needs matplotlib."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_lora._files import writing
from hf_lora.insight.inspect import Comparison, Grid, Update, grid_of
from hf_lora.insight.report import History
from hf_lora.tasks.calibration import Reliability

ACCENT, MUTED, INK, GRID, BAD = "#1d5fa8", "#98a2b3", "#344054", "#e4e7ec", "#c8553d"
# Larger grids have cells too small for numbers.
_MOST_ROWS, _MOST_RANKS = 40, 16
_MOST_COMPARED = 4
_MOST_DOTS = 5000


def plot_inspection(
    title: str, updates: Sequence[Update], compared: Sequence[Comparison], path: Path
) -> None:
    """Draw heat maps side by side, and below them phi of some compared updates; write the file."""
    grid = grid_of(updates)
    cells = np.array([list(row.values()) for row in grid.values()], object)
    panels = {
        "norm of ΔW": ("spectrum", "norm", 1),
        "norm of ΔW, in % of that of W": ("amplification", "relative", 100),
        "effective rank of ΔW": ("spectrum", "effective_rank", 1),
        "amplification factor": ("amplification", "factor", 1),
    }
    drawn: dict[str, np.ndarray] = {}
    for name, (holder, key, scale) in panels.items():
        found = [getattr(getattr(update, holder, None), key, None) for update in cells.flat]
        if any(value is not None for value in found):
            drawn[name] = scale * np.array(found, float).reshape(cells.shape)
    columns = max(len(drawn), min(len(compared), _MOST_COMPARED))
    heights = [1.4 + 0.34 * max(3, len(grid)), *([2.9, 2.9] if compared else [])]
    width = max(3.1, 0.9 * cells.shape[1] + 1.2) * columns
    figure = Figure(figsize=(width, sum(heights) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold", parse_math=False)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = parts[0].subplots(1, len(drawn), squeeze=False)[0]
    for place, (name, values) in zip(axes, drawn.items(), strict=True):
        _draw_panel(place, grid, name, values)
    for part, side in zip(parts[1:], "AB", strict=False):
        _draw_similarities(part, side, _strongest(compared))
    with writing(path):
        figure.savefig(path, dpi=150)


def loss_chart(history: History) -> str:
    """The losses by step, as the address of an SVG."""
    figure, axes = _chart(1000, 280, "step", "loss")
    for name, points, style in (
        ("training loss", history.training, {"color": ACCENT}),
        ("validation loss", history.validation, {"color": BAD, "linestyle": "--", "marker": "o"}),
    ):
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, labelcolor=INK)
    return _address(figure)


def reliability_chart(reliability: Reliability) -> str:
    """Accuracy by confidence: a bar for each bin, darker with more predictions; red: the distance to confidence."""
    figure, axes = _chart(340, 340, "confidence", "accuracy")
    most = max((entry.count for entry in reliability.bins), default=1)
    for entry in reliability.bins:
        strength = 0.3 + 0.7 * entry.count / most
        width = entry.high - entry.low
        axes.bar(entry.low, entry.accuracy, width, align="edge", color=ACCENT, alpha=strength, ec="white")
        axes.plot([entry.confidence] * 2, [entry.accuracy, entry.confidence], color=BAD)
    axes.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    return _address(figure)


def prediction_chart(points: Sequence[tuple[float, float]]) -> str:
    """Predicted by true value; on the dashed diagonal they are equal."""
    figure, axes = _chart(380, 380, "true value", "predicted")
    some = np.array(points)[:: -(-len(points) // _MOST_DOTS)]
    axes.axline((some.min(), some.min()), slope=1, color=INK, linestyle="--", linewidth=1)
    axes.scatter(*some.T, s=14, color=ACCENT, alpha=0.5, linewidths=0)
    return _address(figure)


def spectrum_chart(lines: Sequence[Sequence[float]], top: float) -> str:
    """Singular values by index, up to `top`: a line for each layer, from light to dark."""
    figure, axes = _chart(230, 200, "index", "value")
    colours = matplotlib.colormaps["Blues"](np.linspace(0.35, 1, len(lines)))
    for values, colour in zip(lines, colours, strict=True):
        axes.plot(range(1, 1 + len(values)), values, color=colour, marker="o" if len(values) == 1 else "")
    axes.set_ylim(0, 1.05 * top)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return _address(figure)


def _chart(width: int, height: int, x_name: str, y_name: str) -> tuple[Figure, Any]:
    """A figure of this size in pixels of a page, and its axes."""
    figure = Figure(figsize=(width / 96, height / 96), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_name, color=INK, fontsize=9)
    axes.set_ylabel(y_name, color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    return figure, axes


def _address(figure: Figure) -> str:
    """The figure as the `data:` address of an SVG: the same for the same figure, since it has no date."""
    stream = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "hf_lora", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{b64encode(stream.getvalue()).decode()}"


def _draw_panel(axes: Any, grid: Grid, title: str, values: np.ndarray) -> None:
    top = np.nanmax([*values.flat, 1e-12])
    image = _heat_map(axes, values, "viridis", top, size=8 if len(grid) <= _MOST_ROWS else None)
    columns = list(next(iter(grid.values())))
    turn = {"rotation": 35, "ha": "right"} if max(map(len, columns)) > 8 else {}
    axes.set_xticks(range(len(columns)), columns, parse_math=False, **turn)
    axes.set_yticks(range(len(grid)), list(grid), parse_math=False)
    if all(name.isdigit() for name in grid):
        axes.set_ylabel("layer")
    axes.set_title(title, fontsize=10)
    axes.set_aspect("auto")
    _add_scale(axes.figure, image, axes)


def _draw_similarities(part: Any, side: str, compared: Sequence[Comparison]) -> None:
    space = {"A": "inputs", "B": "outputs"}[side]
    part.suptitle(f"subspace similarity φ(i, j) of {side}, in the space of the {space}", fontsize=10)
    axes = part.subplots(1, len(compared), squeeze=False)[0]
    image = None
    for place, comparison in zip(axes, compared, strict=True):
        values, update = comparison.phi[side].numpy(), comparison.update
        title = update.role_name if update.layer is None else f"layer {update.layer}, {update.role_name}"
        place.set_title(title, fontsize=9, parse_math=False)
        if not values.size:
            place.text(0.5, 0.5, "an update of zero\nhas no directions", ha="center", va="center", fontsize=8)
            place.set(xticks=[], yticks=[])
            continue
        image = _heat_map(place, values, "magma", 1, size=6 if max(values.shape) <= _MOST_RANKS else None)
        for ticks, count in zip((place.set_yticks, place.set_xticks), values.shape, strict=True):
            shown = range(0, count, max(1, count // 8))
            ticks(shown, [str(index + 1) for index in shown], fontsize=7)
        place.set_xlabel("j, of the other adapter", fontsize=8)
        place.set_ylabel("i, of this adapter", fontsize=8)
    if image is not None:
        _add_scale(part, image, list(axes))


def _heat_map(axes: Any, values: np.ndarray, colours: str, top: float, size: int | None) -> Any:
    """The image of the values from 0 to `top`, with numbers of a font size in the cells; None: without them."""
    image = axes.imshow(values, cmap=colours, vmin=0, vmax=top)
    for (row, column), value in np.ndenumerate(values):
        if size and np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            text = f"{value:.2f}".removeprefix("0") if abs(value) < 10 else f"{value:.0f}"
            style = {"ha": "center", "va": "center", "fontsize": size, "color": "white" if dark else "black"}
            axes.text(column, row, text, **style)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def _add_scale(part: Any, image: Any, axes: Any) -> None:
    part.colorbar(image, ax=axes, shrink=0.85, aspect=25).outline.set_visible(False)


def _strongest(compared: Sequence[Comparison]) -> list[Comparison]:
    """The pair with the largest update of each role, in the order of the network."""
    best: dict[str, Comparison] = {}
    for entry in sorted(compared, key=lambda entry: -entry.update.spectrum.norm):
        best.setdefault(entry.update.role_name, entry)
    chosen = list(best.values())[:_MOST_COMPARED]
    return [entry for entry in compared if entry in chosen]
