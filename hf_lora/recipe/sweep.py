"""A sweep: one training run for each rank, set of projections and seed, each in a directory of its own.

The data are read and split once, for all runs, so that the seeds differ in initialization and order alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import ClassVar

from datasets import DatasetDict

from hf_lora.data import ClassificationData, prepare_data
from hf_lora.lora.config import LoRAConfig
from hf_lora.lora.inject import inject_lora, remove_lora, trainable_parameter_count
from hf_lora.models.loading import meta_classifier
from hf_lora.recipe.run_series import (
    Run,
    RunSeries,
    choose_metric,
    each_once,
    measured,
    whole_seconds,
    words_of,
)
from hf_lora.recipe.run_settings import data_config, hub_options, lora_config
from hf_lora.recipe.sweep_results import Result


@dataclass(frozen=True)
class Setting:
    """What is varied besides the seed."""

    rank: int
    projections: str

    def __str__(self) -> str:
        return f"rank {self.rank}, projections {self.projections}"


class Sweep(RunSeries[Setting]):
    """The runs of a sweep and how to do them.

    train_argv: arguments of `hf-lora train`, which hold for all runs; `--seed` is the first seed.
    Raises ValueError for lists that are not usable, and for arguments that a sweep sets itself.
    """

    name = "a sweep"
    not_for_runs: ClassVar[dict[str, str]] = {
        "lora_rank": "use --ranks",
        "lora_projections": "use --projections",
        "lora_target_modules": "use --projections",
    }

    def __init__(
        self, train_argv: Sequence[str], *, output: Path, ranks: str, projections: str, seeds: int
    ) -> None:
        super().__init__(train_argv, output=output, seeds=seeds)
        self.settings = [
            Setting(rank, letters)
            for letters in parse_projections(projections)
            for rank in parse_ranks(ranks)
        ]
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
        return prepare_data(data_config(self.data_args, self.model_args, self.args), self.tokenizer)

    def data_of(self, run: Run[Setting]) -> ClassificationData:
        """The data of all runs."""
        return self.data

    def all_texts(self) -> DatasetDict:
        """The texts and labels of all runs."""
        return self.data.texts

    def flags(self, run: Run[Setting]) -> list[str]:
        """The flags of `hf-lora train` that are the run's rank and projections, and the split of all runs."""
        return [
            *("--split_seed", str(self.data_args.split_seed)),
            *("--lora_rank", str(run.setting.rank), "--lora_projections", run.setting.projections),
        ]

    def metric(self, wanted: str | None) -> str:
        """The metric that is compared. Raises ValueError for one that is not measured for these labels."""
        return choose_metric(wanted, self.data.problem_type)

    def results(self, metric: str) -> list[Result]:
        """What the runs have measured, by setting. Raises ValueError where one has not measured `metric`."""
        return [self._result(setting, metric) for setting in self.settings]

    def _result(self, setting: Setting, metric: str) -> Result:
        runs = [run for run in self.runs if run.setting == setting]
        scores = measured(runs, f"eval_{metric}")
        tested, whole = all(f"test_{metric}" in run.metrics for run in runs), whole_seconds(runs)
        return Result(
            rank=setting.rank,
            projections=setting.projections,
            lora_parameters=self.lora_parameters[setting],
            trainable_parameters=runs[0].metrics["trainable_parameters"],
            scores=scores,
            test_scores=measured(runs, f"test_{metric}") if tested else {},
            seconds=fmean(whole) if whole else None,
        )


def parse_ranks(text: str) -> list[int]:
    """`1,2,4` as numbers. Raises ValueError for anything but whole numbers of at least 1, each once."""
    words = words_of("ranks", text, "1,2,4,8")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError(
            f"ranks are not usable; got {text!r}; expected whole numbers above 0, such as 1,2,4,8"
        )
    return each_once("ranks", text, map(int, words))


def parse_projections(text: str) -> list[str]:
    """`q,qv` as sets of roles in their usual order. Raises ValueError for other letters, and a set twice."""
    words = words_of("projections", text, "q,v,qv,qkvo")
    return each_once("projections", text, [LoRAConfig(projections=word).projections for word in words])
