"""The options that LoRATrainingArguments adds to transformers' own. Imports neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass, field

CACHE_MODES = ("no", "auto", "memory", "disk")


@dataclass
class LoRATrainingOptions:
    """What only LoRA classifiers need. Every option is off by default."""

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
    allow_changed: str | None = field(
        default=None,
        metadata={
            "help": "What may differ from the run of the checkpoint that is resumed, separated by commas: data, "
            "labels, base, precision, processes or settings such as learning_rate."
        },
    )
