"""The weights of a model that a config selects, a guess where its architecture is unknown, and adapting one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lora._choices import nearest
from hf_lora._text import Pattern, dotted_ends
from hf_lora.lora import initializers
from hf_lora.lora.architectures import ARCHITECTURES, ROLE_NAMES, ROW_LAYOUTS, Architecture, Projection
from hf_lora.lora.config import FACTORS, VARIANTS, LoRAConfig
from hf_lora.lora.head import base_prefix, belongs_to
from hf_lora.lora.layer import UpdateSpec, layout_of
from hf_lora.lora.linear import LAYER_TYPES, LoRAParametrization, is_adaptable
from hf_lora.lora.quantized import layer_type_of

ALL_LINEAR = "all-linear"
# In a dotted name the number of a block.
_BLOCK = re.compile(r"(?:^|\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Target:
    """A weight to adapt: its module, its name there, and its roles where they are known.

    parts: for a fused weight the output rows of each role in `role`, each adapted by itself.
    input_first, bypassed: as in `Projection`.
    """

    module: str
    tensor: str = "weight"
    role: str | None = None
    parts: tuple[tuple[int, ...], ...] | None = None
    input_first: bool = False
    bypassed: bool = False

    @property
    def name(self) -> str:
        """The dotted name users see: the module's, or for a bare parameter its own."""
        return self.module if self.tensor == "weight" else f"{self.module}.{self.tensor}".lstrip(".")


@dataclass(frozen=True)
class Placement:
    """Where an adapted weight's parts are: dotted names in the model as it is now; `plain`: in that without LoRA."""

    target: Target
    layer: str
    weight: str

    @property
    def plain(self) -> str:
        return f"{self.target.module}.{self.target.tensor}".lstrip(".")

    @property
    def parts(self) -> dict[str, str]:
        """The names in a `state_dict` of the weight and of its factors."""
        return {"weight": self.weight, **{factor: f"{self.layer}.{factor}" for factor in FACTORS}}


def architecture_of(model: nn.Module) -> Architecture:
    """The table entry of a transformers model. Raises ValueError where there is none, with a guess and its use."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise ValueError(
            f"projections='qkvo' needs a transformers model; got {type(model).__name__} without "
            "config.model_type; name the modules with target_modules instead"
        )
    if model_type not in ARCHITECTURES:
        raise ValueError(f"the projections of model type {model_type!r} are not known; {guess(model)}")
    architecture = ARCHITECTURES.get(model_type)
    if architecture.reason is not None:
        raise ValueError(
            f"{model_type} cannot be adapted by role: it {architecture.reason}; use target_modules"
        )
    return architecture


def find_targets(model: nn.Module, config: LoRAConfig, head: Iterable[str] = ()) -> list[Target]:
    """The weights that `config` selects, in the model's order; `head` are dotted names that are never targets.

    Raises ValueError, which lists candidates, if a role, name, pattern or block selects nothing, or something that
    cannot be adapted.
    """
    head = tuple(head)
    modules = dict(model.named_modules())
    names = [name for name in modules if name and not belongs_to(name, head)]
    if config.target_modules is None:
        targets = _by_role(model, modules, names, config.projections)
    else:
        bare = _bare_parameters(model, head)
        found = _by_name(model, names, bare, config.target_modules)
        targets = [bare.get(name, Target(name)) for name in found]
    targets = _in_layers(targets, config, names)
    for target in targets:
        _check_type(target, modules[target.module])
    return targets


def attach(module: nn.Module, target: Target, config: LoRAConfig, *, blank: bool) -> Placement:
    """Adapt one weight of a module in place. blank: with factors of zeros."""
    initialization = initializers.INITIALIZERS.get(config.init)
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


def block_of(name: str) -> int | None:
    """The number of the transformer block that a dotted name lies in: its first number, if it has one."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def has_suffix(name: str, suffix: str) -> bool:
    """Whether `suffix` is the whole of a dotted name or a whole dotted end of it."""
    return name == suffix or name.endswith(f".{suffix}")


