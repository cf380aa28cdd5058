"""LoRATrainingArguments, and what follows from them: class weights, parameter groups, silent trainings."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_lora.lora.inject import head_parameters, injection
from hf_lora.tasks import Task, task_of
from hf_lora.training.distributed import meets_over_cpus
from hf_lora.training.examples import labels_of
from hf_lora.training.options import CACHE_MODES, LoRATrainingOptions
from hf_lora.training.resuming import parse_allowed


def class_weights(
    text: str | None,
    dataset: Any,
    count: int,
    problem_type: str | None,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Tensor | None:
    """The weights `(count,)` that `text` asks for: "balanced", or one number for each label; None: none.

    collate: from examples to a batch with labels; read are the labels of a data set without a column of them.

    The training loss is the mean over the examples of weight times loss, as with scikit-learn's class weights.
    Raises ValueError for a regression and for unusable numbers.
    """
    if text is None:
        return None
    if not task_of(problem_type).has_classes:
        raise ValueError("class_weights cannot be used for regression, which has no classes")
    if text == "balanced":
        return balanced_weights(labels_of(dataset, collate), count, task_of(problem_type))
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    usable = all(weight >= 0 and math.isfinite(weight) for weight in weights) and any(weights)
    if len(weights) != count or not usable:
        raise ValueError(
            f"class_weights is not usable; got {text!r}; expected 'balanced' or {count} numbers from 0 up, not all 0"
        )
    return torch.tensor(weights)


def balanced_weights(labels: Any, count: int, task: Task) -> Tensor:
    """Inverse class frequencies, `(count,)`: n / (classes * n_class), where n_class examples carry the label."""
    counts = task.count(labels[:], count)
    absent = [index for index in range(count) if counts[index] == 0]
    if absent:
        raise ValueError(
            f"class_weights='balanced' needs examples of every label; got none of label {absent[0]}"
        )
    return torch.tensor([len(labels) / (count * counts[index]) for index in range(count)])


# The sampling strategies that a budget of tokens can replace.
_WITH_BUDGET = ("random", "group_by_length")
# Without what a training does besides changing the model.
_QUIET: dict[str, Any] = {
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "logging_strategy": "no",
    "report_to": [],
    "push_to_hub": False,
}


@dataclass
class LoRATrainingArguments(LoRATrainingOptions, TrainingArguments):
    """TrainingArguments with what only LoRA classifiers need, see `LoRATrainingOptions`."""

    def __post_init__(self) -> None:
        if meets_over_cpus():
            self.use_cpu = True
        super().__post_init__()
        parse_allowed(self.allow_changed)
        above, budget = "a number above 0", self.max_tokens_per_batch
        for name in ("head_learning_rate", "lora_plus_ratio", "frozen_prefix_cache_gb"):
            value = getattr(self, name)
            self._check(name, value is None or (value > 0 and math.isfinite(value)), above)
        self._check(
            "cache_frozen_prefix", self.cache_frozen_prefix in CACHE_MODES, f"one of {', '.join(CACHE_MODES)}"
        )
        if budget is None:
            return
        self._check("max_tokens_per_batch", isinstance(budget, int) and budget > 0, "a whole number above 0")
        if self.train_sampling_strategy not in _WITH_BUDGET:
            raise ValueError(
                "max_tokens_per_batch puts examples of similar length together; got train_sampling_strategy="
                f"{str(self.train_sampling_strategy)!r}; expected {' or '.join(_WITH_BUDGET)}; leave out one of the two"
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "max_tokens_per_batch leaves auto_find_batch_size nothing to try; got both; expected one of the two"
            )

    def _check(self, name: str, usable: bool, expected: str) -> None:
        if not usable:
            raise ValueError(f"{name} is not usable; got {getattr(self, name)!r}; expected {expected}")

    def to_dict(self) -> dict[str, Any]:
        """The arguments as trackers log them: with the LoRA settings, where a LoRATrainer has taken them."""
        lora = getattr(self, "lora_settings", None)
        return super().to_dict() | ({"lora": dict(lora)} if lora else {})


def silent(args: TrainingArguments, **changes: Any) -> TrainingArguments:
    """The arguments of a training that changes the model and does nothing else; `changes` are made after that."""
    args = copy.copy(args)
    for name, value in (_QUIET | changes).items():
        # Strategies are enums in the arguments, compared with strings by value.
        kind = type(getattr(args, name))
        setattr(args, name, kind(value) if issubclass(kind, str) else value)
    return args


def has_own_rates(args: TrainingArguments) -> bool:
    """Whether the arguments give some parameters another learning rate."""
    return any(getattr(args, name, None) is not None for name in ("head_learning_rate", "lora_plus_ratio"))


def parameter_groups(
    model: nn.Module, plain: nn.Module, args: TrainingArguments, decayed: Iterable[str]
) -> list[dict[str, Any]]:
    """One group for each (learning rate, weight decay); decayed: the names of the parameters with weight decay.

    model: the model as it is trained, wrapped or not. plain: the same without wrappers.
    """
    usual, decayed = float(args.learning_rate), set(decayed)
    ratio = getattr(args, "lora_plus_ratio", None) or 1.0
    rates = dict.fromkeys(head_parameters(plain), getattr(args, "head_learning_rate", None) or usual)
    rates |= {f"{placement.layer}.lora_B": usual * ratio for placement in injection(plain).placements}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Without the prefixes of torch.compile and DDP.
            rate = rates.get(name.replace("_orig_mod.", "").replace("module.", ""), usual)
            decay = args.weight_decay if name in decayed else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]
