"""A grid of runs that differ in some options and in the seed.

A run whose metrics are there and whose settings are the same is not trained again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Generic, TypeVar

from hf_lora._files import write_text
from hf_lora.data import ClassificationData, DataConfig, load_splits, prepare_data
from hf_lora.models.loading import load_tokenizer
from hf_lora.recipe.finetune import Finetuning
from hf_lora.recipe.options import all_options
from hf_lora.recipe.progress import Lines, Progress
from hf_lora.recipe.results import METRICS, seconds_of
from hf_lora.recipe.settings import LAST, Recipe
from hf_lora.training.checkpoints import checkpoints, delete

RECORD, LOG = "run.json", "train.log"
# What may differ between two runs that give the same adapter.
_WITHOUT_EFFECT = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name", "logging_dir"),
    *("token", "hub_token", "cache_dir", "disable_tqdm", "log_level", "log_level_replica", "report_to"),
}
VALIDATION, TEST = "validation", "test"
Report = TypeVar("Report")


class Scores(dict[int, float]):
    """A metric by seed."""

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None with one seed."""
        return stdev(self.values()) if len(self) > 1 else None

    def as_json(self) -> dict[str, Any]:
        """Mean, spread and the scores themselves."""
        return {"mean": self.mean, "spread": self.spread, "scores": dict(self)}


@dataclass(frozen=True)
class Point:
    """What is varied besides the seed, and what its runs have measured.

    name: of its folder. options: as `finetune` takes them. setting: the same as reports call them: `rank` and
    `projections`, or `shots`. lines: scores by what was measured. facts: numbers that do not depend on the metric.
    seconds: mean training time of the runs that were not interrupted; None where there is none. directory: the run
    of the first seed.
    """

    name: str
    options: Mapping[str, Any]
    setting: Mapping[str, Any]
    lines: Mapping[str, Scores] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    directory: Path = Path()

    @property
    def mean(self) -> float:
        """The mean of the first line."""
        return next(iter(self.lines.values())).mean


@dataclass(frozen=True)
class Run:
    """A point with a seed, in a directory of its own."""

    point: Point
    seed: int
    directory: Path

    def __str__(self) -> str:
        return f"{self.point.name}, seed {self.seed}"

    @property
    def state(self) -> str:
        """`done`, the checkpoint it goes on from, or `to do`; whether its settings are the same is not asked."""
        if (self.directory / METRICS).is_file():
            return "done"
        found = checkpoints(self.directory)
        return f"goes on from {found[-1].name}" if found else "to do"

    def read(self, name: str) -> dict[str, Any]:
        """METRICS, or the RECORD from before training: settings, numbers of examples, whether it was resumed."""
        return json.loads((self.directory / name).read_text(encoding="utf-8"))


