"""Learning rates of their own: the head's, and that of B over A (LoRA+), as the optimizer's parameter groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import TrainingArguments

from hf_lora.lora.inject import head_parameters, injection

# Prefixes that wrappers put into parameter names: torch.compile, DDP.
_WRAPPERS = ("_orig_mod.", "module.")


def has_own_rates(args: TrainingArguments) -> bool:
    """Whether the arguments give some parameters another learning rate."""
    return any(getattr(args, name, None) is not None for name in ("head_learning_rate", "lora_plus_ratio"))


def parameter_groups(
    model: nn.Module, plain: nn.Module, args: TrainingArguments, decayed: Iterable[str]
) -> list[dict[str, Any]]:
    """One group for each (learning rate, weight decay).

    model: the model as it is trained, wrapped or not. plain: the same without wrappers.
    decayed: the names of the parameters with weight decay.
    """
    decayed, rates = set(decayed), _own_rates(plain, args)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = rates.get(_unwrapped(name), float(args.learning_rate))
            decay = args.weight_decay if name in decayed else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]


def _own_rates(model: nn.Module, args: TrainingArguments) -> dict[str, float]:
    """The learning rates of the parameters that have one of their own, by name in the plain model."""
    rate = float(args.learning_rate)
    head_rate = getattr(args, "head_learning_rate", None) or rate
    ratio = getattr(args, "lora_plus_ratio", None) or 1.0
    rates = dict.fromkeys(head_parameters(model), head_rate)
    return rates | {f"{p.layer}.lora_B": rate * ratio for p in injection(model).placements}


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
