"""Updates by layer and role, and what cannot be compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import LABELS, randomize, tiny_tokenizer
from transformers import AutoConfig, AutoModel

from hf_lora import LoRAConfig, load_classifier, save_adapter
from hf_lora.adapters.directory import read_adapter
from hf_lora.insight.inspect import compare, grid_of, role_of, updates_of


def test_roles_by_name():
    names = {
        "bert.encoder.layer.0.attention.self.query": "q",
        "bert.encoder.layer.0.attention.output.dense": "o",
        "bert.encoder.layer.0.output.dense": None,
        "model.layers.3.attn.Wqkv": "qkv",
        "transformer.layer.0.rel_attn.v": "v",
    }
    assert {name: role_of(name) for name in names} == names


def test_a_role_that_occurs_twice_in_a_block_has_two_columns(tmp_path: Path):
    sizes = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64}
    torch.manual_seed(0)
    base = AutoConfig.for_model("bart", **sizes, **heads, max_position_embeddings=32)
    AutoModel.from_config(base).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model, _ = load_classifier(str(tmp_path / "base"), LABELS, LoRAConfig(rank=2, projections="qv"))
    randomize(model)
    save_adapter(model, tmp_path / "adapter")
    updates, _ = updates_of(read_adapter(tmp_path / "adapter"))
    grid = grid_of(updates)
    assert list(grid) == ["model.decoder.layers 0", "model.encoder.layers 0"]
    columns = {f"{name}.{role}_proj" for name in ("self_attn", "encoder_attn") for role in "qv"}
    assert all(set(row) == columns for row in grid.values())
    assert {update for row in grid.values() for update in row.values()} == {*updates, None}


def test_adapters_that_cannot_be_compared(adapter_dir: Path):
    updates, _ = updates_of(read_adapter(adapter_dir))
    with pytest.raises(ValueError, match="adapt no module in common"):
        compare(updates[:1], updates[1:2])
    with pytest.raises(
        ValueError, match=r"different sizes; got \(32, 5\) in the other adapter; expected \(32, 32\)"
    ):
        compare(updates, [replace(updates[3], A=updates[3].A[:, :5])])
