"""PEFT's format: `adapter_config.json`, and the names of the tensors in `adapter_model.safetensors`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_lora._files import check_types, shortened
from hf_lora.lora.config import FACTORS, VARIANTS, LoRAConfig
from hf_lora.lora.head import belongs_to
from hf_lora.lora.inject import Injection, injection, lora_layers, trained_biases
from hf_lora.lora.targets import has_suffix
from hf_lora.models.pooling import HEAD as POOLED_HEAD

PREFIX = "base_model.model."
# Written into the file: the release of peft that the format was tested with.
PEFT_VERSION = "0.21.2"

# PEFT's options that hf_lora does not have; each is unused where it is null, false or an empty list.
_UNSUPPORTED = (
    *("layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens"),
    *("arrow_config", "monteclora_config", "kasa_config", "velora_config"),
    *("use_bdlora", "use_qalora", "lora_bias"),
)
_UNUSED: tuple[Any, ...] = (None, False, [])
# Initializations that leave the base weights alone; the others rewrite them on load.
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
# The types of the keys that are read; each may also be null.
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("bias", "base_model_name_or_path", "revision"), (str,)),
    **dict.fromkeys(("use_dora", "use_rslora"), (bool,)),
    **dict.fromkeys(("lora_alpha", "lora_dropout"), (int, float)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict,)),
    "r": (int,),
    "target_modules": (list, str),
    "modules_to_save": (list,),
}
_FACTOR_ENDS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")


def to_peft(
    model: nn.Module, state: Injection, *, base_name: str | None, revision: str | None
) -> dict[str, Any]:
    """The contents of `adapter_config.json` for an injected model."""
    config = state.config
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else None,
        "peft_version": PEFT_VERSION,
        "base_model_name_or_path": base_name,
        "revision": revision,
        "inference_mode": True,
        **_ranks_and_alphas(model, config),
        "lora_dropout": config.dropout,
        "target_modules": sorted(shortest_suffixes(model, state)),
        # peft looks these modules up in the base model, which has no pooled head.
        "modules_to_save": sorted(name for name in state.head if name != POOLED_HEAD) or None,
        "bias": config.bias,
        "init_lora_weights": True,
        "use_rslora": config.scaling == "rslora",
        "use_dora": VARIANTS.get(config.variant).magnitude,
        "lora_bias": False,
        "fan_in_fan_out": False,
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
    }


def from_peft(values: Mapping[str, Any], keys: Iterable[str]) -> LoRAConfig:
    """The LoRAConfig for the values of an `adapter_config.json`; the adapted modules are those of the tensors' keys.

    Raises ValueError for an option that hf_lora does not have, and for tensors of modules outside `target_modules`.
    """
    if values.get("peft_type") != "LORA":
        raise ValueError(
            f"not a LoRA adapter; got peft_type={shortened(values.get('peft_type'))}; expected 'LORA'"
        )
    check_types(values, _KINDS, "the adapter's PEFT configuration")
    for key in _UNSUPPORTED:
        if values.get(key) not in _UNUSED:
            raise ValueError(
                f"the adapter uses {key}, which hf_lora does not support; got {shortened(values[key])}"
            )
    init = values.get("init_lora_weights", True)
    if init not in _HARMLESS_INITS:
        raise ValueError(
            f"the adapter's init_lora_weights={shortened(init)} rewrites the base weights on load, which is refused; "
            "convert it with peft's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    given = {key: value for key, value in values.items() if value is not None}
    return LoRAConfig(
        rank=given.get("r", 8),
        alpha=given.get("lora_alpha", 8),
        dropout=given.get("lora_dropout", 0.0),
        target_modules=_adapted_modules(keys, given.get("target_modules")),
        rank_pattern=given.get("rank_pattern", {}),
        alpha_pattern=given.get("alpha_pattern", {}),
        bias=given.get("bias", "none"),
        variant="dora" if given.get("use_dora") else "lora",
        scaling="rslora" if given.get("use_rslora") else "standard",
    )


def _adapted_modules(keys: Iterable[str], declared: Any) -> tuple[str, ...]:
    """The modules with factors, checked against `target_modules` where that is a list of suffixes."""
    parts = ((key.removeprefix(PREFIX), end) for key in keys for end in _FACTOR_ENDS if key.endswith(end))
    names = tuple(sorted({key.removesuffix(end) for key, end in parts}))
    if not names:
        raise ValueError("the adapter has no LoRA tensors; expected keys that end in .lora_A.weight")
    if isinstance(declared, list):
        stray = [name for name in names if not any(has_suffix(name, str(suffix)) for suffix in declared)]
        if stray:
            raise ValueError(
                f"the adapter's tensors and its target_modules disagree; got {shortened(stray[0])}; "
                f"expected one of {shortened(declared)}"
            )
    return names


def _ranks_and_alphas(model: nn.Module, config: LoRAConfig) -> dict[str, Any]:
    """`r`, `lora_alpha` and their patterns: the config's, unless a layer has another rank in PEFT's format.

    That happens where parts of a fused weight are adapted, or where a start is subtracted.
    """
    layers = lora_layers(model)
    if all(layer.peft_rank == config.rank_of(name) for name, layer in layers.items()):
        patterns = {"rank_pattern": dict(config.rank_pattern), "alpha_pattern": dict(config.alpha_pattern)}
        return {"r": config.rank, "lora_alpha": int_if_whole(config.alpha), **patterns}
    root = 0.5 if config.scaling == "rslora" else 1.0
    ranks = {name: layer.peft_rank for name, layer in layers.items()}
    alphas = {name: int_if_whole(layer.scaling * layer.peft_rank**root) for name, layer in layers.items()}
    return by_pattern(ranks, alphas)


def by_pattern(ranks: Mapping[str, int], alphas: Mapping[str, float], anchor: str = "") -> dict[str, Any]:
    """`r`, `lora_alpha`, `rank_pattern` and `alpha_pattern`: the commonest values, and the modules with others.

    anchor: "^" makes a pattern match its module alone, and not also every longer name that ends with it.
    """
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {anchor + re.escape(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {
            anchor + re.escape(name): value for name, value in alphas.items() if value != alpha
        },
    }


def int_if_whole(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


def shortest_suffixes(model: nn.Module, state: Injection) -> list[str]:
    """The shortest suffixes of dotted names that select the adapted modules and no others outside the head."""
    names = [target.name for target in state.targets]
    modules = [name for name, _ in model.named_modules() if ".parametrizations" not in f".{name}"]
    everything = {*names, *(name for name in modules if name and not belongs_to(name, state.head))}
    for length in range(1, 1 + max(name.count(".") + 1 for name in names)):
        suffixes = list(dict.fromkeys(".".join(name.split(".")[-length:]) for name in names))
        if {name for name in everything if any(has_suffix(name, s) for s in suffixes)} == set(names):
            return suffixes
    return names


def bias_key(name: str, targets: Iterable[str]) -> str:
    """PEFT's key of a trained bias; that of an adapted module is under `base_layer`."""
    module = name.removesuffix(".bias")
    return f"{PREFIX}{module}.base_layer.bias" if module in targets else f"{PREFIX}{name}"


