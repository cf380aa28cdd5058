"""Put LoRA into a model in place, take it out, merge it, switch it off, count it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_lora.lora import initializers
from hf_lora.lora.config import FACTORS, VARIANTS, LoRAConfig
from hf_lora.lora.head import belongs_to, find_head
from hf_lora.lora.initializers import INITIALIZERS
from hf_lora.lora.layer import LoRALayer, UpdateSpec
from hf_lora.lora.linear import LoRAParametrization
from hf_lora.lora.quantized import layer_type_of, prepare_quantized
from hf_lora.lora.targets import Target, find_targets

_STATE = "_hf_lora"


@dataclass(frozen=True)
class Placement:
    """Where an adapted weight's parts are: dotted names in the model as it is now."""

    target: Target
    layer: str
    weight: str


@dataclass
class Injection:
    """What was done to a model: kept on the model, so that it can be saved, counted and undone."""

    config: LoRAConfig
    placements: tuple[Placement, ...]
    head: tuple[str, ...]
    required_grad: dict[str, bool]
    frozen_biases: dict[str, Tensor] = field(default_factory=dict)  # the pretrained values of trained biases
    info: Any = None  # kept for whoever put it there, never read here
    fresh: frozenset[str] | None = (
        None  # parameters that the checkpoint lacked, where `load_classifier` looked
    )

    @property
    def targets(self) -> tuple[Target, ...]:
        """The adapted weights, in the model's order."""
        return tuple(placement.target for placement in self.placements)


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters are trained, of how many; shared parameters count once."""

    trainable: int
    total: int
    lora: int
    head: int

    def __str__(self) -> str:
        return f"trainable: {self.trainable:,} of {self.total:,} ({100 * self.trainable / self.total:.2f}%)"


def inject_lora(
    model: nn.Module, config: LoRAConfig, *, head: Iterable[str] | None = None, blank: bool = False
) -> list[str]:
    """Adapt the modules that `config` selects, in place, and freeze everything else but the head.

    head: dotted names of the head's modules; None: what `find_head` finds, without modules inside the encoder.
    blank: leave the factors zero, since `load_adapter` is about to fill them.
    Returns the dotted names of the adapted modules. Raises ValueError, with the model unchanged, if it is adapted
    already, or if the config selects nothing or something that cannot be adapted.
    """
    if is_injected(model):
        raise ValueError("the model has LoRA layers already; call remove_lora(model) first")
    head = find_head(model) if head is None else tuple(head)
    targets = find_targets(model, config, head)
    required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    prepare_quantized(model, head if config.train_head else ())
    placements: list[Placement] = []
    try:
        for target in targets:
            placements.append(_attach(model.get_submodule(target.module), target, config, blank=blank))
    except BaseException:
        for placement in placements:
            cast(LoRALayer, model.get_submodule(placement.layer)).detach()
        raise
    state = Injection(config, tuple(placements), head, required_grad)
    setattr(model, _STATE, state)
    lora = {id(p) for layer in lora_layers(model).values() for p in layer.trained_factors().values()}
    biases = trained_biases(model, state)
    for name, parameter in model.named_parameters():
        is_head = belongs_to(name, head) and config.train_head
        parameter.requires_grad_(id(parameter) in lora or name in biases or is_head)
        if name in biases:
            state.frozen_biases[name] = parameter.detach().clone()
    return [target.name for target in targets]


def is_injected(model: nn.Module) -> bool:
    """Whether `inject_lora` or `load_adapter` was applied to the model."""
    return hasattr(model, _STATE)


def injection(model: nn.Module) -> Injection:
    """What was injected. Raises ValueError for a model without LoRA."""
    if not is_injected(model):
        raise ValueError(
            f"the model has no LoRA layers; got a plain {type(model).__name__}; call inject_lora or load_adapter first"
        )
    return cast(Injection, getattr(model, _STATE))


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapted layers by the dotted names of their modules. Raises ValueError for a model without LoRA."""
    # Loading asks for dozens of layers several times; `get_submodule` takes twice as long.
    return {
        p.target.name: cast(LoRALayer, attrgetter(p.layer)(model) if p.layer else model)
        for p in injection(model).placements
    }


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The factors of every adapted layer, trained or not, as `<module>.lora_A` and so on, whatever the form."""
    return {
        f"{name}.{which}": parameter
        for name, layer in lora_layers(model).items()
        for which in FACTORS
        if (parameter := getattr(layer, which)) is not None
    }


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the classification head by their dotted names in the model."""
    head = injection(model).head
    return {name: parameter for name, parameter in model.named_parameters() if belongs_to(name, head)}


