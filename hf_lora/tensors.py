"""The tensors of an adapter file: from an injected model, and strictly back into one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from hf_lora import peft_format
from hf_lora.head import belongs_to
from hf_lora.inject import injection, lora_layers, trained_biases
from hf_lora.update import FACTORS


def adapter_tensors(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What is saved, under PEFT's keys: A, B, the head and trained biases, fp32 on the CPU, contiguous."""
    own = model.state_dict() if state_dict is None else state_dict
    return {key: as_saved(tensor) for key, tensor in _file(model, own)}


def as_saved(tensor: Tensor) -> Tensor:
    """A tensor as adapter files hold it: fp32 on the CPU, and a copy, since safetensors refuses shared memory."""
    return tensor.detach().to("cpu", torch.float32).contiguous().clone()


def _file(model: nn.Module, own: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The keys and tensors of an adapter file, made from the model's tensors by name."""
    layers = lora_layers(model)
    for placement in injection(model).placements:
        layer = layers[placement.target.name]
        factors = {
            name: own[f"{placement.layer}.{name}"] for name in FACTORS if getattr(layer, name) is not None
        }
        for key, tensor in layer.to_peft(factors).items():
            yield f"{peft_format.PREFIX}{placement.target.name}.{key}", tensor
    yield from ((key, own[name]) for key, name in _whole_tensors(model).items())


def _whole_tensors(model: nn.Module) -> dict[str, str]:
    """The keys of what is saved as it is, with the names in the model: the head and the trained biases."""
    state = injection(model)
    targets = {target.module for target in state.targets}
    names = {peft_format.PREFIX + name: name for name in model.state_dict() if belongs_to(name, state.head)}
    return names | {
        peft_format.bias_key(name, targets): name for name in sorted(trained_biases(model, state))
    }


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Copy an adapter file's tensors into an injected model: every one, each with its exact shape.

    Raises ValueError, before any change, for missing, unexpected, wrongly shaped or non-finite tensors.
    """
    own = model.state_dict()
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in own.items()}
    expected = {key: tuple(tensor.shape) for key, tensor in _file(model, shapes)}
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
        if not tensors[key].is_floating_point() or not torch.isfinite(tensors[key]).all():
            raise ValueError(f"{source} is damaged; {key!r} holds something else than finite numbers")
    for name, layer in lora_layers(model).items():
        prefix = f"{peft_format.PREFIX}{name}."
        own_keys = {key.removeprefix(prefix): tensors[key] for key in keys if key.startswith(prefix)}
        try:
            layer.load_peft(own_keys)
        except ValueError as error:
            raise ValueError(f"{source} does not fit {name!r}: {error}") from None
    for key, name in _whole_tensors(model).items():
        own[name].copy_(tensors[key])


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
