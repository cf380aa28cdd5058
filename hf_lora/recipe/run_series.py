"""Training runs that differ in one setting and in the seed, each in a directory of its own.

A run whose metrics are there and whose settings are the same is not trained again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import stdev
from typing import Any, ClassVar, Generic, TypeVar

from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase

from hf_lora._files import write_text
from hf_lora.cli.parsing import parse_training, read_yaml
from hf_lora.data import ClassificationData
from hf_lora.models.loading import load_tokenizer
from hf_lora.recipe.arguments import DataArguments, LoRAArguments, ModelArguments, RunArguments
from hf_lora.recipe.finetune import run_training
from hf_lora.recipe.run_settings import hub_options
from hf_lora.tasks import task_of
from hf_lora.training.arguments import LoRATrainingArguments
from hf_lora.training.checkpoints import checkpoints, delete

RECORD = "run.json"
METRICS = "metrics.json"
LOG = "train.log"
LOWER_IS_BETTER = ("loss", "mse", "rmse")
# The metric whose noise on a set of examples is known without a second seed: a share of right answers.
SHARE = "accuracy"
# What may differ between two runs that give the same adapter.
_WITHOUT_EFFECT = (
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run", "run_name", "logging_dir"),
    *("token", "hub_token", "cache_dir", "disable_tqdm", "log_level", "log_level_replica", "report_to"),
)
# With a rank of 0 nothing is trained after the head's start, and a refit is of a few examples.
_SECONDS = ("warm_start_runtime", "train_runtime", "refit_runtime")
S = TypeVar("S")


@dataclass(frozen=True)
class Run(Generic[S]):
    """One training run of a series; `setting` is what is varied besides the seed, and says itself in words."""

    setting: S
    seed: int
    directory: Path

    def __str__(self) -> str:
        return f"{self.setting}, seed {self.seed}"

    @property
    def state(self) -> str:
        """`done`, the checkpoint it goes on from, or `to do`; whether its settings are the same is not asked."""
        if (self.directory / METRICS).is_file():
            return "done"
        found = checkpoints(self.directory)
        return f"goes on from {found[-1].name}" if found else "to do"

    @property
    def metrics(self) -> dict[str, Any]:
        """What the run has measured."""
        return json.loads((self.directory / METRICS).read_text(encoding="utf-8"))

    @property
    def record(self) -> dict[str, Any]:
        """What was written down of the run before it was trained."""
        return json.loads((self.directory / RECORD).read_text(encoding="utf-8"))


class RunSeries(Generic[S]):
    """The runs and how to do them; a subclass says what is varied, and which data a run has.

    train_argv: arguments of `hf-lora train`, which hold for all runs; `--seed` is the first seed.
    Raises ValueError for arguments that the series sets itself.
    """

    name: ClassVar[str]
    """What the series is to a user, with its article."""
    not_for_runs: ClassVar[Mapping[str, str]]
    """Arguments of `hf-lora train` that a series sets itself or cannot give to its runs, and what to do instead."""
    runs: Sequence[Run[S]]

    def __init__(self, train_argv: Sequence[str], *, output: Path, seeds: int) -> None:
        self._check_arguments(train_argv)
        if seeds < 1:
            raise ValueError(f"seeds is not usable; got {seeds}; expected at least 1, such as 3")
        self.output = output
        self._argv = [*train_argv, "--output_dir", str(output)]
        groups = parse_training(self._argv)
        self.model_args: ModelArguments = groups[0]
        self.data_args: DataArguments = groups[1]
        self.lora_args: LoRAArguments = groups[2]
        self.run_args: RunArguments = groups[3]
        self.args: LoRATrainingArguments = groups[4]
        self.seeds = [self.args.seed + index for index in range(seeds)]

    def _check_arguments(self, train_argv: Sequence[str]) -> None:
        given = {word.partition("=")[0][2:].replace("-", "_") for word in train_argv if word.startswith("--")}
        if train_argv and not train_argv[0].startswith("-"):
            given |= read_yaml(Path(train_argv[0])).keys()
        refused = {
            **self.not_for_runs,
            "resume_from_checkpoint": f"leave it out: {self.name} goes on by itself",
            "accelerate_config": f"{self.name} trains in one process",
            "push_to_hub": "push the adapter you choose with hf-lora push",
        }
        for name, instead in refused.items():
            if name in given:
                raise ValueError(f"--{name} is not for {self.name}; {instead}")

    def flags(self, run: Run[S]) -> list[str]:
        """The flags of `hf-lora train` that are the run's setting."""
        raise NotImplementedError

    def data_of(self, run: Run[S]) -> ClassificationData:
        """The run's data."""
        raise NotImplementedError

    def all_texts(self) -> DatasetDict:
        """Everything of the data that decides the runs' results."""
        raise NotImplementedError

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of all runs."""
        return load_tokenizer(
            self.model_args.model_name_or_path,
            revision=self.model_args.model_revision,
            **hub_options(self.model_args),
        )

    def argv(self, run: Run[S]) -> list[str]:
        """The arguments of `hf-lora train` that do the run alone, from the beginning."""
        return [
            *self._argv,
            *("--output_dir", str(run.directory), "--seed", str(run.seed)),
            *self.flags(run),
        ]

    def is_done(self, run: Run[S]) -> bool:
        """Whether the run need not be trained; one of other settings is removed with `overwrite_output_dir`.

        Raises ValueError where the directory holds a run, or the beginning of one, of other settings.
        """
        if not (run.directory / RECORD).is_file():
            if (run.directory / METRICS).is_file():
                raise ValueError(
                    f"not a run of {self.name}; got {str(run.directory)!r} without {RECORD}; give another --output_dir"
                )
            return False
        before, now = run.record["settings"], self._settings(run)
        # Arguments that another version of transformers has besides are at their defaults.
        others = [name for name in sorted(before.keys() & now.keys()) if before[name] != now[name]]
        if not others:
            return (run.directory / METRICS).is_file()
        if self.run_args.overwrite_output_dir:
            shutil.rmtree(run.directory)
            return False
        name = others[0]
        raise ValueError(
            f"{str(run.directory)!r} holds a run of other settings; got {name}={before[name]!r}; expected "
            f"{now[name]!r}; pass --overwrite_output_dir to replace such runs, or another --output_dir"
        )

    def train(self, run: Run[S]) -> dict[str, Any]:
        """Do a run, from its newest checkpoint if it has one; returns its metrics. What it prints goes to a file."""
        resumed = bool(checkpoints(run.directory))
        run.directory.mkdir(parents=True, exist_ok=True)
        begin = ["--resume_from_checkpoint"] if resumed else ["--overwrite_output_dir"]
        with (
            (run.directory / LOG).open("a", encoding="utf-8") as log,
            redirect_stdout(log),
            redirect_stderr(log),
        ):
            try:
                data = self.data_of(run)
                record = {"settings": self._settings(run), "resumed": resumed}
                record["examples"] = data.report.examples
                write_text(run.directory / RECORD, json.dumps(record, indent=2, sort_keys=True) + "\n")
                metrics = run_training([*self.argv(run), *begin], data=data)
            except (ValueError, OSError) as error:
                raise ValueError(f"{run}: {error}") from error
        for checkpoint in checkpoints(run.directory):
            delete(checkpoint)
        gc.collect()  # a Trainer and its model hold each other
        return metrics

    def _settings(self, run: Run[S]) -> dict[str, Any]:
        """Everything that decides a run's result, as plain JSON values."""
        model, data, lora, own, args = parse_training(self.argv(run))
        values = {**asdict(model), **asdict(data), **asdict(lora), **asdict(own), **args.to_dict()}
        kept = {name: value for name, value in values.items() if name not in _WITHOUT_EFFECT}
        return json.loads(json.dumps({**kept, "data_sha256": self._data_digest}, default=str))

    @cached_property
    def _data_digest(self) -> str:
        digest = hashlib.sha256()
        for split, dataset in self.all_texts().items():
            for name in dataset.column_names:
                digest.update(json.dumps([split, name, dataset[name][:]], default=str).encode())
        return digest.hexdigest()