def trainable_parameter_count(model: nn.Module) -> ParameterCount:
    """Exact counts of the trained parameters, all parameters, those of LoRA and those of the head."""
    parameters = list(model.parameters())
    return ParameterCount(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
        lora=sum(p.numel() for p in lora_parameters(model).values()),
        head=sum(p.numel() for p in head_parameters(model).values()),
    )


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The pretrained tensors under the adapter, by name: merged weights and trained biases as they were."""
    state = injection(model)
    layers = lora_layers(model)
    lora = {id(parameter) for parameter in lora_parameters(model).values()}
    moved = {p.weight: f"{p.target.module}.{p.target.tensor}".lstrip(".") for p in state.placements}
    tensors: dict[str, Tensor] = {
        moved.get(name, name): parameter.detach()
        for name, parameter in model.named_parameters()
        if id(parameter) not in lora and not belongs_to(name, state.head)
    }
    tensors.update(state.frozen_biases)
    for placement in state.placements:
        tensors[moved[placement.weight]] = layers[placement.target.name].base_weight.detach()
    return tensors


def merge_lora(model: nn.Module) -> list[str]:
    """Add every update to its weight, in fp32; returns the names of the modules. `unmerge_lora` undoes it bit for bit.

    Raises ValueError, and changes nothing, if the model is merged already or has quantized layers.
    """
    layers = _checked_layers(model, merged=False)
    try:
        for layer in layers.values():
            layer.merge()
    except ValueError:
        for layer in layers.values():
            if layer.merged:
                layer.unmerge()
        raise
    return list(layers)


def unmerge_lora(model: nn.Module) -> list[str]:
    """Undo `merge_lora`, bit for bit. Raises ValueError if the model is not merged."""
    layers = _checked_layers(model, merged=True)
    for layer in layers.values():
        layer.unmerge()
    return list(layers)


def remove_lora(model: nn.Module) -> list[str]:
    """Take the LoRA layers out; returns their names.

    A merged model keeps the merged weights and is then a plain fine-tuned model. Otherwise the encoder is
    again the pretrained one, bit for bit. The head stays as it is. `requires_grad` is as before injection.
    """
    state = injection(model)
    layers = lora_layers(model)
    merged = any(layer.merged for layer in layers.values())
    for layer in layers.values():
        layer.detach()
    parameters = dict(model.named_parameters())
    if not merged:
        _write(parameters, state.frozen_biases)
    for name, required in state.required_grad.items():
        parameters[name].requires_grad_(required)
    delattr(model, _STATE)
    return list(layers)


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the encoder is the pretrained one, biases included; the head stays. Works on merged models too."""
    enabled = {layer: layer.enabled for layer in lora_layers(model).values()}
    biases = injection(model).frozen_biases
    parameters = {name: p for name, p in model.named_parameters() if name in biases}
    trained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        for layer in enabled:
            layer.enabled = False
        _write(parameters, biases)
        yield
    finally:
        for layer, before in enabled.items():
            layer.enabled = before
        _write(parameters, trained)


def _attach(module: nn.Module, target: Target, config: LoRAConfig, *, blank: bool) -> Placement:
    initialization = INITIALIZERS.get(config.init)
    if blank:
        initialization = replace(initialization, make=initializers.blank)
    spec = UpdateSpec(
        rank=config.rank_of(target.name),
        scaling=config.scaling_of(target.name),
        dropout=config.dropout,
        initialization=initialization,
        variant=VARIANTS.get(config.variant),
        parts=target.parts,
        input_first=target.input_first,
    )
    inside = f"{target.module}." if target.module else ""
    layer_type = layer_type_of(module) if target.tensor == "weight" else None
    if config.form == "module" and not target.bypassed and layer_type is not None:
        layer_type.attach(module, spec)
        return Placement(target, layer=target.module, weight=f"{inside}{target.tensor}")
    LoRAParametrization.attach(module, target.tensor, spec)
    parametrizations = f"{inside}parametrizations.{target.tensor}"
    return Placement(target, layer=f"{parametrizations}.0", weight=f"{parametrizations}.original")


def trained_biases(model: nn.Module, state: Injection) -> set[str]:
    """Names of the biases outside the head that the config's `bias` mode trains."""
    if state.config.bias == "none":
        return set()
    adapted = {f"{target.module}.bias" for target in state.targets}
    names = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"}
    chosen = names if state.config.bias == "all" else names & adapted
    return {name for name in chosen if not belongs_to(name, state.head)}


def _checked_layers(model: nn.Module, *, merged: bool) -> dict[str, LoRALayer]:
    layers = lora_layers(model)
    if wrong := [name for name, layer in layers.items() if layer.merged is not merged]:
        state = "not merged" if merged else "merged already"
        hint = "merge_lora does it" if merged else "unmerge_lora undoes it"
        raise ValueError(f"the model is {state}; got {len(wrong)} such layers, first {wrong[0]!r}; {hint}")
    return layers


@torch.no_grad()
def _write(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
