"""Put LoRA into a model in place, take it out, merge it, switch it off, count it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_lora._text import shortened
from hf_lora.lora.config import FACTORS, LoRAConfig
from hf_lora.lora.head import ParameterCount as ParameterCount
from hf_lora.lora.head import belongs_to, find_head, shared, unwrapped
from hf_lora.lora.layer import LoRALayer
from hf_lora.lora.linear import check_loaded
from hf_lora.lora.quantized import prepare_quantized
from hf_lora.lora.targets import Placement, Target, attach, find_targets

logger = logging.getLogger(__name__)

_STATE = "_hf_lora"
_SAVE = "save_pretrained"


@dataclass
class Injection:
    """What was done to a model: kept on the model, so that it can be saved, counted and undone."""

    config: LoRAConfig
    placements: tuple[Placement, ...]
    head: tuple[str, ...]
    required_grad: dict[str, bool]
    hook: RemovableHandle
    frozen_biases: dict[str, Tensor] = field(default_factory=dict)  # the pretrained values of trained biases
    info: Any = None  # kept for whoever put it there, never read here
    fresh: frozenset[str] | None = None  # parameters the checkpoint lacked, where `load_classifier` looked

    @property
    def targets(self) -> tuple[Target, ...]:
        """The adapted weights, in the model's order."""
        return tuple(placement.target for placement in self.placements)


def inject_lora(
    model: nn.Module, config: LoRAConfig, *, head: Iterable[str] | None = None, blank: bool = False
) -> list[str]:
    """Adapt the modules that `config` selects, in place, and freeze everything else but the head.

    head: dotted names of the head's modules; None: what `find_head` finds, without modules inside the encoder.
    blank: leave the factors zero, since `load_adapter` is about to fill them.
    Returns the dotted names of the adapted modules. Raises ValueError, with the model unchanged, if it is adapted
    already, or if the config selects nothing or something that cannot be adapted.
    """
    model = unwrapped(model)
    if is_injected(model):
        raise ValueError("the model has LoRA layers already; call remove_lora(model) first")
    parts = model.named_modules()
    if adapted := [n for n, p in parts if isinstance(p, LoRALayer) or type(p).__module__.startswith("peft.")]:
        raise ValueError(
            f"a part of the model has LoRA layers already; got {len(adapted)}, first {adapted[0]!r}; expected a plain "
            "model; call remove_lora on the part or the other model that they were put into"
        )
    head = find_head(model) if head is None else tuple(head)
    targets = find_targets(model, config, head)
    # Those of a file may be for more modules than it has.
    if not blank and (unused := config.unused_patterns(target.name for target in targets)):
        logger.warning(
            "patterns of ranks or alphas that decide about no adapted module: %s", shortened(unused)
        )
    required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    prepare_quantized(model, head if config.train_head else ())
    placements: list[Placement] = []
    try:
        for target in targets:
            placements.append(attach(model.get_submodule(target.module), target, config, blank=blank))
    except BaseException:
        for placement in placements:
            cast(LoRALayer, model.get_submodule(placement.layer)).detach()
        raise
    hook = model.register_load_state_dict_pre_hook(_check_loaded)
    state = Injection(config, tuple(placements), head, required_grad, hook)
    setattr(model, _STATE, state)
    if hasattr(model, _SAVE):
        # A partial, which is copied and pickled with the model that it saves.
        setattr(model, _SAVE, partial(_save_plain, model))
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
    return hasattr(unwrapped(model), _STATE)


