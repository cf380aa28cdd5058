"""Tiny random classifiers of every model type of `hf_lora.lora.architectures`, and inputs that fit them.

Two blocks of width 32 with 4 heads, 2 of them for keys and values where they are grouped. The feed-forward
layers are at least `WIDE` wide and nothing in attention is, so that tests tell them apart without names.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

WIDE = 128
PAD, EOS = 1, 2
ROWS, LENGTH, IMAGE = 4, 12, 32

_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": WIDE,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": EOS,
}
_IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": WIDE,
    "image_size": IMAGE,
    "patch_size": 8,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_intermediate_size": WIDE,
}
_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": WIDE,
    "decoder_ffn_dim": WIDE,
    "decoder_start_token_id": EOS,
}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": WIDE,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": PAD,
}
_UNSIZED = {
    "hidden_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "intermediate_size": None,
}
_SWIN = {
    **_UNSIZED,
    "embed_dim": 32,
    "depths": (1, 1),
    "num_heads": (4, 4),
    "window_size": 4,
    "patch_size": 4,
}
# The model types whose stages grow: (32, 64) wide, with one block each.
_PYRAMID = {
    **_UNSIZED,
    "num_encoder_blocks": 2,
    "depths": (1, 1),
    "hidden_sizes": (32, 64),
    "patch_sizes": (4, 2),
    "strides": (4, 2),
    "num_attention_heads": (4, 4),
    "mlp_ratios": (4, 4),
}
_T5GEMMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": WIDE,
    **_GROUPED,
    "layer_types": ["sliding_attention", "full_attention"],
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": EOS,
}


def _each(model_types: str, sizes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {model_type: sizes for model_type in model_types.split()}


# What a configuration calls the sizes above, or needs besides; None takes a size away.
TEXT: dict[str, dict[str, Any]] = {
    **_each("bert ernie layoutlm rembert megatron-bert roberta xlm-roberta xlm-roberta-xl", {}),
    **_each("camembert roberta-prelayernorm data2vec-text ibert mpnet eurobert", {}),
    **_each("nomic_bert gte jina_embeddings_v3 modernbert-decoder esmc ultrabert", {}),
    **_each("phi gpt_neox persimmon tapas yoso", {}),
    **_each("llama mistral ministral ministral3 qwen2 qwen3 gemma gemma2 gemma3_text", _GROUPED),
    **_each("phi3 arcee diffllama doge exaone4 glm glm4 helium hunyuan_v1_dense", _GROUPED),
    **_each("nemotron olmo olmo2 olmo3 seed_oss smollm3 stablelm starcoder2", _GROUPED),
    **_each(
        "mixtral qwen2_moe qwen3_moe phimoe gpt_oss hunyuan_v1_moe",
        {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": WIDE},
    ),
    **_each("bart mbart plbart mvp", _SEQ2SEQ),
    **_each("t5 mt5 umt5", _T5),
    **_each("gpt2 openai-gpt gpt_bigcode", {"n_positions": 64}),
    "gptj": {"n_positions": 64, "rotary_dim": 4},
    "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16},
    "canine": {
        "num_hash_buckets": 64,
        "num_hash_functions": 4,
        "downsampling_rate": 2,
        "local_transformer_stride": 8,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "esm": {"mask_token_id": 3},
    "nystromformer": {"num_landmarks": LENGTH, "segment_means_seq_len": LENGTH},
    "roformer": {"embedding_size": 32},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "input_size": IMAGE, "visual_embed": False},
    "lilt": {"hidden_size": 48, "channel_shrink_ratio": 2},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {**_SEQ2SEQ, "attention_type": "original_full"},
    "convbert": {"embedding_size": 32, "conv_kernel_size": 3, "head_ratio": 2},
    "longformer": {"attention_window": 4},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 16},
    "mobilebert": {"hidden_size": 64, "embedding_size": 16, "intra_bottleneck_size": 32},
    "markuplm": {"max_depth": 4, "max_xpath_tag_unit_embeddings": 220},
    "roc_bert": {
        "pronunciation_vocab_size": 64,
        "shape_vocab_size": 64,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": WIDE},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "pad_index": PAD},
    "flaubert": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "pad_index": PAD},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True},
    "modernbert": {"cls_token_id": 0, "sep_token_id": EOS},
    "funnel": {
        "num_hidden_layers": None,
        "block_sizes": [1, 1],
        "d_model": 32,
        "n_head": 4,
        "d_head": 8,
        "d_inner": WIDE,
    },
    "squeezebert": {"embedding_size": 32},
    "xlnet": {"max_position_embeddings": None, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": WIDE},
    "fnet": {"use_tpu_fourier_optimizations": False},
    "opt": {"ffn_dim": WIDE, "word_embed_proj_dim": 32},
    "biogpt": {},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": WIDE, "n_positions": 64},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "t5gemma": {"encoder": _T5GEMMA, "decoder": _T5GEMMA},
}
VISION: dict[str, dict[str, Any]] = {
    **_each("vit vit_msn ijepa beit data2vec-vision dinov2 dinov2_with_registers", {}),
    **_each("swin swinv2 donut-swin", _SWIN),
    "deit": {"architectures": ["DeiTForImageClassification"]},
    "segformer": {**_PYRAMID, "sr_ratios": (2, 1)},
    "pvt_v2": {**_PYRAMID, "sr_ratios": (2, 1)},
    "pvt": {**_PYRAMID, "sequence_reduction_ratios": (2, 1)},
}


def tiny_model(model_type: str, num_labels: int = 3, **overrides: Any) -> Any:
    """A random classifier of a model type, in evaluation mode; the same weights at every call."""
    torch.manual_seed(0)
    if model_type in VISION:
        sizes = {**_IMAGE, **VISION[model_type]}
        auto = AutoModelForImageClassification
    else:
        sizes = {**_TEXT, **TEXT[model_type]}
        auto = AutoModelForSequenceClassification
    sizes = {name: size for name, size in sizes.items() if size is not None}
    config = AutoConfig.for_model(model_type, **{**sizes, "num_labels": num_labels, **overrides})
    return auto.from_config(config).eval()


def tiny_inputs(model_type: str, num_labels: int = 3) -> dict[str, torch.Tensor]:
    """Random inputs of a model type with labels; text is padded in the last row."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(ROWS) % num_labels
    if model_type in VISION:
        return {"pixel_values": torch.randn(ROWS, 3, IMAGE, IMAGE, generator=generator), "labels": labels}
    ids = torch.randint(5, 60, (ROWS, LENGTH), generator=generator)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[-1, LENGTH // 2 :] = 0
    ids[mask == 0] = PAD
    # BART classifies at the last end-of-sequence token of a row, and every row must have as many.
    ids[torch.arange(ROWS), mask.sum(1) - 1] = EOS
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {**inputs, **_EXTRAS.get(model_type, dict)()}


def _boxes() -> dict[str, torch.Tensor]:
    return {"bbox": torch.tensor([1, 2, 11, 22]).expand(ROWS, LENGTH, 4) + torch.arange(LENGTH)[:, None]}


def _entities() -> dict[str, torch.Tensor]:
    positions = torch.full((ROWS, 2, 30), -1)
    positions[:, 0, :2] = torch.tensor([1, 2])
    positions[:, 1, :1] = 4
    return {
        "entity_ids": torch.tensor([[3, 4]]).expand(ROWS, 2),
        "entity_attention_mask": torch.ones(ROWS, 2, dtype=torch.long),
        "entity_position_ids": positions,
    }


_EXTRAS = {"layoutlm": _boxes, "layoutlmv3": _boxes, "lilt": _boxes, "luke": _entities}