def has_module_form(module: nn.Module, tensor: str = "weight") -> bool:
    """Whether a weight can be adapted by a forward of ours; otherwise it is parametrized."""
    return tensor == "weight" and layer_type_of(module) is not None


def _by_role(
    model: nn.Module, modules: Mapping[str, nn.Module], names: list[str], projections: str
) -> list[Target]:
    architecture = architecture_of(model)
    prefix = base_prefix(model)
    inside = [name for name in names if not prefix or name.startswith(f"{prefix}.")]
    if architecture.skip:
        inside = [name for name in inside if not set(architecture.skip) & set(name.split("."))]
    places: dict[tuple[str, str], tuple[str, Projection]] = {}
    for role in projections:
        declared = architecture.projections(role)
        pairs = ((name, place) for name in inside for place in declared if has_suffix(name, place.suffix))
        found = [(name, place) for name, place in pairs if hasattr(modules[name], place.tensor)]
        if not found:
            wanted = " or ".join(place.suffix for place in declared) or "no such suffix"
            raise ValueError(
                f"the {ROLE_NAMES[role]} projection matches nothing; got {type(model).__name__} with no module "
                f"ending in {wanted}; candidates: {_candidates(model, names)}"
            )
        for name, place in found:
            roles, _ = places.get((name, place.tensor), ("", place))
            places[name, place.tensor] = (roles + role, place)
    targets = []
    for (module, tensor), (roles, place) in places.items():
        parts = None
        if place.rows is not None:
            out_features, _ = layout_of(modules[module]).features(getattr(modules[module], tensor).shape)
            rows = ROW_LAYOUTS.get(place.rows)(model.config, out_features)
            parts = tuple(tuple(row for block in rows[role] for row in block) for role in roles)
        targets.append(Target(module, tensor, roles, parts, place.input_first, place.bypassed))
    return sorted(targets, key=lambda target: names.index(target.module))


def _bare_parameters(model: nn.Module, head: tuple[str, ...]) -> dict[str, Target]:
    """Parameters that are no module's `weight` or `bias`, by dotted name."""
    split = (name.rpartition(".") for name, _ in model.named_parameters())
    targets = (Target(module, tensor) for module, _, tensor in split if tensor not in ("weight", "bias"))
    return {target.name: target for target in targets if not belongs_to(target.name, head)}


def _by_name(
    model: nn.Module, names: list[str], bare: Iterable[str], wanted: tuple[str, ...] | str
) -> list[str]:
    if wanted == ALL_LINEAR:
        if linear := [name for name in names if isinstance(model.get_submodule(name), nn.Linear | Conv1D)]:
            return linear
        raise ValueError(f"target_modules='all-linear' selects nothing; got a {type(model).__name__}")
    everything = [*names, *bare]
    if isinstance(wanted, str):
        expression = Pattern("target_modules", wanted)
        if found := [name for name in everything if expression.matches(name)]:
            return found
        raise ValueError(
            f"target_modules matches nothing; got the expression {wanted!r}, which must match a whole name; "
            f"candidates: {_candidates(model, names)}"
        )
    ends, chosen = {end for name in everything for end in dotted_ends(name)}, set(wanted)
    for suffix in wanted:
        if suffix not in ends:
            raise ValueError(
                f"target_modules names a module that {type(model).__name__} does not have; got {suffix!r}; "
                f"candidates: {_candidates(model, names)}{nearest(suffix, sorted(ends))}"
            )
    return [name for name in everything if not chosen.isdisjoint(dotted_ends(name))]


