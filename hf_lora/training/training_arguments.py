"""LoRATrainingArguments: transformers' TrainingArguments with what only LoRA classifiers need."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_lora.training.prefix_store import CACHE_MODES

# The sampling strategies that a budget of tokens can replace.
_WITH_BUDGET = ("random", "group_by_length")
# What a training does beside changing the model.
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
class LoRATrainingArguments(TrainingArguments):
    """TrainingArguments with what only LoRA classifiers need. Every new field is off by default."""

    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the classification head; default: learning_rate."}
    )
    lora_plus_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of B over that of A, such as 16 (LoRA+, Hayou et al. 2024); default: 1."
        },
    )
    class_weights: str | None = field(
        default=None,
        metadata={
            "help": "Weights of the classes in the loss: 'balanced' (inverse frequency in the training set) or "
            "one number per label, separated by commas."
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens, padding included, in a training batch on one device: rows times the longest row. "
            "The number of examples then varies, and per_device_train_batch_size does not apply."
        },
    )
    cache_frozen_prefix: str = field(
        default="no",
        metadata={
            "nargs": "?",
            "const": "auto",
            "choices": CACHE_MODES,
            "help": "Run the frozen blocks below the adapted ones once per example and keep their output: no, auto, "
            "memory or disk.",
        },
    )
    frozen_prefix_cache_gb: float = field(
        default=1.0,
        metadata={"help": "Memory that the cache may take, in GB; above it auto uses the disk."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("head_learning_rate", "lora_plus_ratio", "frozen_prefix_cache_gb"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is not usable; got {value!r}; expected a number above 0")
        if self.cache_frozen_prefix not in CACHE_MODES:
            raise ValueError(
                f"cache_frozen_prefix is not usable; got {self.cache_frozen_prefix!r}; "
                f"expected one of {', '.join(CACHE_MODES)}"
            )
        if self.max_tokens_per_batch is not None:
            self._check_token_budget(self.max_tokens_per_batch)

    def to_dict(self) -> dict[str, Any]:
        """The arguments as trackers log them: with the LoRA settings, where a LoRATrainer has taken them."""
        lora = getattr(self, "lora_settings", None)
        return super().to_dict() | ({"lora": dict(lora)} if lora else {})

    def _check_token_budget(self, budget: int) -> None:
        if not isinstance(budget, int) or budget < 1:
            raise ValueError(
                f"max_tokens_per_batch is not usable; got {budget!r}; expected a whole number above 0"
            )
        if self.train_sampling_strategy not in _WITH_BUDGET:
            raise ValueError(
                "max_tokens_per_batch puts examples of similar length together; got train_sampling_strategy="
                f"{str(self.train_sampling_strategy)!r}; expected {' or '.join(_WITH_BUDGET)}; leave out one of the two"
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "max_tokens_per_batch leaves auto_find_batch_size nothing to try; got both; expected one of the two"
            )


def silent(args: TrainingArguments, **changes: Any) -> TrainingArguments:
    """The arguments of a training that changes the model and does nothing else; `changes` are made after that."""
    args = copy.copy(args)
    for name, value in (_QUIET | changes).items():
        # Strategies are enums in the arguments, compared with strings by value.
        kind = type(getattr(args, name))
        setattr(args, name, kind(value) if issubclass(kind, str) else value)
    return args
