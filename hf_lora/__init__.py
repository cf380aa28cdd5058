"""LoRA fine-tuning for BERT-style text classifiers inside the Hugging Face ecosystem.

The public names below are imported when they are first used, so that `import hf_lora` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_lora.version import __version__

if TYPE_CHECKING:
    from hf_lora.adapters.directory import load_adapter, save_adapter
    from hf_lora.adapters.hub import push_adapter
    from hf_lora.adapters.loading import load_classifier
    from hf_lora.bank.bank import AdapterBank
    from hf_lora.lora.config import LoRAConfig
    from hf_lora.lora.inject import (
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
    from hf_lora.recipe.finetune import finetune
    from hf_lora.recipe.head_start import start_head
    from hf_lora.recipe.options import FinetuneOptions
    from hf_lora.recipe.results import FinetuneResult
    from hf_lora.recipe.sweep import learning_curve, sweep
    from hf_lora.serving.classifier import TextClassifier
    from hf_lora.training.arguments import LoRATrainingArguments
    from hf_lora.training.gradient_init import start_lora
    from hf_lora.training.trainer import LoRATrainer

_HOMES = {
    "LoRAConfig": "lora.config",
    "inject_lora": "lora.inject",
    "merge_lora": "lora.inject",
    "unmerge_lora": "lora.inject",
    "remove_lora": "lora.inject",
    "lora_disabled": "lora.inject",
    "lora_layers": "lora.inject",
    "lora_parameters": "lora.inject",
    "head_parameters": "lora.inject",
    "trainable_parameter_count": "lora.inject",
    "save_adapter": "adapters.directory",
    "load_adapter": "adapters.directory",
    "push_adapter": "adapters.hub",
    "load_classifier": "adapters.loading",
    "LoRATrainer": "training.trainer",
    "LoRATrainingArguments": "training.arguments",
    "AdapterBank": "bank.bank",
    "TextClassifier": "serving.classifier",
    "finetune": "recipe.finetune",
    "FinetuneOptions": "recipe.options",
    "FinetuneResult": "recipe.results",
    "sweep": "recipe.sweep",
    "learning_curve": "recipe.sweep",
    "start_head": "recipe.head_start",
    "start_lora": "training.gradient_init",
}

__all__ = [
    "AdapterBank",
    "FinetuneOptions",
    "FinetuneResult",
    "LoRAConfig",
    "LoRATrainer",
    "LoRATrainingArguments",
    "TextClassifier",
    "__version__",
    "finetune",
    "head_parameters",
    "inject_lora",
    "learning_curve",
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
    "sweep",
    "trainable_parameter_count",
    "unmerge_lora",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_lora' has no attribute {name!r}")
    return getattr(import_module(f"hf_lora.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