def _in_layers(targets: list[Target], config: LoRAConfig, names: Iterable[str]) -> list[Target]:
    """The targets in the config's blocks, each of which has to hold one; nothing that is asked for goes without."""
    if config.layers is None:
        return targets
    blocks = {target.name: block_of(target.name) for target in targets}
    lists = {_BLOCK.split(name, maxsplit=1)[0] for name, block in blocks.items() if block is not None}
    numbered = (name for name in names if _BLOCK.split(name, maxsplit=1)[0] in lists)
    count = 1 + max((block for name in numbered if (block := block_of(name)) is not None), default=-1)
    given = f"layers={list(config.layers)}"
    if not count:
        raise ValueError(f"{given} cannot be used; the adapted modules lie in no numbered block")
    if outside := [layer for layer in config.layers if not -count <= layer < count]:
        raise ValueError(
            f"layers names blocks that are not there; got {outside}; expected {-count} to {count - 1}"
        )
    wanted = {layer % count for layer in config.layers}
    there = {block for block in blocks.values() if block is not None}
    if not wanted <= there:
        raise ValueError(
            f"layers names blocks without a module to adapt; got {sorted(wanted - there)}; expected some of "
            f"{sorted(there)}"
        )
    kept = [target for target in targets if blocks[target.name] in wanted]
    by_role = config.target_modules is None
    for what in config.projections if by_role else config.target_modules or ():
        among = (what in (t.role or "") if by_role else has_suffix(t.name, what) for t in kept)
        if not isinstance(config.target_modules, str) and not any(among):
            raise ValueError(
                f"{given} leaves out all of {what!r}, which is to be adapted; expected blocks that have it; leave out "
                "layers, or select with one regular expression in target_modules"
            )
    return kept


def _check_type(target: Target, module: nn.Module) -> None:
    if not has_module_form(module, target.tensor) and not is_adaptable(getattr(module, target.tensor, None)):
        known = ", ".join(layer_type.__name__ for layer_type in LAYER_TYPES)
        raise ValueError(
            f"cannot adapt {target.name!r}; got a {type(module).__name__}; expected one of {known}, or anything "
            f"with a floating-point {target.tensor} of at least two dimensions"
        )


def _candidates(model: nn.Module, names: list[str], limit: int = 12) -> str:
    """The distinct names of linear modules with block numbers starred, as a hint in errors."""
    adaptable = (name for name in names if has_module_form(model.get_submodule(name)))
    starred = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in adaptable))
    shown = ", ".join(starred[:limit])
    return shown + (f" and {len(starred) - limit} more" if len(starred) > limit else "") or "none"


# What modeling files call each projection, as the last part of the name.
_USUAL = {
    "q": re.compile(r"(q|query|wq|to_q|q_proj|q_lin|query_proj|query_layer|q_head)"),
    "k": re.compile(r"(k|key|wk|to_k|k_proj|k_lin|key_proj|key_layer|k_head)"),
    "v": re.compile(r"(v|value|wv|to_v|v_proj|v_lin|value_proj|value_layer|v_head)"),
    "o": re.compile(r"(o|wo|to_out|o_proj|out_proj|out_lin|post_proj|dense)"),
}


def guess(model: nn.Module) -> str:
    """One sentence: what looks like q, k, v and o, and the ways to use it; or that nothing does."""
    found = {role: suffix for role in _USUAL if (suffix := _suffix(model, role)) is not None}
    if not {"q", "k", "v"} <= set(found):
        return "nothing in it looks like an attention with separate projections; name modules with target_modules"
    listed = ", ".join(f"{role}={suffix}" for role, suffix in found.items())
    return (
        f"it looks like {listed}; if that is right, pass target_modules={list(found.values())}, or register it: "
        "hf_lora.lora.architectures.ARCHITECTURES.register(model_type, Architecture(...))"
    )


def _suffix(model: nn.Module, role: str) -> str | None:
    """The shortest end, parent included, that selects the names that look like a role and nothing else."""
    prefix = base_prefix(model)
    linear = (name for name, module in model.named_modules() if type(module) in LAYER_TYPES)
    names = [name for name in linear if not prefix or name.startswith(f"{prefix}.")]
    split = [name.rpartition(".") for name in names]
    alike = [
        f"{parent}.{last}"
        for parent, _, last in split
        if "att" in parent.lower() and _USUAL[role].fullmatch(last)
    ]
    for length in range(2, 5):
        ends = {".".join(name.split(".")[-length:]) for name in alike}
        if len(ends) != 1:
            return None
        end = ends.pop()
        if [name for name in names if name.endswith(f".{end}")] == alike:
            return end
    return None
