"""The training curve as a picture: losses and accuracy by step, from the Trainer's log."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

# The lines of the picture: key in the log, name, and how it is drawn.
_LINES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("loss", "training loss", {"color": "#4a6fa5"}),
    ("eval_loss", "validation loss", {"color": "#c1666b", "marker": "o"}),
    ("eval_accuracy", "validation accuracy", {"color": "#48806a", "marker": "o", "linestyle": "--"}),
)


def training_curve(log_history: Sequence[Mapping[str, Any]]) -> bytes | None:
    """A PNG of the log; None where there are not two points to join, or matplotlib is not installed."""
    points = {
        key: [(entry["step"], entry[key]) for entry in log_history if key in entry] for key, _, _ in _LINES
    }
    if max(map(len, points.values())) < 2:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for key, name, style in _LINES:
        if points[key]:
            axes.plot(*zip(*points[key], strict=True), label=name, **style)
    axes.set_xlabel("optimizer step")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return as_png(figure)


def as_png(figure: Any) -> bytes:
    """A figure of matplotlib as a PNG, without a date, so that the same run gives the same file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    return picture.getvalue()
