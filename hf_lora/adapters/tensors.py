"""The tensors of an adapter file: from an injected model, and strictly back into one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_lora.adapters import peft_format
from hf_lora.lora.head import belongs_to
from hf_lora.lora.inject import injection, lora_layers, trained_biases
from hf_lora.lora.update import FACTORS


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What is saved, under PEFT's keys: A, B, the head and trained biases, fp32 on the CPU, contiguous."""
    own = model.state_dict()
    files = (*_factors(model, own).values(), _whole_tensors(model, own))
    return {key: as_saved(tensor) for part in files for key, tensor in part.items()}


def as_saved(tensor: Tensor) -> Tensor:
    """A tensor as adapter files hold it: fp32 on the CPU, and a copy, since safetensors refuses shared memory."""
    return tensor.detach().to("cpu", torch.float32).contiguous().clone()


def _factors(model: nn.Module, own: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The keys and tensors of every adapted layer in an adapter file, made from the model's tensors by name."""
    layers = lora_layers(model)
    files: dict[str, dict[str, Tensor]] = {}
    for placement in injection(model).placements:
        name = placement.target.name
        layer = layers[name]
        factors = {f: own[f"{placement.layer}.{f}"] for f in FACTORS if getattr(layer, f) is not None}
        inside = f"{peft_format.PREFIX}{name}."
        files[name] = {inside + key: tensor for key, tensor in layer.to_peft(factors).items()}
    return files


def _whole_tensors(model: nn.Module, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The keys and tensors of what is saved as it is: the head and the trained biases."""
    state = injection(model)
    targets = {target.module for target in state.targets}
    head = {peft_format.PREFIX + name: own[name] for name in own if belongs_to(name, state.head)}
    biases = sorted(trained_biases(model, state))
    return head | {peft_format.bias_key(name, targets): own[name] for name in biases}


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Copy an adapter file's tensors into an injected model: every one, each with its exact shape.

    Raises ValueError, before any change, for missing, unexpected, wrongly shaped or non-finite tensors.
    """
    own = model.state_dict()
    factors, whole = _factors(model, own), _whole_tensors(model, own)
    expected = {
        key: tuple(tensor.shape) for part in (*factors.values(), whole) for key, tensor in part.items()
    }
    keys = _checked_copies(model, tensors, peft_format.without_duplicates(tensors), source)
    missing, unexpected = sorted(set(expected) - set(keys)), sorted(set(keys) - set(expected))
    if missing or unexpected:
        found = [f"{len(missing)} missing, first {missing[0]!r}"] if missing else []
        found += [f"{len(unexpected)} unexpected, first {unexpected[0]!r}"] if unexpected else []
        raise ValueError(f"{source} does not fit {type(model).__name__}; got {' and '.join(found)}")
    for key in keys:
        want, got = expected[key], tuple(tensors[key].shape)
        if want != got:
            raise ValueError(
                f"{source} does not fit the model; {key!r} has shape {got}, expected {want}"
                + _label_hint(model, key, got)
            )
    if (damaged := _damaged({key: tensors[key] for key in keys})) is not None:
        raise ValueError(f"{source} is damaged; {damaged!r} holds something else than finite numbers")
    for name, layer in lora_layers(model).items():
        inside = len(f"{peft_format.PREFIX}{name}.")
        try:
            layer.load_peft({key[inside:]: tensors[key] for key in factors[name]})
        except ValueError as error:
            raise ValueError(f"{source} does not fit {name!r}: {error}") from None
    for key, tensor in whole.items():
        tensor.copy_(tensors[key])


def _damaged(tensors: Mapping[str, Tensor]) -> str | None:
    """The first key whose tensor holds NaN, infinity or no floating-point numbers; None where there is none."""
    floating = all(tensor.is_floating_point() for tensor in tensors.values())
    # NaN and infinity survive in a sum, and hundreds of sums are quicker than looking at every value.
    if floating and all(math.isfinite(tensor.sum().item()) for tensor in tensors.values()):
        return None
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            return key
    # Finite numbers whose sum is not.
    return None


def _checked_copies(
    model: nn.Module, tensors: Mapping[str, Tensor], keys: list[str], source: str
) -> list[str]:
    """The keys without the copies of frozen weights that peft may add; each must be the base's own weight."""
    copies = {
        f"{peft_format.PREFIX}{name}.base_layer.weight": layer for name, layer in lora_layers(model).items()
    }
    for key in set(keys) & set(copies):
        if not torch.equal(tensors[key], copies[key].base_weight.to(tensors[key])):
            raise ValueError(f"{source} brings another base weight than the model's; got {key!r}")
    return [key for key in keys if key not in copies]


def _label_hint(model: nn.Module, key: str, got: tuple[int, ...]) -> str:
    name = key.removeprefix(peft_format.PREFIX)
    return f"; load the base with num_labels={got[0]}" if belongs_to(name, injection(model).head) else ""
