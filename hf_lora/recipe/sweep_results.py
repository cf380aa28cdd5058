"""What the runs of a sweep say together: means, spreads, noise, and the smallest setting that is good enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_lora.recipe.run_series import LOWER_IS_BETTER, SHARE, spread_of


@dataclass(frozen=True)
class Result:
    """One setting: its size, and what was measured with each seed."""

    rank: int
    projections: str
    lora_parameters: int
    trainable_parameters: int
    scores: Mapping[int, float]
    """The metric on the validation data by seed."""
    test_scores: Mapping[int, float] = field(default_factory=dict)
    seconds: float | None = None
    """Mean training time of the runs that were trained in one go; None where there is none."""

    @property
    def name(self) -> str:
        """The setting in words."""
        return f"rank {self.rank} on {self.projections}"

    @property
    def mean(self) -> float:
        """Mean score over the seeds."""
        return fmean(self.scores.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None with one seed."""
        return spread_of(self.scores)


@dataclass(frozen=True)
class Noise:
    """How far below the best mean a setting may be to count as equally good, and how that was found."""

    value: float
    rule: str


@dataclass(frozen=True)
class Choice:
    """The best setting, and the smallest whose mean is within noise of it."""

    best: Result
    smallest: Result
    noise: Noise


def noise_of(best: Result, metric: str, examples: int) -> Noise:
    """One standard error of the difference between two settings' means; with one seed that of the best score.

    examples: how many the metric was measured on.
    """
    seeds = len(best.scores)
    if best.spread is not None:
        # The spread of the other setting is left out: one that is unsteady would count as good for that alone.
        return Noise(
            math.sqrt(2 / seeds) * best.spread,
            f"one standard error of the difference between two means over {seeds} seeds, if both are as steady as "
            f"the best: sqrt(2 / {seeds}) times its spread",
        )
    if metric == SHARE:
        return Noise(
            math.sqrt(best.mean * (1 - best.mean) / examples),
            f"the binomial standard error of the best score on {examples:,} examples, since there is one seed",
        )
    return Noise(0.0, f"unknown: one seed tells nothing of the noise of {metric}; give --seeds 3")


def choose(results: Sequence[Result], metric: str, examples: int) -> Choice:
    """The fewest trainable parameters within noise of the best mean (the one-standard-error rule of CART).

    Of settings of one size it is the better one. Breiman et al. 1984, section 3.4.3.
    """
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    best = max(results, key=lambda result: (sign * result.mean, -result.trainable_parameters))
    noise = noise_of(best, metric, examples)
    # Means that are equal, such as of 4 and 6 and of 5 and 5 right answers, differ by rounding.
    limit = sign * best.mean - noise.value - 1e-12
    good = [result for result in results if sign * result.mean >= limit]
    smallest = min(good, key=lambda result: (result.trainable_parameters, -sign * result.mean))
    return Choice(best, smallest, noise)


def as_json(results: Sequence[Result], choice: Choice, metric: str, examples: int) -> dict[str, Any]:
    """The contents of `sweep.json`."""
    return {
        "metric": metric,
        "lower_is_better": metric in LOWER_IS_BETTER,
        "validation_examples": examples,
        "noise": choice.noise.value,
        "noise_rule": choice.noise.rule,
        "best": {"rank": choice.best.rank, "projections": choice.best.projections},
        "smallest_within_noise": {
            "rank": choice.smallest.rank,
            "projections": choice.smallest.projections,
        },
        "settings": [
            {
                "rank": result.rank,
                "projections": result.projections,
                "lora_parameters": result.lora_parameters,
                "trainable_parameters": result.trainable_parameters,
                "mean": result.mean,
                "spread": result.spread,
                "scores": {str(seed): score for seed, score in result.scores.items()},
                "test_scores": {str(seed): score for seed, score in result.test_scores.items()},
                "seconds": result.seconds,
            }
            for result in results
        ],
    }


def table_rows(results: Sequence[Result], choice: Choice) -> tuple[list[str], list[list[Any]]]:
    """Column names and rows of the sweep's table; a column without any value is left out."""
    columns: dict[str, list[Any]] = {
        "rank": [result.rank for result in results],
        "projections": [result.projections for result in results],
        "LoRA": [result.lora_parameters for result in results],
        "trainable": [result.trainable_parameters for result in results],
        "mean": [result.mean for result in results],
        "spread": [result.spread for result in results],
        "test mean": [fmean(r.test_scores.values()) if r.test_scores else None for r in results],
        "seconds": [None if r.seconds is None else f"{r.seconds:.1f}" for r in results],
        "": [_mark(result, choice) for result in results],
    }
    kept = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    return list(kept), [list(row) for row in zip(*kept.values(), strict=True)]


def _mark(result: Result, choice: Choice) -> str | None:
    marks = {"best": choice.best, "smallest within noise": choice.smallest}
    return ", and ".join(mark for mark, marked in marks.items() if marked is result) or None


def plot(results: Sequence[Result], choice: Choice, metric: str, path: Path) -> None:
    """Score against trainable parameters: one line for each set of projections, with the spread as error bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    sets = list(dict.fromkeys(result.projections for result in results))
    for index, projections in enumerate(sets):
        line = sorted((r for r in results if r.projections == projections), key=lambda r: r.rank)
        sizes = [result.trainable_parameters for result in line]
        axes.errorbar(
            sizes,
            [result.mean for result in line],
            yerr=[result.spread or 0.0 for result in line],
            marker="osD^vP*X"[index % 8],
            capsize=3,
            label=projections,
        )
        for result, size in zip(line, sizes, strict=True):
            axes.annotate(
                f"r{result.rank}", (size, result.mean), (5, 5), textcoords="offset points", fontsize=7
            )
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    level = choice.best.mean
    axes.axhspan(level - sign * choice.noise.value, level, color="#9aa5b1", alpha=0.35, lw=0)
    axes.axhline(level, color="#9aa5b1", lw=1, label="within noise of the best")
    axes.plot(
        choice.smallest.trainable_parameters,
        choice.smallest.mean,
        "o",
        markersize=15,
        markerfacecolor="none",
        markeredgecolor="#d1495b",
        markeredgewidth=2,
        linestyle="none",
        label=f"smallest: {choice.smallest.name}",
    )
    axes.set_xscale("log")
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis(lambda size, _: f"{size:,.0f}" if f"{size:.0e}"[0] in "1235" else "")
    axes.set_xlabel("trainable parameters (LoRA and head)")
    axes.set_ylabel(f"{metric} on the validation data")
    seeds = len(choice.best.scores)
    axes.set_title(
        f"mean of {seeds} seeds; bars: standard deviation" if seeds > 1 else "one seed", fontsize=10
    )
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