def without_duplicates(keys: Iterable[str]) -> list[str]:
    """The keys without the copies of head tensors that peft adds with bias="all"."""
    keys = list(keys)
    plain = {key: re.sub(r"\.modules_to_save\.(default\.)?", ".", key) for key in keys}
    present = set(keys)
    return [k for k in keys if ".original_module." not in k and (plain[k] == k or plain[k] not in present)]


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors to save, by PEFT's keys: A, B, the head and trained biases; fp32 on the CPU, contiguous."""
    own = model.state_dict()
    files = (*_factors(model, own).values(), _whole_tensors(model, own))
    return {key: as_saved(tensor) for part in files for key, tensor in part.items()}


def as_saved(tensor: Tensor) -> Tensor:
    """A copy in fp32 on the CPU; safetensors refuses tensors that share memory."""
    return tensor.detach().to("cpu", torch.float32).contiguous().clone()


def _factors(model: nn.Module, own: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """By adapted module, PEFT's keys and tensors; `own`: the model's state dict."""
    layers = lora_layers(model)
    files: dict[str, dict[str, Tensor]] = {}
    for placement in injection(model).placements:
        name = placement.target.name
        layer = layers[name]
        factors = {f: own[f"{placement.layer}.{f}"] for f in FACTORS if getattr(layer, f) is not None}
        inside = f"{PREFIX}{name}."
        files[name] = {inside + key: tensor for key, tensor in layer.to_peft(factors).items()}
    return files


def _whole_tensors(model: nn.Module, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's keys and tensors of the head and the trained biases."""
    state = injection(model)
    targets = {target.module for target in state.targets}
    head = {PREFIX + name: own[name] for name in own if belongs_to(name, state.head)}
    biases = sorted(trained_biases(model, state))
    return head | {bias_key(name, targets): own[name] for name in biases}


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Copy the tensors of an adapter file into an injected model.

    Raises ValueError, before any change, for a tensor that is missing, unexpected, not finite or of another shape.
    """
    own = model.state_dict()
    factors, whole = _factors(model, own), _whole_tensors(model, own)
    expected = {
        key: tuple(tensor.shape) for part in (*factors.values(), whole) for key, tensor in part.items()
    }
    keys = _without_base_weights(model, tensors, source)
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
    damaged = _first_not_finite({key: tensors[key] for key in keys})
    if damaged is not None:
        raise ValueError(f"{source} is damaged; {damaged!r} holds something else than finite numbers")
    for name, layer in lora_layers(model).items():
        inside = len(f"{PREFIX}{name}.")
        try:
            layer.load_peft({key[inside:]: tensors[key] for key in factors[name]})
        except ValueError as error:
            raise ValueError(f"{source} does not fit {name!r}: {error}") from None
    for key, tensor in whole.items():
        tensor.copy_(tensors[key])


def _first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first key whose tensor holds something else than finite floating-point numbers."""
    floating = all(tensor.is_floating_point() for tensor in tensors.values())
    # NaN and infinity survive in a sum, and summing is quicker than looking at every value.
    if floating and all(math.isfinite(tensor.sum().item()) for tensor in tensors.values()):
        return None
    bad = (k for k, t in tensors.items() if not t.is_floating_point() or not torch.isfinite(t).all())
    return next(bad, None)


def _without_base_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> list[str]:
    """The keys without duplicates and base weights, which peft may save too; these must equal the model's."""
    copies = {f"{PREFIX}{name}.base_layer.weight": layer for name, layer in lora_layers(model).items()}
    keys = without_duplicates(tensors)
    for key in copies.keys() & set(keys):
        if not torch.equal(tensors[key], copies[key].base_weight.to(tensors[key])):
            raise ValueError(f"{source} brings another base weight than the model's; got {key!r}")
    return [key for key in keys if key not in copies]


def _label_hint(model: nn.Module, key: str, got: tuple[int, ...]) -> str:
    name = key.removeprefix(PREFIX)
    return f"; load the base with num_labels={got[0]}" if belongs_to(name, injection(model).head) else ""
