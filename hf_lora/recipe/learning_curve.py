"""The curve of a metric against the number of labelled examples: a run for each size and seed.

Each seed draws examples of its own, and of one seed the smaller sets are parts of the larger ones. All are measured
on the same data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from datasets import DatasetDict

from hf_lora.data import ClassificationData, load_splits, prepare_data
from hf_lora.recipe.run_series import (
    LOWER_IS_BETTER,
    Run,
    RunSeries,
    each_once,
    measured,
    spread_of,
    whole_seconds,
    words_of,
)
from hf_lora.recipe.run_settings import data_config
from hf_lora.tasks.metrics import BASELINES

ALL = "all"
LORA = "LoRA"
# The lines of a curve, and how the keys of what they measure end in metrics.json.
LINES = {LORA: "", BASELINES["probe"]: "_probe", BASELINES["majority"]: "_majority"}


@dataclass(frozen=True)
class Size:
    """How many training examples of each label; None: all there are."""

    shots: int | None

    @property
    def name(self) -> str:
        """The size as in `--shots`."""
        return ALL if self.shots is None else str(self.shots)

    def __str__(self) -> str:
        return "all examples" if self.shots is None else f"{self.shots:,} of each label"


@dataclass(frozen=True)
class Scores:
    """What one line has measured at one size, by seed."""

    by_seed: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.by_seed.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None with one seed."""
        return spread_of(self.by_seed)


@dataclass(frozen=True)
class Point:
    """One size: its examples, the mean over the seeds, and what each line has measured there."""

    size: Size
    examples: float
    """Labelled examples: those trained on and those held out of the same draw."""
    held_out: float
    lines: Mapping[str, Scores]
    seconds: float | None


@dataclass(frozen=True)
class Curve:
    """All sizes in order, and on what they were measured."""

    metric: str
    split: str
    measured_on: int
    data: str
    model: str
    seeds: Sequence[int]
    points: Sequence[Point] = field(default_factory=list)

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
        plain = {**asdict(self), "seeds": list(self.seeds), "lower_is_better": self.metric in LOWER_IS_BETTER}
        del plain["points"]
        return {**plain, "sizes": [_point_as_json(point) for point in self.points]}

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Column names and rows; a column without any value is left out."""
        columns: dict[str, list[Any]] = {
            "of each label": [point.size.name for point in self.points],
            "examples": [round(point.examples) for point in self.points],
            "held out": [round(point.held_out) or None for point in self.points],
        }
        for name in self.lines:
            found = [point.lines.get(name) for point in self.points]
            columns[name] = [scores and scores.mean for scores in found]
            columns[f"spread of {name}"] = [scores and scores.spread for scores in found]
        columns["seconds"] = [None if p.seconds is None else f"{p.seconds:.1f}" for p in self.points]
        kept = {name: v for name, v in columns.items() if any(value is not None for value in v)}
        return list(kept), [list(row) for row in zip(*kept.values(), strict=True)]


class CurveRuns(RunSeries[Size]):
    """The runs of a curve and how to do them.

    train_argv: arguments of `hf-lora train`, which hold for all runs; `--seed` is the first seed. With a
    `--split_seed` all seeds draw the same examples.
    Raises ValueError for sizes that are not usable, and for arguments that a curve sets itself.
    """

    name = "a curve"
    not_for_runs: ClassVar[dict[str, str]] = {"few_shot": "use --shots", "max_train_samples": "use --shots"}

    def __init__(self, train_argv: Sequence[str], *, output: Path, shots: str, seeds: int) -> None:
        super().__init__(train_argv, output=output, seeds=seeds)
        self.sizes = parse_shots(shots)
        self.runs = [
            Run(size, seed, output / f"shots-{size.name}" / f"seed-{seed}")
            for size in self.sizes
            for seed in self.seeds
        ]
        self._prepared: tuple[Run[Size], ClassificationData] | None = None

    def flags(self, run: Run[Size]) -> list[str]:
        """The flag of `hf-lora train` that is the run's size."""
        return [] if run.setting.shots is None else ["--few_shot", str(run.setting.shots)]

    def data_of(self, run: Run[Size]) -> ClassificationData:
        """The run's own draw, and the validation and test data of all runs."""
        if self._prepared is None or self._prepared[0] != run:
            seed = self.data_args.split_seed
            config = replace(
                data_config(self.data_args, self.model_args, self.args),
                few_shot=run.setting.shots,
                seed=run.seed if seed is None else seed,
            )
            self._prepared = run, prepare_data(config, self.tokenizer, test_seed=self.seeds[0])
        return self._prepared[1]

    @cached_property
    def raw(self) -> DatasetDict:
        """The data as they are read."""
        return load_splits(data_config(self.data_args, self.model_args, self.args))

    def all_texts(self) -> DatasetDict:
        """The data as they are read, of which the seeds decide the draws."""
        return self.raw

    def curve(self, metric: str) -> Curve:
        """What the runs have measured. Raises ValueError where one has not measured `metric`."""
        split = measured_split(self.data_of(self.runs[0]))
        prefix = {"test": "test", "validation": "eval"}[split]
        return Curve(
            metric=metric,
            split=split,
            measured_on=self.runs[0].record["examples"][split],
            data=self.data_name,
            model=self.model_args.model_name_or_path,
            seeds=self.seeds,
            points=[self._point(size, f"{prefix}_{metric}") for size in self.sizes],
        )

    def _point(self, size: Size, key: str) -> Point:
        runs = [run for run in self.runs if run.setting == size]
        lines = {
            name: Scores(measured(runs, key + ending))
            for name, ending in LINES.items()
            if name == LORA or all(key + ending in run.metrics for run in runs)
        }
        examples = [run.record["examples"] for run in runs]
        held_out = fmean(0 if "validation" in self.raw else counts["validation"] for counts in examples)
        whole = whole_seconds(runs)
        return Point(
            size=size,
            examples=fmean(counts["train"] for counts in examples) + held_out,
            held_out=held_out,
            lines=lines,
            seconds=fmean(whole) if whole else None,
        )

    @property
    def data_name(self) -> str:
        """The data set as a person calls it: its Hub id, or the training file in its folder."""
        return self.data_args.dataset_name or "/".join(Path(self.data_args.train_file or "").parts[-2:])


def measured_split(data: ClassificationData) -> str:
    """The test split, or the validation split where there is no test split."""
    return "test" if "test" in data.splits else "validation"


def parse_shots(text: str) -> list[Size]:
    """`8,32,all` as sizes in order. Raises ValueError for other words, and for one that is there twice."""
    words = words_of("shots", text, "8,32,128,all")
    if not all(word == ALL or (word.isdecimal() and int(word) > 0) for word in words):
        raise ValueError(
            f"shots are not usable; got {text!r}; expected whole numbers above 0 and 'all', such as 8,32,128,all"
        )
    numbers = sorted(int(word) for word in words if word != ALL)
    names = each_once("shots", text, [*map(str, numbers), *(word for word in words if word == ALL)])
    return [Size(None if name == ALL else int(name)) for name in names]


def _point_as_json(point: Point) -> dict[str, Any]:
    return {
        "shots": point.size.name,
        "examples": point.examples,
        "held_out": point.held_out,
        "seconds": point.seconds,
        "lines": {
            name: {
                "mean": scores.mean,
                "spread": scores.spread,
                "scores": {str(seed): score for seed, score in scores.by_seed.items()},
            }
            for name, scores in point.lines.items()
        },
    }
