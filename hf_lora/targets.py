"""From a model and a config to the modules to adapt. Decides about all of them, changes none."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from hf_lora.architectures import ARCHITECTURES, ROLE_NAMES, Architecture
from hf_lora.config import LoRAConfig
from hf_lora.head import base_prefix, belongs_to
from hf_lora.layers import LAYER_TYPES
from hf_lora.parametrization import is_adaptable

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Target:
    """A weight to adapt: the module it is in, what the module calls it, and its role where that is known."""

    module: str
    tensor: str = "weight"
    role: str | None = None

    @property
    def name(self) -> str:
        """The dotted name users see: the module's, or for a bare parameter its own."""
        return self.module if self.tensor == "weight" else f"{self.module}.{self.tensor}".lstrip(".")


def architecture_of(model: nn.Module) -> Architecture:
    """The table entry of a transformers model. Raises ValueError where there is none, naming what to do."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise ValueError(
            f"projections={'qkvo'!r} needs a transformers model; got {type(model).__name__} without "
            "config.model_type; name the modules with target_modules instead"
        )
    return ARCHITECTURES.get(model_type)


def find_targets(model: nn.Module, config: LoRAConfig, head: Iterable[str] = ()) -> list[Target]:
    """The modules that `config` selects, in the model's order.

    head: dotted names that are never targets.
    Raises ValueError if a requested role, name, pattern or block selects nothing, or selects a module of a
    type that cannot be adapted; the message lists candidates.
    """
    names = [name for name, _ in model.named_modules() if name and not belongs_to(name, head)]
    if config.target_modules is None:
        targets = _by_role(model, names, config.projections)
    else:
        bare = _bare_parameters(model, head) if config.form == "parametrization" else {}
        found = _by_name(model, [*names, *bare], config.target_modules)
        targets = [bare.get(name, Target(name)) for name in found]
    targets = _in_layers(targets, config.layers)
    for target in targets:
        _check_type(target, model.get_submodule(target.module), config.form)
    return targets


def _bare_parameters(model: nn.Module, head: Iterable[str]) -> dict[str, Target]:
    """Parameters that are no module's `weight` or `bias`, by dotted name."""
    targets = (
        Target(module, tensor)
        for module, _, tensor in (name.rpartition(".") for name, _ in model.named_parameters())
    )
    return {t.name: t for t in targets if t.tensor not in ("weight", "bias") and not belongs_to(t.name, head)}


def block_of(name: str) -> int | None:
    """The number of the transformer block that a dotted name lies in: its first number, if it has one."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def has_suffix(name: str, suffix: str) -> bool:
    """Whether `suffix` is the whole of a dotted name or a whole dotted end of it."""
    return name == suffix or name.endswith(f".{suffix}")


def _by_role(model: nn.Module, names: list[str], projections: str) -> list[Target]:
    architecture = architecture_of(model)
    prefix = base_prefix(model)
    inside = [name for name in names if not prefix or name.startswith(f"{prefix}.")]
    targets = []
    for role in projections:
        suffixes = architecture.suffixes(role)
        found = [Target(name, role=role) for name in inside if any(has_suffix(name, s) for s in suffixes)]
        if not found:
            raise ValueError(
                f"the {ROLE_NAMES[role]} projection matches nothing; got {type(model).__name__} with no module "
                f"ending in {' or '.join(suffixes)}; candidates: {_candidates(model, names)}"
            )
        targets += found
    order = {name: index for index, name in enumerate(names)}
    return sorted(targets, key=lambda target: order[target.name])


def _by_name(model: nn.Module, names: list[str], wanted: tuple[str, ...] | str) -> list[str]:
    if wanted == ALL_LINEAR:
        return [name for name in names if _is_linear(model, name)]
    if isinstance(wanted, str):
        found = [name for name in names if re.fullmatch(wanted, name)]
        if not found:
            raise ValueError(
                f"target_modules matches nothing; got the expression {wanted!r}, which must match a whole name; "
                f"candidates: {_candidates(model, names)}"
            )
        return found
    for suffix in wanted:
        if not any(has_suffix(name, suffix) for name in names):
            raise ValueError(
                f"target_modules names a module that {type(model).__name__} does not have; got {suffix!r}; "
                f"candidates: {_candidates(model, names)}"
            )
    return [name for name in names if any(has_suffix(name, suffix) for suffix in wanted)]


def _in_layers(targets: list[Target], layers: tuple[int, ...] | None) -> list[Target]:
    if layers is None:
        return targets
    blocks = {target.name: block_of(target.name) for target in targets}
    count = 1 + max((block for block in blocks.values() if block is not None), default=-1)
    outside = [layer for layer in layers if not -count <= layer < count]
    if outside:
        raise ValueError(
            f"layers names blocks that are not there; got {outside}; expected {-count} to {count - 1}"
            if count
            else f"layers={list(layers)} cannot be used; the adapted modules lie in no numbered block"
        )
    wanted = {layer % count for layer in layers}
    return [target for target in targets if blocks[target.name] in wanted]


def _check_type(target: Target, module: nn.Module, form: str) -> None:
    if form == "parametrization":
        if not is_adaptable(getattr(module, target.tensor, None)):
            raise ValueError(
                f"cannot adapt {target.name!r}; got a {type(module).__name__}; expected a module with a weight, or a "
                "parameter, of at least two dimensions and floating-point numbers"
            )
    elif type(module) not in LAYER_TYPES:
        known = ", ".join(layer_type.__name__ for layer_type in LAYER_TYPES)
        raise ValueError(
            f"cannot adapt {target.name!r}; got a {type(module).__name__}; expected one of {known}; "
            "name other modules with target_modules, or adapt the weight with form='parametrization'"
        )


def _is_linear(model: nn.Module, name: str) -> bool:
    """Whether a name is that of a layer that the module form adapts; bare parameters are not."""
    try:
        return type(model.get_submodule(name)) in LAYER_TYPES
    except AttributeError:
        return False


def _candidates(model: nn.Module, names: list[str], limit: int = 12) -> str:
    """The distinct names of adaptable modules with block numbers starred, as a hint in errors."""
    adaptable = (name for name in names if _is_linear(model, name))
    starred = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in adaptable))
    shown = ", ".join(starred[:limit])
    return shown + (f" and {len(starred) - limit} more" if len(starred) > limit else "") or "none"
