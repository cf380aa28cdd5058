"""What an adapter puts into a model, taken from a model that has it: updates of linear layers, and whole modules."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lora.lora.head import base_prefix, belongs_to, unwrapped
from hf_lora.lora.inject import Injection, injection, lora_layers, trained_biases
from hf_lora.lora.layer import LoRALayer
from hf_lora.lora.targets import Target
from hf_lora.stacks.layers import LinearUpdate


@dataclass(frozen=True)
class Contents:
    """An adapter by the dotted names of modules: updates of linear layers, and modules with weights of its own.

    plain: of those modules that an adapter switched off does not keep, what stands there then; None: the model's own.
    """

    updates: dict[str, LinearUpdate] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    plain: dict[str, nn.Module | None] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The highest rank."""
        return max((update.rank for update in self.updates.values()), default=0)


@torch.no_grad()
def contents_of(model: nn.Module) -> Contents:
    """The adapter of an injected model, copied. Raises ValueError, by name, for what cannot be stacked."""
    state, model = injection(model), unwrapped(model)
    layers = lora_layers(model)
    modules = {target.module: model.get_submodule(target.module) for target in state.targets}
    if refused := [target.name for target in state.targets if not _stackable(target, modules[target.module])]:
        raise not_sharable(
            f"{len(refused)} updates of other weights than linear layers have, first {refused[0]!r}"
        )
    biases, prefix = _biases(model, state), base_prefix(model)
    contents = Contents()
    for target in state.targets:
        if not belongs_to(target.module, [prefix]):
            layer = modules[target.module]
            contents.modules[target.module] = _without_lora(layer, merged=True)
            contents.plain[target.module] = _without_lora(layer, merged=False)
            continue
        bias = biases.pop(f"{target.module}.bias", None)
        update = _update(layers[target.name], bias, modules[target.module])
        if update is not None:
            contents.updates[target.module] = update
    own = set(_leaves(model, state.head))
    for name, (before, after) in biases.items():
        module = name.rpartition(".")[0]
        if not belongs_to(module, [prefix]):
            whole = contents.modules.setdefault(module, _copied(model.get_submodule(module)))
            plain = contents.plain.setdefault(module, copy.deepcopy(whole))
            cast(nn.Module, plain).get_parameter("bias").copy_(before)
        elif isinstance(model.get_submodule(module), nn.Linear | Conv1D):
            contents.updates[module] = LinearUpdate(shift=(after - before).float())
        else:
            own.add(module)
            contents.plain[module] = None
    for name in sorted(own):
        contents.modules[name] = _copied(model.get_submodule(name))
    return contents


def _copied(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(False).eval()


def not_sharable(got: str, expected: str = "updates of linear layers, and a head of modules") -> ValueError:
    """The error of an adapter that only a model of its own can have."""
    return ValueError(
        f"the adapter cannot share its model with others; got {got}; expected {expected}; load it with TextClassifier"
    )


def _without_lora(module: nn.Module, *, merged: bool) -> nn.Module:
    """A plain copy of an adapted module, with the update in its weight or without it."""
    module = copy.deepcopy(module)
    layer = next(part for part in module.modules() if isinstance(part, LoRALayer))
    if layer.merged != merged:
        (layer.merge if merged else layer.unmerge)()
    layer.detach()
    return module.requires_grad_(False).eval()


def _stackable(target: Target, module: nn.Module) -> bool:
    if target.bypassed or target.tensor != "weight":
        return False
    return isinstance(module, nn.Linear | Conv1D)


def _biases(model: nn.Module, state: Injection) -> dict[str, tuple[Tensor, Tensor]]:
    """The pretrained and the adapter's value of every trained bias that moved, by name."""
    parameters = dict(model.named_parameters())
    moved = {name: (state.frozen_biases[name], parameters[name]) for name in trained_biases(model, state)}
    return {name: values for name, values in moved.items() if not torch.equal(*values)}


def _update(layer: LoRALayer, bias: tuple[Tensor, Tensor] | None, module: nn.Module) -> LinearUpdate | None:
    """The update of a layer with its bias before and after training; None where the adapter does nothing."""
    lora_A, lora_B = layer.factors()
    scale, shift = None, None if bias is None else (bias[1] - bias[0]).float()
    if layer.lora_magnitude is not None:
        moved = layer.base_weight.to(lora_A.dtype) + layer.delta_weight()
        scale = layer.lora_magnitude / layer.layout.row_norms(moved)
        before = bias[0] if bias is not None else cast(Tensor | None, module.bias)
        if before is not None:
            # What is scaled has the pretrained bias in it.
            after = before if bias is None else bias[1]
            shift = after.float() - scale * before.float()
    if not lora_B.any():
        lora_A = None  # type: ignore[assignment]
    if lora_A is None and scale is None and shift is None:
        return None
    factors = (
        (None, None) if lora_A is None else (lora_A.detach().clone(), (lora_B * layer.scaling).T.detach())
    )
    return LinearUpdate(*factors, scale=scale, shift=shift)


def _leaves(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The modules inside `names` that have parameters of their own, without those inside another of them."""
    names, found = tuple(names), list[str]()
    for name, module in model.named_modules():
        if (
            belongs_to(name, names)
            and not belongs_to(name, found)
            and any(True for _ in module.parameters(recurse=False))
        ):
            found.append(name)
    bare: Any = [name for name, _ in model.named_parameters(recurse=False) if belongs_to(name, names)]
    if bare:
        raise not_sharable(f"a head with the bare parameter {bare[0]!r}")
    return found
