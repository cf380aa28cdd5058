"""Pictures of `hf-lora inspect`: what each update does, by layer and role, and how similar two adapters are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from hf_lora._files import writing
from hf_lora.insight.inspect import Comparison, Grid

# Cells beyond these are too small for their numbers.
_MOST_ROWS, _MOST_RANKS = 40, 16
_MOST_COMPARED = 4


class Panel(NamedTuple):
    """One heat map: a number, or None, for each update."""

    title: str
    values: Sequence[float | None]


def plot_inspection(
    title: str, grid: Grid, panels: Sequence[Panel], compared: Sequence[Comparison], path: Path
) -> None:
    """Draw the panels side by side, and under them phi for some of the compared updates; writes a PNG."""
    columns = max(len(panels), min(len(compared), _MOST_COMPARED))
    above = 1.4 + 0.34 * max(3, len(grid.rows))
    heights = [above, 2.9, 2.9] if compared else [above]
    width = max(3.1, 0.9 * len(grid.columns) + 1.2) * columns
    figure = plt.figure(figsize=(width, sum(heights) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    parts = np.atleast_1d(figure.subfigures(len(heights), 1, height_ratios=heights))
    axes = parts[0].subplots(1, len(panels), squeeze=False)[0]
    for place, panel in zip(axes, panels, strict=True):
        _draw_panel(place, grid, panel)
    for part, side in zip(parts[1:], ("right", "left"), strict=False):
        _draw_similarities(part, side, _strongest(compared))
    with writing(path):
        figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_panel(axes: Any, grid: Grid, panel: Panel) -> None:
    def number(index: int | None) -> float:
        value = None if index is None else panel.values[index]
        return float("nan") if value is None else value

    values = np.array([[number(index) for index in row] for row in grid.cells])
    finite = values[np.isfinite(values)]
    image = axes.imshow(values, cmap="viridis", aspect="auto", vmin=0, vmax=finite.max(initial=1e-12))
    if len(grid.rows) <= _MOST_ROWS:
        _write_numbers(axes, image, values, size=8)
    long = max(map(len, grid.columns)) > 8
    axes.set_xticks(
        range(len(grid.columns)), grid.columns, rotation=35 if long else 0, ha="right" if long else "center"
    )
    axes.set_yticks(range(len(grid.rows)), grid.rows)
    if all(name.isdigit() for name in grid.rows):
        axes.set_ylabel("layer")
    axes.set_title(panel.title, fontsize=10)
    _bare(axes)
    axes.figure.colorbar(image, ax=axes, shrink=0.85, aspect=25).outline.set_visible(False)


def _draw_similarities(part: Any, side: str, compared: Sequence[Comparison]) -> None:
    factor, space = {"right": ("A", "inputs"), "left": ("B", "outputs")}[side]
    part.suptitle(f"subspace similarity φ(i, j) of {factor}, in the space of the {space}", fontsize=10)
    axes = part.subplots(1, len(compared), squeeze=False)[0]
    for place, comparison in zip(axes, compared, strict=True):
        values = getattr(comparison, side).numpy()
        update = comparison.update
        place.set_title(
            update.role_name if update.layer is None else f"layer {update.layer}, {update.role_name}",
            fontsize=9,
        )
        if not values.size:
            place.text(0.5, 0.5, "an update of zero\nhas no directions", ha="center", va="center", fontsize=8)
            place.set_xticks([])
            place.set_yticks([])
            continue
        image = place.imshow(values, cmap="magma", vmin=0, vmax=1, aspect="equal", origin="upper")
        if max(values.shape) <= _MOST_RANKS:
            _write_numbers(place, image, values, size=6)
        for ticks, count in ((place.set_yticks, values.shape[0]), (place.set_xticks, values.shape[1])):
            step = max(1, count // 8)
            ticks(range(0, count, step), [str(index + 1) for index in range(0, count, step)], fontsize=7)
        place.set_xlabel("j, of the other adapter", fontsize=8)
        place.set_ylabel("i, of this adapter", fontsize=8)
        _bare(place)
    if any(place.images for place in axes):
        image = next(place.images[0] for place in axes if place.images)
        part.colorbar(image, ax=list(axes), shrink=0.85, aspect=25).outline.set_visible(False)


def _write_numbers(axes: Any, image: Any, values: np.ndarray, size: int) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(
                column,
                row,
                _short(value),
                ha="center",
                va="center",
                fontsize=size,
                color="white" if dark else "black",
            )


def _short(value: float) -> str:
    """Three digits, without a zero before the point."""
    text = f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
    return text.removeprefix("0") if text.startswith("0.") and text != "0.00" else text


def _bare(axes: Any) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _strongest(compared: Sequence[Comparison]) -> list[Comparison]:
    """For each role the pair whose update is the largest, in the order of the network."""
    best: dict[str, Comparison] = {}
    for entry in compared:
        name = entry.update.role_name
        if name not in best or entry.update.spectrum.norm > best[name].update.spectrum.norm:
            best[name] = entry
    chosen = sorted(best.values(), key=lambda entry: -entry.update.spectrum.norm)[:_MOST_COMPARED]
    return [entry for entry in compared if any(entry is other for other in chosen)]
