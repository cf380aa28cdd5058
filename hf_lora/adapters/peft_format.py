"""PEFT's format: `adapter_config.json`, and the names of the tensors in `adapter_model.safetensors`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lora._files import check_types
from hf_lora._text import dotted_ends, shortened
from hf_lora.lora.config import FACTORS, VARIANTS, LoRAConfig
from hf_lora.lora.head import belongs_to, unwrapped
from hf_lora.lora.inject import injection, lora_layers, trained_biases
from hf_lora.lora.layer import MAGNITUDE
from hf_lora.lora.targets import has_suffix
from hf_lora.models.pooling import HEAD as POOLED_HEAD

PREFIX = "base_model.model."
# The same in every `adapter_config.json` that is written. peft_version: the release the format was tested with.
WRITTEN = {"peft_version": "0.21.2", "inference_mode": True, "init_lora_weights": True}
# `target_modules` alone selects the modules.
NO_OTHER_TARGETS = dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules"))

# PEFT's options that hf_lora does not have; each is unused where it is null, false or an empty list.
_UNSUPPORTED = (
    *("layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens"),
    *("arrow_config", "monteclora_config", "kasa_config", "velora_config"),
    *("use_bdlora", "use_qalora", "lora_bias"),
)
# Initializations that leave the base weights alone; the others rewrite them on load.
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
# The types of the keys that are read; each may also be null.
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("bias", "base_model_name_or_path", "revision", "task_type"), (str,)),
    **dict.fromkeys(("use_dora", "use_rslora"), (bool,)),
    **dict.fromkeys(("lora_alpha", "lora_dropout"), (int, float)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "auto_mapping"), (dict,)),
    "r": (int,),
    "target_modules": (list, str),
    "modules_to_save": (list,),
}
_FACTOR = re.compile(r"(.*)\.lora_(?:([AB])\.weight|embedding_([AB]))", re.DOTALL)
# By peft's task type: what such adapters are for, how the names of transformers' classes for it end, and the modules
# that peft saves whole for it, which releases before 0.11 do not write down.
TASKS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "SEQ_CLS": ("text classification", "ForSequenceClassification", ("classifier", "score")),
    "TOKEN_CLS": ("token classification, such as NER", "ForTokenClassification", ("classifier", "score")),
    "QUESTION_ANS": ("question answering", "ForQuestionAnswering", ("qa_outputs",)),
    "CAUSAL_LM": ("text generation", "ForCausalLM", ()),
    "SEQ_2_SEQ_LM": ("text generation", "ForSeq2SeqLM", ()),
    "FEATURE_EXTRACTION": ("a bare encoder", "Model", ()),
}
# A factor's key may name the adapter, as in a state dict that was not saved by peft itself.
_NAMED = re.compile(r"(\.lora_(?:[AB]|embedding_[AB]|magnitude_vector))\.(?!weight$|bias$)[^.]+")


def to_peft(model: nn.Module, *, base_name: str | None, revision: str | None) -> dict[str, Any]:
    """The contents of `adapter_config.json` for an injected model."""
    state = injection(model)
    config = state.config
    return {
        **WRITTEN,
        **NO_OTHER_TARGETS,
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": base_name,
        "revision": revision,
        **_ranks_and_alphas(model, config),
        "lora_dropout": config.dropout,
        "target_modules": sorted(shortest_suffixes(model)),
        # peft looks these modules up in the base model, which has no pooled head.
        "modules_to_save": sorted(name for name in state.head if name != POOLED_HEAD) or None,
        "bias": config.bias,
        "use_rslora": config.scaling == "rslora",
        "use_dora": VARIANTS.get(config.variant).magnitude,
        "lora_bias": False,
        "fan_in_fan_out": False,
    }


def task_of_class(name: str | None) -> str | None:
    """peft's task type for the name of one of transformers' classes; None where it has none."""
    plain = "" if name is None or "Head" in name else name
    return next((task for task, (_, ending, _) in TASKS.items() if plain.endswith(ending)), None)


def _task_type(model: nn.Module) -> str | None:
    """The task type to write; None where peft would then save modules whole that are adapted."""
    task = task_of_class(type(model).__name__) if isinstance(model, PreTrainedModel) else None
    saved = [name for name, _ in model.named_modules() if task and name.endswith(TASKS[task][2])]
    return None if any(belongs_to(target.module, saved) for target in injection(model).targets) else task


def brought_whole(values: Mapping[str, Any], keys: Iterable[str], model: nn.Module) -> list[str]:
    """The modules that an adapter of peft brings whole: those of `modules_to_save`, by the ends of their names.

    One without a tensor in the file has a name that matches by accident.
    """
    _, _, of_task = TASKS.get(values.get("task_type") or "", ("", "", ()))
    wanted = (*(values.get("modules_to_save") or ()), *of_task)
    whole = [key.removeprefix(PREFIX) for key in keys if ".lora_" not in key]
    names = [name for name, _ in model.named_modules() if name.endswith(wanted)]
    return [name for name in names if any(belongs_to(key, [name]) for key in whole)]


def adapted_modules(keys: Iterable[str]) -> set[str]:
    """The modules that the keys of an adapter's tensors have factors of."""
    return {place[0] for place in map(factor_place, keys) if place}