def choose_metric(wanted: str | None, problem_type: str) -> str:
    """The metric that is compared. Raises ValueError for one that is not measured for these labels."""
    task = task_of(problem_type)
    names = ["loss", *task.metric_names]
    names += ["rmse"] if "mse" in names else []
    name = (wanted or task.default_metric).removeprefix("eval_").removeprefix("test_")
    if name not in names:
        raise ValueError(
            f"the metric is not measured for these labels; got {name!r}; expected one of {', '.join(names)}"
        )
    return name


def measured(runs: Iterable[Run[Any]], key: str) -> dict[int, float]:
    """A number of each run's metrics by its seed. Raises ValueError where a run has not measured it."""
    runs = list(runs)
    missing = [run for run in runs if key not in run.metrics]
    if missing:
        raise ValueError(
            f"{missing[0]}: {key} could not be measured; see {LOG} in {str(missing[0].directory)!r}"
        )
    return {run.seed: run.metrics[key] for run in runs}


def spread_of(scores: Mapping[int, float]) -> float | None:
    """Standard deviation over the seeds (n - 1); None with one seed."""
    return stdev(scores.values()) if len(scores) > 1 else None


def whole_seconds(runs: Iterable[Run[Any]]) -> list[float]:
    """Seconds of the head's start and of training, of the runs that were trained in one go."""
    metrics = [run.metrics for run in runs if not run.record["resumed"]]
    return [sum(found.get(name, 0.0) for name in _SECONDS) for found in metrics]


def words_of(name: str, text: str, example: str) -> list[str]:
    """`a,b` as its words. Raises ValueError for an empty place."""
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ValueError(f"{name} has an empty place; got {text!r}; expected a list such as {example}")
    return words


def each_once(name: str, text: str, values: Iterable[S]) -> list[S]:
    """The values as a list. Raises ValueError for one that is there twice."""
    values = list(values)
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"{name} has {twice} twice; got {text!r}; expected each once")
    return values
