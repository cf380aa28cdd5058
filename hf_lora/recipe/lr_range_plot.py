"""The picture of a learning-rate range test: losses against the rate, and what it suggests."""

from __future__ import annotations

from collections.abc import Sequence

from hf_lora.insight.curves import as_png

_LOSS, _INK = "#4a6fa5", "#c1666b"


def range_picture(
    rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], suggestion: float | None
) -> bytes | None:
    """A PNG; None where matplotlib is not installed. suggestion: the rate to mark, if there is one."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color=_LOSS, alpha=0.3, linewidth=1, label="loss of each step")
    axes.plot(rates, smoothed, color=_LOSS, linewidth=2, label="smoothed")
    axes.set_xscale("log")
    axes.set_xlim(rates[0], rates[-1])
    # Single losses beyond what is smoothed would press the rest of the picture flat.
    span = max(smoothed) - min(smoothed) or 1.0
    axes.set_ylim(
        max(min(losses), min(smoothed) - 0.5 * span) - 0.05 * span,
        min(max(losses), max(smoothed) + 0.5 * span) + 0.05 * span,
    )
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    if suggestion is not None:
        axes.axvline(
            suggestion, color=_INK, linestyle="--", linewidth=1.5, label=f"suggestion: {suggestion:g}"
        )
    axes.grid(alpha=0.3)
    # Above the axes: inside, it would lie on one of the curves in some tests.
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return as_png(figure)
