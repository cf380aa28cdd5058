"""Which output rows of a fused query-key-value weight belong to which role. Data and pure functions only.

A row is an output feature: a row of `nn.Linear.weight`, a column of the `Conv1D.weight` of GPT-2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hf_lora._choices import Registry

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


ROLES = "qkvo"
ROLE_NAMES = {"q": "query", "k": "key", "v": "value", "o": "output"}


@dataclass(frozen=True)
class Projection:
    """One place where a role lives.

    suffix: the whole dotted suffix of the module's name inside `model.base_model`.
    rows: for a fused module, the name of the layout in `ROW_LAYOUTS` that says which output rows
        belong to which role; None where the whole module is the role's.
    tensor: the parameter of the module.
    input_first: for a bare parameter, whether its first dimension is the input (and not the output).
    bypassed: whether the module's forward is never called because its weight is read directly, so that only the
        weight-space form has an effect.
    """

    suffix: str
    rows: str | None = None
    tensor: str = "weight"
    input_first: bool = False
    bypassed: bool = False


@dataclass(frozen=True)
class Architecture:
    """The places of each role: `q`, `k`, `v` (the inputs of attention) and `o` (its output, () if there is none).

    reason: why a model type has no roles; None where it has.
    skip: parts of the encoder, by a part of the dotted name, that its classifier does not use.
    """

    q: tuple[Projection, ...] = ()
    k: tuple[Projection, ...] = ()
    v: tuple[Projection, ...] = ()
    o: tuple[Projection, ...] = ()
    reason: str | None = None
    skip: tuple[str, ...] = ()

    def projections(self, role: str) -> tuple[Projection, ...]:
        """The places of one role, a letter of `ROLES`."""
        return {"q": self.q, "k": self.k, "v": self.v, "o": self.o}[role]


ARCHITECTURES: Registry[str, Architecture] = Registry("model type")

Names = str | tuple[str, ...]


def separate(parent: Names, q: Names, k: Names, v: Names, o: Names = ()) -> Architecture:
    """Modules for q, k and v under each `parent`, which may be "", and o at its own whole suffixes."""

    def under(names: Names) -> tuple[Projection, ...]:
        suffixes = (f"{above}.{name}" for above in _several(parent) for name in _several(names))
        return tuple(Projection(suffix.lstrip(".")) for suffix in suffixes)

    return Architecture(under(q), under(k), under(v), tuple(Projection(name) for name in _several(o)))


def fused(qkv: Names, rows: str, o: Names = ()) -> Architecture:
    """One module for q, k and v together, divided by a layout of `ROW_LAYOUTS`, and o at its own suffix."""
    inputs = tuple(Projection(name, rows) for name in _several(qkv))
    return Architecture(inputs, inputs, inputs, tuple(Projection(name) for name in _several(o)))


def _several(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _register(model_types: str, architecture: Architecture) -> None:
    for model_type in model_types.split():
        ARCHITECTURES.register(model_type, architecture)


_BERT = separate("attention.self", "query", "key", "value", "attention.output.dense")
_LLAMA = separate("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.o_proj")
_OPT = separate("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.out_proj")
_BART = separate(
    ("self_attn", "encoder_attn"),
    "q_proj",
    "k_proj",
    "v_proj",
    ("self_attn.out_proj", "encoder_attn.out_proj"),
)
_T5 = separate(("SelfAttention", "EncDecAttention"), "q", "k", "v", ("SelfAttention.o", "EncDecAttention.o"))
_VIT = separate("attention", "q_proj", "k_proj", "v_proj", "attention.o_proj")

# Encoders of text.
_register("bert ernie layoutlm rembert megatron-bert markuplm roc_bert tapas mobilebert big_bird", _BERT)
_register("roberta xlm-roberta xlm-roberta-xl camembert roberta-prelayernorm xmod data2vec-text", _BERT)
# CANINE classifies from its deep encoder; the final one is for predicting characters.
_register("canine", replace(_BERT, skip=("final_char_encoder",)))
_register("electra esm nystromformer roformer layoutlmv3 convbert yoso", _BERT)
# I-BERT's QuantLinear returns a pair and is no nn.Linear, so that only the weight-space form applies.
_register("ibert", _BERT)
_register(
    "longformer",
    separate(
        "attention.self",
        ("query", "query_global"),
        ("key", "key_global"),
        ("value", "value_global"),
        "attention.output.dense",
    ),
)
_register(
    "luke",
    separate(
        "attention.self",
        ("query", "w2e_query", "e2w_query", "e2e_query"),
        "key",
        "value",
        "attention.output.dense",
    ),
)
_register(
    "lilt",
    separate(
        "attention.self",
        ("query", "layout_query"),
        ("key", "layout_key"),
        ("value", "layout_value"),
        ("attention.output.dense", "attention.layout_output.dense"),
    ),
)
_register("xlm flaubert", separate("", "q_lin", "k_lin", "v_lin", "out_lin"))
_register("distilbert", separate("attention", "q_lin", "k_lin", "v_lin", "attention.out_lin"))
_register("mpnet", separate("attention.attn", "q", "k", "v", "attention.attn.o"))
_register("albert", separate("attention", "query", "key", "value", "attention.dense"))
_register(
    "deberta-v2",
    separate("attention.self", "query_proj", "key_proj", "value_proj", "attention.output.dense"),
)
_register("deberta", fused("attention.self.in_proj", "per_head", "attention.output.dense"))
_register("funnel", separate("attention", "q_head", "k_head", "v_head", "attention.post_proj"))
_register("squeezebert", separate("attention", "query", "key", "value", "post_attention.conv1d"))
_register("modernbert", fused("attn.Wqkv", "concatenated", "attn.Wo"))
_register("eurobert nomic_bert gte jina_embeddings_v3 esmc ultrabert", _LLAMA)
_register("fnet", Architecture(reason="has no attention: it mixes tokens by Fourier transforms"))

# Decoders, and what is both.
_register("llama mistral ministral ministral3 mixtral qwen2 qwen2_moe qwen3 qwen3_moe phimoe gpt_oss", _LLAMA)
_register("gemma gemma2 gemma3_text glm glm4 olmo olmo2 olmo3 arcee diffllama doge exaone4 helium", _LLAMA)
_register("hunyuan_v1_dense hunyuan_v1_moe nemotron seed_oss smollm3 stablelm starcoder2", _LLAMA)
_register("opt biogpt", _OPT)
_register("bart mbart plbart mvp", _BART)
_register("t5 mt5 umt5", _T5)
_register("modernbert-decoder", separate("attn", "q_proj", "k_proj", "v_proj", "attn.Wo"))
_register("phi", separate("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.dense"))
_register("gptj", separate("attn", "q_proj", "k_proj", "v_proj", "attn.out_proj"))
_register("gpt_neo", separate("attn.attention", "q_proj", "k_proj", "v_proj", "attn.attention.out_proj"))
_register("ctrl", separate("multi_head_attention", "Wq", "Wk", "Wv", "multi_head_attention.dense"))
_register("phi3", fused("self_attn.qkv_proj", "grouped_query", "self_attn.o_proj"))
_register("gpt2 openai-gpt", fused("attn.c_attn", "concatenated", "attn.c_proj"))
_register("gpt_bigcode", fused("attn.c_attn", "gpt_bigcode", "attn.c_proj"))
_register("gpt_neox", fused("attention.query_key_value", "per_head", "attention.dense"))
_register("persimmon", fused("self_attn.query_key_value", "per_head", "self_attn.dense"))
_register("bloom", fused("self_attention.query_key_value", "per_head", "self_attention.dense"))
_register("falcon", fused("self_attention.query_key_value", "falcon", "self_attention.dense"))
_register("mpt", fused("attn.Wqkv", "concatenated", "attn.out_proj"))
_register(
    "t5gemma",
    separate(
        ("self_attn", "cross_attn"),
        "q_proj",
        "k_proj",
        "v_proj",
        ("self_attn.o_proj", "cross_attn.o_proj"),
    ),
)
_register(
    "bigbird_pegasus",
    Architecture(
        q=(Projection("self_attn.self.query"), *_BART.q),
        k=(Projection("self_attn.self.key"), *_BART.k),
        v=(Projection("self_attn.self.value"), *_BART.v),
        o=(Projection("self_attn.output"), *_BART.o),
    ),
)
_register(
    "xlnet",
    Architecture(
        q=(Projection("rel_attn", tensor="q", input_first=True),),
        k=(Projection("rel_attn", tensor="k", input_first=True),),
        v=(Projection("rel_attn", tensor="v", input_first=True),),
        o=(Projection("rel_attn", tensor="o"),),
    ),
)

# Encoders of images.
_register("vit vit_msn deit ijepa beit dinov2 dinov2_with_registers swin segformer", _VIT)
_register("swinv2 donut-swin pvt", _BERT)
_register(
    "data2vec-vision", separate("attention.attention", "query", "key", "value", "attention.output.dense")
)
_register("pvt_v2", separate("attention", "query", "key", "value", "attention.proj"))