class Grid(Generic[Report]):
    """Every point with every seed.

    kind: the class of its report; if it `draws`, runs draw training examples of their own, else the data are split
    once, with the first seed. settings: options of `hf-lora train` by name, for all runs; `seed` is the first seed.
    tables: data in memory, by split.
    """

    def __init__(
        self,
        kind: type[Report],
        points: Sequence[Point],
        seeds: int,
        settings: Mapping[str, Any],
        tables: Mapping[str, Any] | None,
        *,
        draws: bool,
    ) -> None:
        if seeds < 1:
            raise ValueError(f"seeds is not usable; got {seeds}; expected at least 1, such as 3")
        self.kind, self.points, self.tables, self.draws = kind, points, tables, draws
        self.base = Recipe.from_settings(settings, tables=tables)
        self.output, first = Path(self.base.args.output_dir), self.base.args.seed
        self.settings = dict(settings) if draws else {**settings, "split_seed": self.base.data.seed}
        self.seeds = list(range(first, first + seeds))
        self.runs = [
            Run(point, seed, self.output / point.name / f"seed-{seed}")
            for point in points
            for seed in self.seeds
        ]
        self._prepared: tuple[DataConfig, ClassificationData] | None = None

    def settings_of(self, run: Run) -> dict[str, Any]:
        """The options of `hf-lora train` that do the run alone."""
        return {**self.settings, **run.point.options, "seed": run.seed, "output_dir": str(run.directory)}

    def data_of(self, run: Run) -> ClassificationData:
        """The run's data; the last ones are kept. A curve without any other data holds out one test split for all."""
        config = Recipe.from_settings(self.settings_of(run), tables=self.tables).data
        if self._prepared is None or self._prepared[0] != config:
            model = self.base.model
            tokenizer = load_tokenizer(model.model_name_or_path, **model.place)
            test_seed = self.seeds[0] if self.draws else None
            data = prepare_data(config, tokenizer, tables=self.tables, test_seed=test_seed)
            self._prepared = config, data
        return self._prepared[1]

    def is_done(self, run: Run) -> bool:
        """Whether the run need not be trained; one of other settings is removed with `overwrite_output_dir`.

        Raises ValueError where the directory holds a run, or the beginning of one, of other settings.
        """
        done, path = run.state == "done", str(run.directory)
        if not (run.directory / RECORD).is_file():
            if done:
                what = f"a {self.kind.__name__.lower()}"
                raise ValueError(
                    f"not a run of {what}; got {path!r} without {RECORD}; give another --output_dir"
                )
            return False
        before, now = run.read(RECORD)["settings"], self._recorded(run)
        # Options that another version of transformers has besides are at their defaults.
        other = min((name for name in before.keys() & now.keys() if before[name] != now[name]), default=None)
        if other is None:
            return done
        if self.base.options.overwrite_output_dir:
            shutil.rmtree(run.directory)
            return False
        raise ValueError(
            f"{path!r} holds a run of other settings; got {other}={before[other]!r}; expected {now[other]!r}; "
            "pass --overwrite_output_dir to replace such runs, or another --output_dir"
        )

    def train(self, run: Run) -> Mapping[str, Any]:
        """Do a run, from its newest checkpoint if it has one; returns its metrics. What it prints goes to a file."""
        resumed = bool(checkpoints(run.directory))
        run.directory.mkdir(parents=True, exist_ok=True)
        begin = {"resume_from_checkpoint": LAST} if resumed else {"overwrite_output_dir": True}
        log = (run.directory / LOG).open("a", encoding="utf-8")
        with log, redirect_stdout(log), redirect_stderr(log):
            try:
                data, record = self.data_of(run), {"settings": self._recorded(run), "resumed": resumed}
                record["examples"] = data.report.examples
                write_text(run.directory / RECORD, json.dumps(record, indent=2, sort_keys=True) + "\n")
                recipe = Recipe.from_settings(self.settings_of(run) | begin, tables=self.tables)
                metrics = Finetuning(recipe, data=data, progress=Lines()).run().metrics
            except (ValueError, OSError) as error:
                raise ValueError(f"{run}: {error}") from error
        for checkpoint in checkpoints(run.directory):
            delete(checkpoint)
        gc.collect()  # a Trainer and its model hold each other
        return metrics

    def train_missing(self, key: str, progress: Progress) -> None:
        """Train the runs that are not done, each with a line of what it has measured under `key` of its metrics."""
        # All are looked at first, so that a directory in use is told before hours are spent.
        missing = [run for run in self.runs if not self.is_done(run)]
        total, done = len(self.runs), len(self.runs) - len(missing)
        if done:
            progress.fact("runs", f"{done} of {total} runs are done already")
        seconds: list[float] = []
        try:
            for run in missing:
                began = time.perf_counter()
                score = self.train(run).get(key, float("nan"))
                seconds.append(time.perf_counter() - began)
                done += 1
                left = timedelta(seconds=round(fmean(seconds) * (total - done)))
                measured = f"{run}: {key.partition('_')[2]} {score:.4f}, {seconds[-1]:.1f} s; {left} left"
                progress.fact(f"{done} of {total}", measured)
        except (KeyboardInterrupt, SystemExit):
            progress.fact("runs", f"stopped with {done} of {total} runs done; the same command goes on")
            raise

    def _recorded(self, run: Run) -> dict[str, Any]:
        """Everything that decides a run's result, as plain JSON values."""
        settings = self.settings_of(run)
        names = [entry for title in ("model", "data", "LoRA", "run") for entry in all_options()[title]]
        values = {entry.name: settings.get(entry.name, entry.default) for entry in names}
        values |= Recipe.from_settings(settings, tables=self.tables).args.to_dict()
        kept = {name: value for name, value in values.items() if name not in _WITHOUT_EFFECT}
        return json.loads(json.dumps({**kept, "data_sha256": self._data_digest}, default=str))

    @cached_property
    def _data_digest(self) -> str:
        """Of all texts and labels that decide the results: as they are split, or as they are read and drawn from."""
        read = load_splits(self.base.data, self.tables) if self.draws else self.data_of(self.runs[0]).texts
        digest = hashlib.sha256()
        for split, dataset in read.items():
            for name in dataset.column_names:
                digest.update(json.dumps([split, name, dataset[name][:]], default=str).encode())
        return digest.hexdigest()

    def measured(self, point: Point, keys: Mapping[str, str], facts: Mapping[str, float]) -> Point:
        """The point with what its runs have measured, by line under its key. Raises ValueError without the first.

        A line that a run has not measured is left out.
        """
        runs = [run for run in self.runs if run.point is point]
        found = [(run, run.read(METRICS)) for run in runs]
        needed = next(iter(keys.values()))
        for run, metrics in found:
            if needed not in metrics:
                raise ValueError(
                    f"{run}: {needed} could not be measured; see {LOG} in {str(run.directory)!r}"
                )
        lines = {
            name: Scores({run.seed: metrics[key] for run, metrics in found})
            for name, key in keys.items()
            if all(key in metrics for _, metrics in found)
        }
        whole = [seconds_of(metrics) for run, metrics in found if not run.read(RECORD)["resumed"]]
        seconds = fmean(whole) if whole else None
        return replace(point, lines=lines, facts=facts, seconds=seconds, directory=runs[0].directory)
