"""`hf-lora targets` counts, without weights, what papers published for models of these sizes."""

import json

import pytest
from transformers import BertConfig, GPT2Config, RobertaConfig

from hf_lora.cli.main import main

GPT3 = {"n_layer": 96, "n_embd": 12_288, "n_head": 96, "n_positions": 2048}
GPT2_LARGE = {"n_layer": 36, "n_embd": 1280, "n_head": 20}
ROBERTA_LARGE = {
    "num_hidden_layers": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "vocab_size": 50_265,
    "max_position_embeddings": 514,
}
SIZES = {
    # configuration, rank, LoRA parameters on q and v, and the published size: parameters, share in percent
    "bert-base": (BertConfig(), 8, 294_912, 110e6, 0.27),
    "roberta-large": (RobertaConfig(**ROBERTA_LARGE), 8, 786_432, 355e6, 0.22),
    "gpt2-large": (GPT2Config(**GPT2_LARGE), 4, 737_280, 774e6, 0.095),
    "gpt3": (GPT2Config(**GPT3), 4, 18_874_368, 175e9, 100 / 9_000),
}


@pytest.mark.parametrize("name", SIZES)
def test_counts_are_the_published_ones(name, tmp_path, capsys):
    config, rank, lora, total, share = SIZES[name]
    config.save_pretrained(tmp_path)
    arguments = ["--model_name_or_path", str(tmp_path), "--lora_rank", str(rank), "--lora_projections", "qv"]
    assert main(["targets", *arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["lora_parameters"] == lora
    # The papers round, and count with or without heads and pooler.
    assert report["total_parameters"] - lora == pytest.approx(total, rel=0.01)
    assert 100 * report["share"] == pytest.approx(share, rel=0.04)
    assert set(report["roles"]) == {"q", "v"}
    blocks = getattr(config, "n_layer", None) or config.num_hidden_layers
    assert all(len(modules) == blocks for modules in report["roles"].values())
