"""LoRA fine-tuning for BERT-style text classifiers inside the Hugging Face ecosystem.

The public names below are imported when they are first used, so that `import hf_lora` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_lora.version import __version__

if TYPE_CHECKING:
    from hf_lora.checkpoint import load_adapter, save_adapter
    from hf_lora.config import LoRAConfig
    from hf_lora.gradient_start import start_lora
    from hf_lora.hub import push_adapter
    from hf_lora.inference import TextClassifier
    from hf_lora.inject import (
        head_parameters,
        inject_lora,
        lora_disabled,
        lora_layers,
        lora_parameters,
        merge_lora,
        remove_lora,
        trainable_parameter_count,
        unmerge_lora,
    )
    from hf_lora.modeling import load_classifier
    from hf_lora.trainer import LoRATrainer
    from hf_lora.training_arguments import LoRATrainingArguments
    from hf_lora.warm_start import start_head

_HOMES = {
    "LoRAConfig": "config",
    "inject_lora": "inject",
    "merge_lora": "inject",
    "unmerge_lora": "inject",
    "remove_lora": "inject",
    "lora_disabled": "inject",
    "lora_layers": "inject",
    "lora_parameters": "inject",
    "head_parameters": "inject",
    "trainable_parameter_count": "inject",
    "save_adapter": "checkpoint",
    "load_adapter": "checkpoint",
    "push_adapter": "hub",
    "load_classifier": "modeling",
    "LoRATrainer": "trainer",
    "LoRATrainingArguments": "training_arguments",
    "TextClassifier": "inference",
    "start_head": "warm_start",
    "start_lora": "gradient_start",
}

__all__ = [
    "LoRAConfig",
    "LoRATrainer",
    "LoRATrainingArguments",
    "TextClassifier",
    "__version__",
    "head_parameters",
    "inject_lora",
    "load_adapter",
    "load_classifier",
    "lora_disabled",
    "lora_layers",
    "lora_parameters",
    "merge_lora",
    "push_adapter",
    "remove_lora",
    "save_adapter",
    "start_head",
    "start_lora",
    "trainable_parameter_count",
    "unmerge_lora",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_lora' has no attribute {name!r}")
    return getattr(import_module(f"hf_lora.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
