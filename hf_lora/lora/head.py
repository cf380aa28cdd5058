"""Which parts of a model are its classification head: found by structure, never by name.

The head is every parameterised child outside `model.base_model` (`classifier`, but also DeBERTa's `pooler`), and the
modules inside it for which the checkpoint had no weights. It is trained and saved with the adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# A checkpoint that lacks more of the encoder than this belongs to another architecture.
MAX_FRESH_SHARE = 0.2


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters are trained, of how many; shared parameters count once."""

    trainable: int
    total: int
    lora: int
    head: int

    def __str__(self) -> str:
        return f"trainable: {self.trainable:,} of {self.total:,} ({100 * self.trainable / self.total:.2f}%)"


def base_prefix(model: nn.Module) -> str:
    """The dotted name of `model.base_model` inside `model`; "" for a bare encoder or any other module."""
    base = getattr(model, "base_model", model)
    return next((name for name, module in model.named_modules() if module is base), "")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of what `torch.compile` and data parallelism put around it."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif (compiled := model._modules.get("_orig_mod")) is not None:
            model = compiled
        else:
            return model


def find_head(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameterised children (and bare parameters) outside the encoder; () where there is none."""
    prefix = base_prefix(model)
    if not prefix:
        return ()
    encoder = prefix.partition(".")[0]
    children = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    bare = [name for name, _ in model.named_parameters(recurse=False)]
    return tuple(name for name in (*children, *bare) if name != encoder)


def parts_without(model: nn.Module, names: Iterable[str], excluded: Iterable[str]) -> list[str]:
    """The modules or parameters `names`; of one that has `excluded` modules inside, its largest parts without them."""
    parts, excluded = list[str](), set(excluded)
    for name in names:
        if not any(belongs_to(module, [name]) for module in excluded):
            parts.append(name)
        elif name not in excluded:
            children = model.get_submodule(name).named_children()
            inner = [f"{name}.{part}" for part, child in children if any(True for _ in child.parameters())]
            parts += parts_without(model, inner, excluded)
    return parts


def belongs_to(name: str, modules: Iterable[str]) -> bool:
    """Whether the dotted `name` is one of `modules` or lies inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def shared(model: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """Of the parameters in `names`, those in whose memory another is, with its name; both as `names` calls them."""
    held = [
        (f"{name}.{which}".lstrip("."), id(parameter), _place(parameter))
        for name, module in model.named_modules()
        for which, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    wanted = [entry for entry in held if entry[0] in names]
    return {
        names[name]: names.get(other, other)
        for name, own, place in wanted
        for other, its, another in held
        if other != name and (own == its or _overlap(place, another))
    }


def _place(parameter: nn.Parameter) -> tuple[torch.device, int, int] | None:
    """Device, first and last address. Of other types and on the meta device there are none to compare."""
    start = parameter.data_ptr() if type(parameter) is nn.Parameter else 0
    return (parameter.device, start, start + parameter.numel() * parameter.element_size()) if start else None


def _overlap(one: tuple[torch.device, int, int] | None, two: tuple[torch.device, int, int] | None) -> bool:
    return bool(one and two) and one[0] == two[0] and one[1] < two[2] and two[1] < one[2]  # type: ignore[index]


def fresh_modules(model: nn.Module, missing_keys: Iterable[str]) -> tuple[str, ...]:
    """The modules inside the encoder that a checkpoint left freshly initialised.

    missing_keys: what `from_pretrained(..., output_loading_info=True)` reports.
    Raises ValueError if so much of the encoder is missing that the checkpoint must be another model's.
    """
    prefix, head = base_prefix(model), find_head(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    encoder = {name for name in sizes if not belongs_to(name, head)}
    missing = {name for name in missing_keys if name in encoder}
    if missing and sum(sizes[n] for n in missing) > MAX_FRESH_SHARE * sum(sizes[n] for n in encoder):
        raise ValueError(
            f"the checkpoint does not fit the model; got no weights for {len(missing)} of {len(encoder)} encoder "
            f"tensors, such as {sorted(missing)[0]!r}; expected a checkpoint of a {type(model).__name__}"
        )
    fresh: dict[str, None] = {}
    for parameter in sorted(missing):
        # The largest module around it, inside the encoder, none of whose parameters were loaded.
        module = parameter.rpartition(".")[0]
        while (parent := module.rpartition(".")[0]) not in ("", prefix):
            if not {name for name in encoder if name.startswith(f"{parent}.")} <= missing:
                break
            module = parent
        fresh[module] = None
    return tuple(fresh)


def output_layer_in(model: nn.Module, head: Iterable[str], width: int) -> tuple[str, nn.Linear] | None:
    """The linear layer of a head whose outputs are the logits, with its name: the last one that is `width` wide."""
    head = tuple(head)
    layers = ((name, module) for name, module in model.named_modules() if belongs_to(name, head))
    found = [
        (name, each) for name, each in layers if isinstance(each, nn.Linear) and each.out_features == width
    ]
    return found[-1] if found else None


def cast_inputs(model: nn.Module, layers: Iterable[str]) -> None:
    """Let layers, by dotted names, cast their inputs to their own type; autocast, where it is on, decides itself."""
    for name in layers:
        layer = model.get_submodule(name)
        # Once: a model whose base came in half precision may be cast again.
        if _cast_inputs not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_cast_inputs)


def _cast_inputs(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    own = next(layer.parameters(recurse=False))
    if not own.is_floating_point() or torch.is_autocast_enabled(own.device.type):
        return inputs
    floats = (isinstance(value, Tensor) and value.is_floating_point() for value in inputs)
    return tuple(x.to(own.dtype) if cast else x for x, cast in zip(inputs, floats, strict=True))
