"""Which output rows of a fused query-key-value weight belong to which role. Data and pure functions only.

A row is an output feature: a row of `nn.Linear.weight`, a column of the `Conv1D.weight` of GPT-2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_lora.registry import Registry

# The ranges of output rows of each role, a letter of "qkv", in the order in which attention reads them.
Rows = dict[str, tuple[range, ...]]
# (config, out_features) -> Rows. Raises ValueError where the sizes do not add up to `out_features`.
RowLayout = Callable[[Any, int], Rows]

ROW_LAYOUTS: Registry[str, RowLayout] = Registry("row layout")


def _heads(config: Any) -> int:
    return int(config.num_attention_heads)


def _checked(rows: Rows, config: Any, out_features: int) -> Rows:
    expected = sum(len(part) for ranges in rows.values() for part in ranges)
    if expected != out_features or not expected:
        raise ValueError(
            f"the fused weight does not fit the configuration; got {out_features} output rows; expected {expected} "
            f"from the heads and sizes of {type(config).__name__}"
        )
    return rows


def _in_sequence(q: int, k: int, v: int, groups: int = 1) -> Rows:
    """q, then k, then v rows, `groups` times over."""
    step = q + k + v
    starts = range(0, groups * step, step) if step else range(0)
    return {
        "q": tuple(range(start, start + q) for start in starts),
        "k": tuple(range(start + q, start + q + k) for start in starts),
        "v": tuple(range(start + q + k, start + step) for start in starts),
    }


def _split_evenly(config: Any, out_features: int, groups: int) -> Rows:
    size = out_features // (3 * groups) if groups else 0
    return _checked(_in_sequence(size, size, size, groups), config, out_features)


def concatenated(config: Any, out_features: int) -> Rows:
    """All of q, all of k, all of v, equally large: ModernBERT, GPT-2, MPT."""
    return _split_evenly(config, out_features, 1)


def per_head(config: Any, out_features: int) -> Rows:
    """q, k and v of the first head, then of the second: BLOOM, GPT-NeoX, DeBERTa."""
    return _split_evenly(config, out_features, _heads(config))


def grouped_query(config: Any, out_features: int) -> Rows:
    """All of q, all of k, all of v, with fewer key-value heads than query heads: Phi-3."""
    heads = _heads(config)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return _checked(_in_sequence(heads * size, kv_heads * size, kv_heads * size), config, out_features)


def falcon(config: Any, out_features: int) -> Rows:
    """The three forms of Falcon: groups of query heads with their k and v, one k and v for all, or per head."""
    heads, size = _heads(config), config.hidden_size // _heads(config)
    if config.new_decoder_architecture:
        groups = config.num_kv_heads
        rows = _in_sequence(heads // groups * size, size, size, groups)
    elif config.multi_query:
        rows = _in_sequence(heads * size, size, size)
    else:
        rows = _in_sequence(size, size, size, heads)
    return _checked(rows, config, out_features)


def gpt_bigcode(config: Any, out_features: int) -> Rows:
    """One k and v for all query heads (multi-query), or q, k and v per head."""
    heads, size = _heads(config), config.hidden_size // _heads(config)
    rows = (
        _in_sequence(heads * size, size, size)
        if config.multi_query
        else _in_sequence(size, size, size, heads)
    )
    return _checked(rows, config, out_features)


for _name, _layout in {
    "concatenated": concatenated,
    "per_head": per_head,
    "grouped_query": grouped_query,
    "falcon": falcon,
    "gpt_bigcode": gpt_bigcode,
}.items():
    ROW_LAYOUTS.register(_name, _layout)