def from_peft(values: Mapping[str, Any], keys: Iterable[str]) -> LoRAConfig:
    """The LoRAConfig for the values of an `adapter_config.json`; the adapted modules are those of the tensors' keys.

    Raises ValueError for an option that hf_lora does not have, and for tensors of modules outside `target_modules`.
    """
    if values.get("peft_type") != "LORA":
        raise ValueError(
            f"not a LoRA adapter; got peft_type={shortened(values.get('peft_type'))}; expected 'LORA'"
        )
    check_values(values)
    for key in _UNSUPPORTED:
        if values.get(key) not in (None, False, []):
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


def check_values(values: Mapping[str, Any]) -> None:
    """Raises ValueError for a value of an `adapter_config.json` that is of another type than PEFT's."""
    check_types(values, _KINDS, "the adapter's PEFT configuration")


def _adapted_modules(keys: Iterable[str], declared: Any) -> tuple[str, ...]:
    """The modules with factors, checked against `target_modules` where that is a list of suffixes."""
    names = tuple(sorted(adapted_modules(keys)))
    if not names:
        raise ValueError("the adapter has no LoRA tensors; expected keys that end in .lora_A.weight")
    if isinstance(declared, list):
        suffixes = set(declared)
        stray = [name for name in names if suffixes.isdisjoint(dotted_ends(name))]
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
    result: dict[str, Any] = {}
    for key, pattern, values in (("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", alphas)):
        usual, _ = Counter(values.values()).most_common(1)[0]
        others = {anchor + re.escape(name): value for name, value in values.items() if value != usual}
        result |= {key: usual, pattern: others}
    return result


def int_if_whole(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


def factor_place(key: str) -> tuple[str, str, bool] | None:
    """(module, "A" or "B", whether it is an embedding's) of a tensor's key; None for other tensors."""
    match = _FACTOR.fullmatch(key.removeprefix(PREFIX))
    return match and (match[1], match[2] or match[3], match[2] is None)


def factor_key(module: str, side: str, embedding: bool) -> str:
    """PEFT's key of the tensor; the inverse of `factor_place`."""
    return f"{PREFIX}{module}.lora_" + (f"embedding_{side}" if embedding else f"{side}.weight")


def shortest_suffixes(model: nn.Module) -> list[str]:
    """The shortest suffixes of dotted names that select the adapted modules and no others outside the head."""
    state = injection(model)
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


def as_today(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the keys that `adapter_tensors` gives them, whichever release of peft wrote them.

    Names of the adapter, and the copies of the head that bias="all" brings, are dropped.
    Raises ValueError for the factors of two adapters.
    """
    keys = {key: _NAMED.sub(r"\1", key) for key in tensors if ".original_module." not in key}
    adapted = {f"{PREFIX}{name}" for name in adapted_modules(keys.values())}
    bare, result = MAGNITUDE.removesuffix(".weight"), dict[str, Tensor]()
    # A copy comes after the tensor that it is a copy of.
    for key, new in sorted(keys.items(), key=lambda pair: ".modules_to_save." in pair[0]):
        plain = re.sub(r"\.modules_to_save\.(default\.)?", ".", new)
        module, _, tensor = plain.rpartition(".")
        if tensor == bare:
            plain += ".weight"
        elif module in adapted and tensor in ("weight", "bias"):
            plain = f"{module}.base_layer.{tensor}"
        if plain in result and ".modules_to_save." not in key:
            raise ValueError(f"the file holds two adapters; got a second {shortened(plain)}")
        result.setdefault(plain, tensors[key])
    return result


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors to save, by PEFT's keys: A, B, the head and trained biases; fp32 on the CPU, contiguous."""
    factors, whole = own_tensors(model)
    return {key: as_saved(tensor) for part in (*factors.values(), whole) for key, tensor in part.items()}


def as_saved(tensor: Tensor) -> Tensor:
    """A copy in fp32 on the CPU; safetensors refuses tensors that share memory."""
    return tensor.detach().to("cpu", torch.float32).contiguous().clone()


def own_tensors(model: nn.Module) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """A model's tensors by PEFT's keys: the factors by adapted module; and the head and the trained biases."""
    own, state, layers = unwrapped(model).state_dict(), injection(model), lora_layers(model)
    factors: dict[str, dict[str, Tensor]] = {}
    for placement in state.placements:
        name = placement.target.name
        layer = layers[name]
        trained = {f: own[f"{placement.layer}.{f}"] for f in FACTORS if getattr(layer, f) is not None}
        factors[name] = {f"{PREFIX}{name}.{key}": tensor for key, tensor in layer.to_peft(trained).items()}
    targets = {target.module for target in state.targets}
    whole = {PREFIX + name: own[name] for name in own if belongs_to(name, state.head)}
    whole |= {bias_key(name, targets): own[name] for name in sorted(trained_biases(model, state))}
    return factors, whole
