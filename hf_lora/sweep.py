"""A sweep: one training run for each rank, set of projections and seed, each in a directory of its own.

The data are read and split once, for all runs, so that the seeds differ in initialization and order alone. A
run whose metrics are there and whose settings are the same is not trained again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_lora.arguments import DataArguments, LoRAArguments, ModelArguments, RunArguments
from hf_lora.atomic import write_text
from hf_lora.checkpoints import checkpoints, delete
from hf_lora.config import LoRAConfig
from hf_lora.data import ClassificationData, prepare_data
from hf_lora.data.labels import REGRESSION
from hf_lora.inject import inject_lora, remove_lora, trainable_parameter_count
from hf_lora.metrics import EVALUATIONS
from hf_lora.modeling import load_tokenizer, meta_classifier
from hf_lora.parsing import parse_training, read_yaml
from hf_lora.sweep_results import SHARE, Result
from hf_lora.training import data_config, hub_options, lora_config, run_training
from hf_lora.training_arguments import LoRATrainingArguments

RECORD = "run.json"
METRICS = "metrics.json"
LOG = "train.log"
# Arguments of `hf-lora train` that a sweep sets itself or cannot give to its runs, and what to use instead.
NOT_FOR_RUNS = {
    "lora_rank": "use --ranks",
    "lora_projections": "use --projections",
    "lora_target_modules": "use --projections",
    "resume_from_checkpoint": "leave it out: a sweep goes on by itself",
    "push_to_hub": "push the adapter you choose with hf-lora push",
    "accelerate_config": "a sweep trains in one process",
}
# What may differ between two runs that give the same adapter.
_WITHOUT_EFFECT = (
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run", "run_name", "logging_dir"),
    *("token", "hub_token", "cache_dir", "disable_tqdm", "log_level", "log_level_replica", "report_to"),
)


@dataclass(frozen=True)
class Setting:
    """What is varied besides the seed."""

    rank: int
    projections: str


@dataclass(frozen=True)
class Run:
    """One training run of a sweep."""

    setting: Setting
    seed: int
    directory: Path

    def __str__(self) -> str:
        return f"rank {self.setting.rank}, projections {self.setting.projections}, seed {self.seed}"

    @property
    def state(self) -> str:
        """`done`, the checkpoint it goes on from, or `to do`; whether its settings are the same is not asked."""
        if (self.directory / METRICS).is_file():
            return "done"
        found = checkpoints(self.directory)
        return f"goes on from {found[-1].name}" if found else "to do"


class Sweep:
    """The runs of a sweep and how to do them.

    train_argv: arguments of `hf-lora train`, which hold for all runs; `--seed` is the first seed.
    Raises ValueError for lists that are not usable, and for arguments that a sweep sets itself.
    """

    def __init__(
        self, train_argv: Sequence[str], *, output: Path, ranks: str, projections: str, seeds: int
    ) -> None:
        _check_arguments(train_argv)
        self.output = output
        self.settings = [
            Setting(rank, letters)
            for letters in parse_projections(projections)
            for rank in parse_ranks(ranks)
        ]
        if seeds < 1:
            raise ValueError(f"seeds is not usable; got {seeds}; expected at least 1, such as 3")
        self._argv = [*train_argv, "--output_dir", str(output)]
        groups = parse_training(self._argv)
        self.model_args: ModelArguments = groups[0]
        self.data_args: DataArguments = groups[1]
        self.lora_args: LoRAArguments = groups[2]
        self.run_args: RunArguments = groups[3]
        self.args: LoRATrainingArguments = groups[4]
        self.seeds = [self.args.seed + index for index in range(seeds)]
        if self.data_args.split_seed is None:
            self.data_args.split_seed = self.args.seed
        self.runs = [
            Run(setting, seed, output / f"rank-{setting.rank}-{setting.projections}" / f"seed-{seed}")
            for setting in self.settings
            for seed in self.seeds
        ]

    @cached_property
    def lora_parameters(self) -> dict[Setting, int]:
        """Parameters of each setting without the head, counted on a model without weights.

        Raises ValueError, before anything is trained, where the model has no such projections.
        """
        model = meta_classifier(
            self.model_args.model_name_or_path,
            revision=self.model_args.model_revision,
            **hub_options(self.model_args),
        )
        config, counts = lora_config(self.lora_args), {}
        for setting in self.settings:
            inject_lora(model, replace(config, rank=setting.rank, projections=setting.projections))
            counts[setting] = trainable_parameter_count(model).lora
            remove_lora(model)
        return counts

    @cached_property
    def data(self) -> ClassificationData:
        """The data of all runs, split with the first seed and tokenized once."""
        tokenizer = load_tokenizer(
            self.model_args.model_name_or_path,
            revision=self.model_args.model_revision,
            **hub_options(self.model_args),
        )
        return prepare_data(data_config(self.data_args, self.model_args, self.args), tokenizer)

    def metric(self, wanted: str | None) -> str:
        """The metric that is compared. Raises ValueError for one that is not measured for these labels."""
        problem_type = self.data.problem_type
        default = "pearson" if problem_type == REGRESSION else SHARE
        names = ["loss", *EVALUATIONS.get(problem_type).metrics]
        names += ["rmse"] if "mse" in names else []
        name = (wanted or default).removeprefix("eval_")
        if name not in names:
            raise ValueError(
                f"the metric is not measured for these labels; got {name!r}; expected one of {', '.join(names)}"
            )
        return name

    def argv(self, run: Run) -> list[str]:
        """The arguments of `hf-lora train` that do the run alone, from the beginning."""
        return [
            *self._argv,
            *("--output_dir", str(run.directory), "--seed", str(run.seed)),
            *("--split_seed", str(self.data_args.split_seed)),
            *("--lora_rank", str(run.setting.rank), "--lora_projections", run.setting.projections),
        ]

    def is_done(self, run: Run) -> bool:
        """Whether the run need not be trained; one of other settings is removed with `overwrite_output_dir`.

        Raises ValueError where the directory holds a run, or the beginning of one, of other settings.
        """
        record = run.directory / RECORD
        if not record.is_file():
            if (run.directory / METRICS).is_file():
                raise ValueError(
                    f"not a run of a sweep; got {str(run.directory)!r} without {RECORD}; give another --output_dir"
                )
            return False
        before, now = json.loads(record.read_text(encoding="utf-8"))["settings"], self._settings(run)
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

    def train(self, run: Run) -> dict[str, Any]:
        """Do a run, from its newest checkpoint if it has one; returns its metrics. What it prints goes to a file."""
        resumed = bool(checkpoints(run.directory))
        run.directory.mkdir(parents=True, exist_ok=True)
        record = {"settings": self._settings(run), "resumed": resumed}
        write_text(run.directory / RECORD, json.dumps(record, indent=2, sort_keys=True) + "\n")
        begin = ["--resume_from_checkpoint"] if resumed else ["--overwrite_output_dir"]
        with (
            (run.directory / LOG).open("a", encoding="utf-8") as log,
            redirect_stdout(log),
            redirect_stderr(log),
        ):
            try:
                metrics = run_training([*self.argv(run), *begin], data=self.data)
            except (ValueError, OSError) as error:
                raise ValueError(f"{run}: {error}") from error
        for checkpoint in checkpoints(run.directory):
            delete(checkpoint)
        gc.collect()  # a Trainer and its model hold each other
        return metrics

    def results(self, metric: str) -> list[Result]:
        """What the runs have measured, by setting. Raises ValueError where one has not measured `metric`."""
        return [self._result(setting, metric) for setting in self.settings]

    def _result(self, setting: Setting, metric: str) -> Result:
        runs = [run for run in self.runs if run.setting == setting]
        measured = {run.seed: json.loads((run.directory / METRICS).read_text()) for run in runs}
        missing = [run for run in runs if f"eval_{metric}" not in measured[run.seed]]
        if missing:
            raise ValueError(
                f"{missing[0]}: {metric} could not be measured; see {LOG} in {str(missing[0].directory)!r}"
            )
        tested = all(f"test_{metric}" in metrics for metrics in measured.values())
        whole = [
            measured[run.seed]["train_runtime"]
            for run in runs
            if not json.loads((run.directory / RECORD).read_text())["resumed"]
        ]
        return Result(
            rank=setting.rank,
            projections=setting.projections,
            lora_parameters=self.lora_parameters[setting],
            trainable_parameters=measured[runs[0].seed]["trainable_parameters"],
            scores={seed: metrics[f"eval_{metric}"] for seed, metrics in measured.items()},
            test_scores={seed: metrics[f"test_{metric}"] for seed, metrics in measured.items()}
            if tested
            else {},
            seconds=fmean(whole) if whole else None,
        )

    def _settings(self, run: Run) -> dict[str, Any]:
        """Everything that decides a run's result, as plain JSON values."""
        model, data, lora, own, args = parse_training(self.argv(run))
        values = {**asdict(model), **asdict(data), **asdict(lora), **asdict(own), **args.to_dict()}
        kept = {name: value for name, value in values.items() if name not in _WITHOUT_EFFECT}
        return json.loads(json.dumps({**kept, "data_sha256": self._data_digest}, default=str))

    @cached_property
    def _data_digest(self) -> str:
        digest = hashlib.sha256()
        for split, dataset in self.data.texts.items():
            for name in dataset.column_names:
                digest.update(json.dumps([split, name, dataset[name][:]], default=str).encode())
        return digest.hexdigest()


