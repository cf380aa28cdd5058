"""Where each model type keeps the projections of its attention, and which rows of a fused weight are whose.

A row is an output feature: a row of `nn.Linear.weight`, a column of GPT-2's `Conv1D.weight`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hf_lora._choices import Registry

ROLES = "qkvo"
ROLE_NAMES = {"q": "query", "k": "key", "v": "value", "o": "output"}

# The ranges of output rows of each role, a letter of "qkv", in the order in which attention reads them.
Rows = dict[str, tuple[range, ...]]
# (config, out_features) -> Rows. Raises ValueError where the sizes do not add up to `out_features`.
RowLayout = Callable[[Any, int], Rows]

ROW_LAYOUTS: Registry[str, RowLayout] = Registry("row layout")


Sizes = Callable[[Any, int], tuple[int, int, int, int]]


def _row_layout(sizes: Sizes) -> Sizes:
    """Register a layout of groups of rows: q, then k, then v. `sizes` gives their numbers and that of the groups."""

    def rows(config: Any, out_features: int) -> Rows:
        q, k, v, groups = sizes(config, out_features)
        step = q + k + v
        if step * groups != out_features or not out_features:
            raise ValueError(
                f"the fused weight does not fit the configuration; got {out_features} output rows; "
                f"expected {step * groups} from the heads and sizes of {type(config).__name__}"
            )
        starts = range(0, out_features, step)
        return {
            "q": tuple(range(start, start + q) for start in starts),
            "k": tuple(range(start + q, start + q + k) for start in starts),
            "v": tuple(range(start + q + k, start + step) for start in starts),
        }

    ROW_LAYOUTS.register(sizes.__name__, rows)
    return sizes


@_row_layout
def concatenated(config: Any, out_features: int) -> tuple[int, int, int, int]:
    """All of q, all of k, all of v, equally large: ModernBERT, GPT-2, MPT."""
    size = out_features // 3
    return size, size, size, 1


@_row_layout
def per_head(config: Any, out_features: int) -> tuple[int, int, int, int]:
    """q, k and v of the first head, then of the second: BLOOM, GPT-NeoX, DeBERTa."""
    heads = config.num_attention_heads
    size = out_features // (3 * heads) if heads else 0
    return size, size, size, heads


@_row_layout
def grouped_query(config: Any, out_features: int) -> tuple[int, int, int, int]:
    """All of q, all of k, all of v, with fewer key-value heads than query heads: Phi-3."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * size, kv_heads * size, kv_heads * size, 1


@_row_layout
def gpt_bigcode(config: Any, out_features: int) -> tuple[int, int, int, int]:
    """One k and v for all query heads (multi-query), or q, k and v per head."""
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    return (heads * size, size, size, 1) if config.multi_query else (size, size, size, heads)


@_row_layout
def falcon(config: Any, out_features: int) -> tuple[int, int, int, int]:
    """As GPT-BigCode, or in its new architecture groups of query heads with their k and v."""
    if not config.new_decoder_architecture:
        return gpt_bigcode(config, out_features)
    size = config.hidden_size // config.num_attention_heads
    return config.num_attention_heads // config.num_kv_heads * size, size, size, config.num_kv_heads


