"""A guess at the projections of a model type that is not in the table: offered in an error, never applied."""

from __future__ import annotations

import re

from torch import nn

from hf_lora.lora.head import base_prefix
from hf_lora.lora.layers import LAYER_TYPES

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
    names = [
        name
        for name, module in model.named_modules()
        if type(module) in LAYER_TYPES and (not prefix or name.startswith(f"{prefix}."))
    ]
    alike = [
        name
        for name in names
        if _USUAL[role].fullmatch(name.rpartition(".")[2]) and "att" in name.rpartition(".")[0].lower()
    ]
    for length in range(2, 5):
        ends = {".".join(name.split(".")[-length:]) for name in alike}
        if len(ends) != 1:
            return None
        end = ends.pop()
        if [name for name in names if name.endswith(f".{end}")] == alike:
            return end
    return None