def parse_ranks(text: str) -> list[int]:
    """`1,2,4` as numbers. Raises ValueError for anything but whole numbers of at least 1, each once."""
    words = _words("ranks", text, "1,2,4,8")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError(
            f"ranks are not usable; got {text!r}; expected whole numbers above 0, such as 1,2,4,8"
        )
    return _each_once("ranks", text, map(int, words))


def parse_projections(text: str) -> list[str]:
    """`q,qv` as sets of roles in their usual order. Raises ValueError for other letters, and a set twice."""
    sets = [LoRAConfig(projections=word).projections for word in _words("projections", text, "q,v,qv,qkvo")]
    return _each_once("projections", text, sets)


def _words(name: str, text: str, example: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ValueError(f"{name} has an empty place; got {text!r}; expected a list such as {example}")
    return words


def _each_once(name: str, text: str, values: Iterable[Any]) -> list[Any]:
    values = list(values)
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"{name} has {twice} twice; got {text!r}; expected each once")
    return values


def _check_arguments(train_argv: Sequence[str]) -> None:
    given = {word.partition("=")[0][2:].replace("-", "_") for word in train_argv if word.startswith("--")}
    if train_argv and not train_argv[0].startswith("-"):
        given |= read_yaml(Path(train_argv[0])).keys()
    for name, instead in NOT_FOR_RUNS.items():
        if name in given:
            raise ValueError(f"--{name} is not for a sweep; {instead}")