@dataclass(frozen=True)
class Projection:
    """One place of a role.

    suffix: the whole dotted suffix of the module's name inside `model.base_model`; tensor: its parameter.
    rows: the layout in `ROW_LAYOUTS` of a fused module; None where the whole module is the role's.
    input_first: whether the first dimension of a bare parameter is the input.
    bypassed: whether the module's forward is never called, so that only the weight-space form has an effect.
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
        return getattr(self, role)


ARCHITECTURES: Registry[str, Architecture] = Registry("model type")


def separate(parents: str, q: str, k: str, v: str, o: str = "") -> Architecture:
    """Modules for q, k and v under each of the parents, if any, and o at its own suffixes; names divided by spaces."""

    def under(names: str) -> tuple[Projection, ...]:
        paths = (f"{parent}.{name}" for parent in parents.split() or [""] for name in names.split())
        return tuple(Projection(path.lstrip(".")) for path in paths)

    return Architecture(under(q), under(k), under(v), tuple(map(Projection, o.split())))


def fused(qkv: str, rows: str, o: str = "") -> Architecture:
    """One module for q, k and v together, divided by a layout of `ROW_LAYOUTS`, and o at its own suffix."""
    inputs = (Projection(qkv, rows),)
    return Architecture(inputs, inputs, inputs, tuple(map(Projection, o.split())))


def _bare(role: str) -> tuple[Projection, ...]:
    return (Projection("rel_attn", tensor=role, input_first=role != "o"),)


_DENSE = "attention.output.dense"
_BERT = separate("attention.self", "query", "key", "value", _DENSE)
_PROJ = ("q_proj", "k_proj", "v_proj")
_LLAMA = separate("self_attn", *_PROJ, "self_attn.o_proj")
_BART = separate("self_attn encoder_attn", *_PROJ, "self_attn.out_proj encoder_attn.out_proj")

_TABLE = {
    # Encoders of text.
    "bert ernie layoutlm rembert megatron-bert markuplm roc_bert tapas mobilebert big_bird": _BERT,
    "roberta xlm-roberta xlm-roberta-xl camembert roberta-prelayernorm xmod data2vec-text": _BERT,
    # CANINE classifies from its deep encoder; the final one is for predicting characters.
    "canine": replace(_BERT, skip=("final_char_encoder",)),
    "electra esm nystromformer roformer layoutlmv3 convbert yoso": _BERT,
    # I-BERT's QuantLinear returns a pair and is no nn.Linear, so only the weight-space form applies.
    "ibert": _BERT,
    "longformer": separate(
        "attention.self", "query query_global", "key key_global", "value value_global", _DENSE
    ),
    "luke": separate("attention.self", "query w2e_query e2w_query e2e_query", "key", "value", _DENSE),
    "lilt": separate(
        *("attention.self", "query layout_query", "key layout_key", "value layout_value"),
        f"{_DENSE} attention.layout_output.dense",
    ),
    "xlm flaubert": separate("", "q_lin", "k_lin", "v_lin", "out_lin"),
    "distilbert": separate("attention", "q_lin", "k_lin", "v_lin", "attention.out_lin"),
    "mpnet": separate("attention.attn", "q", "k", "v", "attention.attn.o"),
    "albert": separate("attention", "query", "key", "value", "attention.dense"),
    "deberta-v2": separate("attention.self", "query_proj", "key_proj", "value_proj", _DENSE),
    "deberta": fused("attention.self.in_proj", "per_head", _DENSE),
    "funnel": separate("attention", "q_head", "k_head", "v_head", "attention.post_proj"),
    "squeezebert": separate("attention", "query", "key", "value", "post_attention.conv1d"),
    "modernbert": fused("attn.Wqkv", "concatenated", "attn.Wo"),
    "eurobert nomic_bert gte jina_embeddings_v3 esmc ultrabert": _LLAMA,
    "fnet": Architecture(reason="has no attention: it mixes tokens by Fourier transforms"),
    # Decoders, and what is both.
    "llama mistral ministral ministral3 mixtral qwen2 qwen2_moe qwen3 qwen3_moe phimoe gpt_oss": _LLAMA,
    "gemma gemma2 gemma3_text glm glm4 olmo olmo2 olmo3 arcee diffllama doge exaone4 helium": _LLAMA,
    "hunyuan_v1_dense hunyuan_v1_moe nemotron seed_oss smollm3 stablelm starcoder2": _LLAMA,
    "opt biogpt": separate("self_attn", *_PROJ, "self_attn.out_proj"),
    "bart mbart plbart mvp": _BART,
    "t5 mt5 umt5": separate(
        "SelfAttention EncDecAttention", "q", "k", "v", "SelfAttention.o EncDecAttention.o"
    ),
    "modernbert-decoder": separate("attn", *_PROJ, "attn.Wo"),
    "phi": separate("self_attn", *_PROJ, "self_attn.dense"),
    "gptj": separate("attn", *_PROJ, "attn.out_proj"),
    "gpt_neo": separate("attn.attention", *_PROJ, "attn.attention.out_proj"),
    "ctrl": separate("multi_head_attention", "Wq", "Wk", "Wv", "multi_head_attention.dense"),
    "phi3": fused("self_attn.qkv_proj", "grouped_query", "self_attn.o_proj"),
    "gpt2 openai-gpt": fused("attn.c_attn", "concatenated", "attn.c_proj"),
    "gpt_bigcode": fused("attn.c_attn", "gpt_bigcode", "attn.c_proj"),
    "gpt_neox": fused("attention.query_key_value", "per_head", "attention.dense"),
    "persimmon": fused("self_attn.query_key_value", "per_head", "self_attn.dense"),
    "bloom": fused("self_attention.query_key_value", "per_head", "self_attention.dense"),
    "falcon": fused("self_attention.query_key_value", "falcon", "self_attention.dense"),
    "mpt": fused("attn.Wqkv", "concatenated", "attn.out_proj"),
    "t5gemma": separate("self_attn cross_attn", *_PROJ, "self_attn.o_proj cross_attn.o_proj"),
    "bigbird_pegasus": Architecture(
        q=(Projection("self_attn.self.query"), *_BART.q),
        k=(Projection("self_attn.self.key"), *_BART.k),
        v=(Projection("self_attn.self.value"), *_BART.v),
        o=(Projection("self_attn.output"), *_BART.o),
    ),
    "xlnet": Architecture(_bare("q"), _bare("k"), _bare("v"), _bare("o")),
    # Encoders of images.
    "vit vit_msn deit ijepa beit dinov2 dinov2_with_registers swin segformer": separate(
        "attention", *_PROJ, "attention.o_proj"
    ),
    "swinv2 donut-swin pvt": _BERT,
    "data2vec-vision": separate("attention.attention", "query", "key", "value", _DENSE),
    "pvt_v2": separate("attention", "query", "key", "value", "attention.proj"),
}
for _model_types, _architecture in _TABLE.items():
    for _model_type in _model_types.split():
        ARCHITECTURES.register(_model_type, _architecture)
