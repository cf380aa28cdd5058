"""The PEFT side of an adapter directory: `adapter_config.json` and the names of the tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from hf_lora.config import LoRAConfig
from hf_lora.head import belongs_to
from hf_lora.inject import Injection
from hf_lora.targets import has_suffix

PREFIX = "base_model.model."
# The format below was read and written by this release of peft; it goes into the file for its readers.
PEFT_VERSION = "0.21.2"

# Keys of a PEFT configuration that mean an adapter we cannot represent, and the values that mean "unused".
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
    "use_dora": (None, False),
    "use_rslora": (None, False),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "exclude_modules": (None, []),
}
# Initializations that leave the base weights as they are; the others rewrite them on load.
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")


def to_peft(
    model: nn.Module, state: Injection, *, base_name: str | None, revision: str | None
) -> dict[str, Any]:
    """The contents of `adapter_config.json` for an injected model."""
    config = state.config
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "peft_version": PEFT_VERSION,
        "base_model_name_or_path": base_name,
        "revision": revision,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(shortest_suffixes(model, [t.name for t in state.targets], state.head)),
        "modules_to_save": sorted(state.head) or None,
        "bias": config.bias,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "fan_in_fan_out": False,
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
    }


def from_peft(
    values: Mapping[str, Any], *, projections: str | None = None, form: str = LoRAConfig.form
) -> LoRAConfig:
    """The LoRAConfig of an `adapter_config.json`.

    projections, form: from our sidecar, where there is one.
    Raises ValueError, naming the key, for anything that PEFT knows and we do not.
    """
    if values.get("peft_type") != "LORA":
        raise ValueError(f"not a LoRA adapter; got peft_type={values.get('peft_type')!r}; expected 'LORA'")
    for key, unused in _UNSUPPORTED.items():
        if values.get(key) not in unused:
            raise ValueError(f"the adapter uses {key}, which hf_lora does not support; got {values[key]!r}")
    init = values.get("init_lora_weights", True)
    if init not in _HARMLESS_INITS:
        raise ValueError(
            f"the adapter's init_lora_weights={init!r} rewrites the base weights on load, which hf_lora refuses; "
            "convert it with peft's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    targets = values.get("target_modules")
    layers = values.get("layers_to_transform")
    return LoRAConfig(
        rank=values.get("r", 8),
        alpha=values.get("lora_alpha", 8),
        dropout=values.get("lora_dropout", 0.0),
        projections=projections or LoRAConfig.projections,
        target_modules=targets if isinstance(targets, str) else tuple(targets or ()),
        layers=None if layers is None else layers,
        rank_pattern=values.get("rank_pattern") or {},
        alpha_pattern=values.get("alpha_pattern") or {},
        bias=values.get("bias", "none"),
        form=form,
    )


def shortest_suffixes(model: nn.Module, names: list[str], head: Iterable[str]) -> list[str]:
    """The shortest dotted endings that select exactly `names` among the model's modules outside the head."""
    everything = [name for name, _ in model.named_modules() if name and not belongs_to(name, head)]
    wanted = set(names)
    for length in range(1, 1 + max(name.count(".") + 1 for name in names)):
        suffixes = list(dict.fromkeys(".".join(name.split(".")[-length:]) for name in names))
        if {name for name in everything if any(has_suffix(name, s) for s in suffixes)} == wanted:
            return suffixes
    return names


def lora_key(name: str, which: str) -> str:
    """The file's key of `lora_A` or `lora_B` of the module called `name`."""
    return f"{PREFIX}{name}.{which}.weight"


def bias_key(name: str, targets: Iterable[str]) -> str:
    """The file's key of a trained bias: those of adapted modules are inside PEFT's wrapper."""
    module = name.removesuffix(".bias")
    return f"{PREFIX}{module}.base_layer.bias" if module in targets else f"{PREFIX}{name}"


def without_duplicates(keys: Iterable[str]) -> list[str]:
    """The keys of a file without the second copies of head tensors that peft writes with bias="all"."""
    keys = list(keys)
    return [key for key in keys if ".original_module." not in key and not _is_copy(key, keys)]


def _is_copy(key: str, keys: list[str]) -> bool:
    plain = key.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
    return plain != key and plain in keys
