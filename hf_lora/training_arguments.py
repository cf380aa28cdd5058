"""LoRATrainingArguments: transformers' TrainingArguments with what only LoRA classifiers need."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments


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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("head_learning_rate", "lora_plus_ratio"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is not usable; got {value!r}; expected a number above 0")
