"""The pictures of the MNIST demonstration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

BARS = {
    "wrong_before": ("before", "#9aa5b1"),
    "wrong_after": ("after LoRA", "#d1495b"),
    "wrong_disabled": ("LoRA disabled", "#00798c"),
}


def plot_errors(result: Mapping[str, Any], path: Path) -> None:
    """Grouped bars: errors by digit before, after, and with LoRA disabled; the chosen digits are marked."""
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for index, (key, (label, colour)) in enumerate(BARS.items()):
        bars = axes.bar(
            [digit + (index - 1) * 0.27 for digit in range(10)], result[key], 0.25, label=label, color=colour
        )
        axes.bar_label(bars, fontsize=6.5, padding=1)
    axes.set_xticks(range(10), [f"{d}\nchosen" if d in result["chosen"] else str(d) for d in range(10)])
    axes.set_ylabel("images classified wrongly")
    axes.set_xlabel("digit")
    axes.set_title(
        f"{result['network']}: rank {result['rank']}, {result['lora_parameters']:,} of "
        f"{result['parameters']:,} parameters; accuracy {result['accuracy_before']:.3f} before, "
        f"{result['accuracy_after']:.3f} after",
        fontsize=10,
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_ranks(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy on the chosen and on the other digits against the rank, with the levels before adapting."""
    ranks = [result["rank"] for result in results]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for part, name, colour in (("chosen", "chosen", "#d1495b"), ("others", "other", "#00798c")):
        after = [result[f"accuracy_{part}"]["after"] for result in results]
        axes.plot(ranks, after, "o-", color=colour, label=f"{name} digits, after")
        before = results[0][f"accuracy_{part}"]["before"]
        axes.axhline(before, color=colour, linestyle=":", label=f"{name} digits, before")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.set_xlabel("rank")
    axes.set_ylabel("accuracy")
    axes.set_title(f"{results[0]['network']}: what a higher rank learns and forgets", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)
