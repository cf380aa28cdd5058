"""Where the query, key, value and output projections live, for each model type. Data only.

A suffix is matched as a whole dotted suffix of a module's name inside `model.base_model`:
`attention.output.dense` is BERT's output projection, `output.dense` would also be its feed-forward layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hf_lora.registry import Registry

ROLES = "qkvo"
ROLE_NAMES = {"q": "query", "k": "key", "v": "value", "o": "output"}


@dataclass(frozen=True)
class Projection:
    """One place where a role lives.

    suffix: the whole dotted suffix of the module's name inside `model.base_model`.
    rows: for a fused module, the name of the layout in `hf_lora.lora.fused.ROW_LAYOUTS` that says which output rows
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