def injection(model: nn.Module) -> Injection:
    """What was injected. Raises ValueError for a model without LoRA."""
    model = unwrapped(model)
    if not is_injected(model):
        raise ValueError(
            f"the model has no LoRA layers; got a plain {type(model).__name__}; call inject_lora or load_adapter first"
        )
    return cast(Injection, getattr(model, _STATE))


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapted layers by the dotted names of their modules. Raises ValueError for a model without LoRA."""
    state, model = injection(model), unwrapped(model)
    # Loading asks for dozens of layers several times; `get_submodule` takes twice as long.
    return {p.target.name: attrgetter(p.layer)(model) for p in state.placements}


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
    head, parameters = injection(model).head, unwrapped(model).named_parameters()
    return {name: parameter for name, parameter in parameters if belongs_to(name, head)}


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
    state, model = injection(model), unwrapped(model)
    layers = lora_layers(model)
    lora = {id(parameter) for parameter in lora_parameters(model).values()}
    moved = {p.weight: p.plain for p in state.placements}
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

    Raises ValueError, and changes nothing, if the model is merged already, has quantized layers, or shares an adapted
    weight with another module.
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
    for layer in reversed(layers.values()):
        layer.unmerge()
    return list(layers)


def shared_weights(model: nn.Module) -> dict[str, str]:
    """The adapted weights that another module uses too, with the name of its parameter: a merge would change both."""
    return shared(unwrapped(model), {p.weight: p.plain for p in injection(model).placements})


def plain_state(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The `state_dict` of the model with the updates in its weights, without LoRA; the model stays as it is.

    state_dict: whole tensors of the model, where it is sharded. Raises ValueError where `merge_lora` does.
    """
    layers = _checked_layers(model, merged=any(layer.merged for layer in lora_layers(model).values()))
    own = dict(unwrapped(model).state_dict() if state_dict is None else state_dict)
    for placement in injection(model).placements:
        layer = layers[placement.target.name]
        state = {part: own.pop(key) for part, key in placement.parts.items() if key in own}
        if state:
            own[placement.plain] = state["weight"] if layer.merged else layer.effective_weight(state)
    return own


def remove_lora(model: nn.Module) -> list[str]:
    """Take the LoRA layers out; returns their names.

    A merged model keeps the merged weights and is then a plain fine-tuned model. Otherwise the encoder is
    again the pretrained one, bit for bit. The head stays as it is. `requires_grad` is as before injection.
    """
    state, model = injection(model), unwrapped(model)
    layers = lora_layers(model)
    merged = any(layer.merged for layer in layers.values())
    for layer in layers.values():
        layer.detach()
    parameters = dict(model.named_parameters())
    if not merged:
        _write(parameters, state.frozen_biases)
    for name in parameters.keys() & state.required_grad:
        parameters[name].requires_grad_(state.required_grad[name])
    delattr(model, _STATE)
    state.hook.remove()
    vars(model).pop(_SAVE, None)
    return list(layers)


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the encoder is the pretrained one, biases included; the head stays. Works on merged models too."""
    enabled = {layer: layer.enabled for layer in lora_layers(model).values()}
    biases, model = injection(model).frozen_biases, unwrapped(model)
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
    if not merged and (found := shared_weights(model)):
        name, other = next(iter(found.items()))
        raise ValueError(
            f"cannot merge {name!r}, whose weight is {other!r} too; got {len(found)} such weights, whose merge would "
            "change the other module; expected none; predict with the adapter unmerged, or adapt other modules"
        )
    return layers


def _check_loaded(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Before `load_state_dict`: `check_loaded` for every adapted weight."""
    layers = lora_layers(model)
    for placement in injection(model).placements:
        name = prefix + placement.plain
        state = {part: state_dict.get(prefix + key) for part, key in placement.parts.items()}
        state = {"weight": state_dict.get(name), **{part: t for part, t in state.items() if t is not None}}
        check_loaded(layers[placement.target.name], state, name)


def _save_plain(model: nn.Module, *places: Any, state_dict: Any = None, **options: Any) -> Any:
    """transformers' `save_pretrained` of `plain_state`: `from_pretrained` gives a model with the same outputs."""
    plain, own = plain_state(model, state_dict), cast(Any, type(model)).save_pretrained
    return own(model, *places, state_dict=plain, **options)


@torch.no_grad()
def _write(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
