"""What the runs of a sweep or of a learning curve say together: means, the choice, tables, JSON and pictures."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from hf_lora._files import write_text, writing
from hf_lora._text import printable
from hf_lora.recipe.grid import TEST, VALIDATION, Point, Scores

logger = logging.getLogger(__name__)

LOWER_IS_BETTER = ("loss", "mse", "rmse")
LORA, SIZE = "LoRA", "trainable_parameters"
# The lines of a curve, and how the keys of what they measure end in metrics.json.
LINES = {LORA: "", "linear probe": "_probe", "majority class": "_majority"}
FORMATS = {".png": "Software", ".svg": "Date", ".pdf": "CreationDate"}
_GREY, _RED = "#98a2b3", "#c8553d"
_STYLES: dict[str, dict[str, Any]] = {
    LORA: {"color": "#1d5fa8", "marker": "o", "linewidth": 2.2, "zorder": 4},
    "linear probe": {"color": _RED, "marker": "s", "linestyle": "--", "markersize": 5},
    "majority class": {"color": _GREY, "linestyle": ":", "linewidth": 1.8},
}
# Labels of the x axis nearer to each other than this share of its length would overlap.
_NEAR = 0.09


@dataclass(frozen=True)
class Results:
    """What the points of a grid have measured, and on what. files: the report and the picture."""

    metric: str
    split: str
    measured_on: int
    data: str
    model: str
    seeds: Sequence[int]
    points: Sequence[Point]
    files: Sequence[Path] = ()

    @property
    def sign(self) -> float:
        """-1 where a lower metric is better."""
        return -1.0 if self.metric in LOWER_IS_BETTER else 1.0

    def _axes(self, width: float, x_label: str) -> Any:
        from matplotlib.figure import Figure

        axes = Figure(figsize=(width, 4.8), layout="constrained").subplots()
        axes.set_xscale("log")
        axes.set_xlabel(x_label)
        axes.set_ylabel(f"{self.metric} on the {self.split} data")
        axes.spines[["top", "right"]].set_visible(False)
        return axes


@dataclass(frozen=True)
class Sweep(Results):
    """Settings with their scores on the validation data, and on the test data where there are any; the choice."""

    @cached_property
    def best(self) -> Point:
        """The setting of the best mean; the smaller one of two that are equal."""
        return max(self.points, key=lambda entry: (self.sign * entry.mean, -entry.facts[SIZE]))

    @cached_property
    def noise(self) -> tuple[float, str]:
        """How far below the best mean a setting may be to count as equally good, and how that was found.

        One standard error of the difference between two means; with one seed that of the best score.
        """
        scores, seeds = self.best.lines[VALIDATION], len(self.seeds)
        if scores.spread is not None:
            # The spread of the other setting is left out: an unsteady one would count as good for that alone.
            return (
                math.sqrt(2 / seeds) * scores.spread,
                f"one standard error of the difference between two means over {seeds} seeds, if both are as steady "
                f"as the best: sqrt(2 / {seeds}) times its spread",
            )
        if self.metric != "accuracy":
            return 0.0, f"unknown: one seed tells nothing of the noise of {self.metric}; give --seeds 3"
        # Of a share of right answers it is known without a second seed.
        return (
            math.sqrt(scores.mean * (1 - scores.mean) / self.measured_on),
            f"the binomial standard error of the best score on {self.measured_on:,} examples, since there is one seed",
        )

    @cached_property
    def smallest(self) -> Point:
        """The fewest trainable parameters within noise of the best mean; of one size the better setting.

        The one-standard-error rule of CART: Breiman et al. 1984, section 3.4.3.
        """
        # Equal means, such as of 4 and 6 and of 5 and 5 right answers, differ by rounding.
        limit = self.sign * self.best.mean - self.noise[0] - 1e-12
        good = [entry for entry in self.points if self.sign * entry.mean >= limit]
        return min(good, key=lambda entry: (entry.facts[SIZE], -self.sign * entry.mean))

    def as_json(self) -> dict[str, Any]:
        """The contents of `sweep.json`."""
        return {
            "metric": self.metric,
            "lower_is_better": self.sign < 0,
            "validation_examples": self.measured_on,
            "noise": self.noise[0],
            "noise_rule": self.noise[1],
            "best": dict(self.best.setting),
            "smallest_within_noise": dict(self.smallest.setting),
            "settings": [
                {
                    **entry.setting,
                    **entry.facts,
                    **entry.lines[VALIDATION].as_json(),
                    "test_scores": dict(entry.lines.get(TEST, {})),
                    "seconds": entry.seconds,
                }
                for entry in self.points
            ],
        }

    def table(self) -> dict[str, list[Any]]:
        """The columns of the table by name; None where there is no value."""
        marks = {"best": self.best, "smallest within noise": self.smallest}
        rows = [
            {
                **entry.setting,
                "LoRA": entry.facts["lora_parameters"],
                "trainable": entry.facts[SIZE],
                "mean": entry.mean,
                "spread": entry.lines[VALIDATION].spread,
                "test mean": entry.lines[TEST].mean if TEST in entry.lines else None,
                "seconds": _seconds(entry),
                "": ", and ".join(mark for mark in marks if marks[mark] is entry) or None,
            }
            for entry in self.points
        ]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def figure(self) -> Any:
        """Score against trainable parameters: a line for each set of projections, spreads as error bars."""
        axes = self._axes(8, "trainable parameters (LoRA and head)")
        ordered = sorted(self.points, key=lambda entry: entry.facts[SIZE])
        sets = dict.fromkeys(entry.setting["projections"] for entry in self.points)
        for name, marker in zip(sets, itertools.cycle("osD^vP*X"), strict=False):
            line = [entry for entry in ordered if entry.setting["projections"] == name]
            sizes, scores = [e.facts[SIZE] for e in line], [e.lines[VALIDATION] for e in line]
            _draw(axes, sizes, scores, marker=marker, label=name)
        for entry in self.points:
            place, rank = (entry.facts[SIZE], entry.mean), f"r{entry.setting['rank']}"
            axes.annotate(rank, place, (5, 5), textcoords="offset points", fontsize=7)
        level, smallest = self.best.mean, self.smallest
        axes.axhspan(level - self.sign * self.noise[0], level, color=_GREY, alpha=0.35, lw=0)
        axes.axhline(level, color=_GREY, lw=1, label="within noise of the best")
        ring: dict[str, Any] = {"markersize": 15, "mfc": "none", "mec": _RED, "mew": 2, "linestyle": "none"}
        axes.plot(smallest.facts[SIZE], smallest.mean, "o", label=f"smallest: {in_words(smallest)}", **ring)
        for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            axis(lambda size, _: f"{size:,.0f}" if f"{size:.0e}"[0] in "1235" else "")
        seeds = len(self.seeds)
        title = f"mean of {seeds} seeds; bars: standard deviation" if seeds > 1 else "one seed"
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        return axes.figure


@dataclass(frozen=True)
class Curve(Results):
    """All sizes in order, with what each line has measured there."""

    @property
    def lines(self) -> list[str]:
        """The lines that have a value somewhere."""
        return [name for name in LINES if any(name in point.lines for point in self.points)]

    @property
    def seeds_in_words(self) -> str:
        """The seeds, for a title."""
        return f"{'seeds' if len(self.seeds) > 1 else 'seed'} {', '.join(map(str, self.seeds))}"

    def as_json(self) -> dict[str, Any]:
        """The contents of `curve.json`."""
        names = ("metric", "split", "measured_on", "data", "model", "seeds")
        return {name: getattr(self, name) for name in names} | {
            "lower_is_better": self.sign < 0,
            "sizes": [
                {
                    **point.setting,
                    **point.facts,
                    "seconds": point.seconds,
                    "lines": {name: scores.as_json() for name, scores in point.lines.items()},
                }
                for point in self.points
            ],
        }

    def table(self) -> dict[str, list[Any]]:
        """The columns of the table by name; None where there is no value."""
        columns: dict[str, list[Any]] = {
            "of each label": [point.setting["shots"] for point in self.points],
            "examples": [round(point.facts["examples"]) for point in self.points],
            "held out": [round(point.facts["held_out"]) or None for point in self.points],
        }
        for name in self.lines:
            found = [point.lines.get(name) for point in self.points]
            columns[name] = [scores and scores.mean for scores in found]
            columns[f"spread of {name}"] = [scores and scores.spread for scores in found]
        return columns | {"seconds": [_seconds(point) for point in self.points]}

    def figure(self) -> Any:
        """Every line against the examples, with the spread over the seeds as a band."""
        axes = self._axes(7.6, "labelled training examples (of each label), log scale")
        for name in self.lines:
            points = [point for point in self.points if name in point.lines]
            examples, scores = [p.facts["examples"] for p in points], [p.lines[name] for p in points]
            # One point makes no line to see.
            dot = {} if len(points) > 1 else {"marker": "D"}
            color = _draw(axes, examples, scores, label=name, **{**_STYLES[name], **dot})
            low, high = ([s.mean + sign * (s.spread or 0.0) for s in scores] for sign in (-1, 1))
            axes.fill_between(examples, low, high, color=color, alpha=0.15, linewidth=0)
        self._label_sizes(axes)
        axes.grid(axis="y", alpha=0.4)
        band = "; mean, and standard deviation as a band" if len(self.seeds) > 1 else ""
        model = self.model.rstrip("/").rpartition("/")[2]
        facts = f"{model}; {self.measured_on:,} {self.split} examples; {self.seeds_in_words}{band}"
        title = [textwrap.shorten(self.data, 60, placeholder=" ..."), *textwrap.wrap(printable(facts), 105)]
        # A dollar of a name is no mathematics.
        text = "\n".join(printable(line).replace("$", r"\$") for line in title)
        axes.set_title(text, loc="left", fontsize=9)
        # Below the axes: whatever the lines do, it hides none of them.
        axes.figure.legend(loc="outside lower center", ncols=len(self.lines), frameon=False)
        return axes.figure

    def _label_sizes(self, axes: Any) -> None:
        """Ticks at the sizes, the number of examples over that of each label; near ones one row lower in turn."""
        from matplotlib.ticker import NullLocator

        examples = [point.facts["examples"] for point in self.points]
        near = _NEAR * (math.log(examples[-1] / examples[0]) or 1.0)
        lower, labels = False, []
        for index, point in enumerate(self.points):
            lower = index > 0 and math.log(examples[index] / examples[index - 1]) < near and not lower
            each = f"{point.setting['shots']}{' each' * (point.setting['shots'] != 'all')}"
            labels.append("\n" * (2 * lower) + f"{examples[index]:,.0f}\n({each})")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(examples, labels, fontsize=9)


Report = TypeVar("Report", Sweep, Curve)


def write_report(found: Report, output: Path, picture: Path | None = None) -> Report:
    """Write the JSON report and the picture, whose ending is one of FORMATS; returns the results with `files`."""
    name = type(found).__name__.lower()
    report, picture = output / f"{name}.json", picture or output / f"{name}.png"
    write_text(report, json.dumps(found.as_json(), indent=2) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("no picture, since matplotlib is not installed; install it, and repeat the command")
        return replace(found, files=(report,))
    with writing(picture):
        picture.parent.mkdir(parents=True, exist_ok=True)
        # Without a date, so that the same runs give the same file.
        found.figure().savefig(picture, dpi=150, metadata={FORMATS[picture.suffix.lower()]: None})
    return replace(found, files=(report, picture))


def in_words(setting: Point) -> str:
    """A setting of a sweep, for people."""
    return "rank {rank} on {projections}".format(**setting.setting)


def _seconds(point: Point) -> str | None:
    return None if point.seconds is None else f"{point.seconds:.1f}"


def _draw(axes: Any, x: Sequence[float], scores: Sequence[Scores], **style: Any) -> Any:
    """A line with the spreads as error bars; returns its colour."""
    means, spreads = [entry.mean for entry in scores], [entry.spread or 0.0 for entry in scores]
    drawn = axes.errorbar(x, means, yerr=spreads if any(spreads) else None, capsize=3, **style)
    return drawn[0].get_color()
