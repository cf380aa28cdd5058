"""Sharded models in one process: which layers are wrapped, what is refused, and that nothing else is touched."""

import os
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import MODEL_TYPES, tiny_classifier
from transformers import trainer
from transformers.integrations import deepspeed

from hf_lora import LoRAConfig, inject_lora, lora_parameters
from hf_lora.training.distributed import (
    check_fsdp,
    gathered,
    loading_without_frozen_weights,
    name_blocks,
    shard_on_cpu,
    whole_weights,
)

BLOCKS = {
    "bert": ["BertLayer"],
    "roberta": ["RobertaLayer"],
    "xlm-roberta": ["XLMRobertaLayer"],
    "camembert": ["CamembertLayer"],
    "distilbert": ["TransformerBlock"],
    "electra": ["ElectraLayer"],
    "mpnet": ["MPNetLayer"],
    "albert": ["AlbertLayerGroup"],
    "deberta-v2": ["DebertaV2Layer"],
}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_blocks_that_hold_adapters_are_wrapped(model_type):
    model = tiny_classifier(model_type)
    inject_lora(model, LoRAConfig(rank=4))
    name_blocks(model)
    assert model._no_split_modules == BLOCKS[model_type]
    # Not for all models of the class.
    assert type(model)._no_split_modules != BLOCKS[model_type] or "_no_split_modules" in model.__dict__


def test_a_plain_model_stays_as_it_is():
    model = tiny_classifier("bert")
    inject_lora(model, LoRAConfig(rank=4))
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with gathered(model):
        next(iter(lora_parameters(model).values())).data.fill_(3.0)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert torch.equal(next(iter(lora_parameters(model).values())), torch.full((4, 32), 3.0))


@pytest.mark.parametrize("version", [1, None])
def test_the_first_version_of_fsdp_is_refused(version):
    with pytest.raises(ValueError, match=r"second version; got fsdp_version .*; expected 2"):
        check_fsdp(SimpleNamespace(fsdp_version=version))
    check_fsdp(SimpleNamespace(fsdp_version=2))


def test_fsdp_is_put_in_only_where_it_was_asked_for(monkeypatch):
    accelerator = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert not shard_on_cpu(accelerator)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not shard_on_cpu(SimpleNamespace(distributed_type=DistributedType.FSDP))


def test_loading_whole_is_for_the_time_of_loading(monkeypatch):
    config = SimpleNamespace(is_zero3=lambda: True, config={})
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: config)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with whole_weights():
        assert not deepspeed.is_deepspeed_zero3_enabled()
        assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert deepspeed.is_deepspeed_zero3_enabled()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


def test_deepspeed_checkpoints_are_read_without_the_frozen_weights(monkeypatch):
    calls = []
    monkeypatch.setattr(
        trainer,
        "deepspeed_load_checkpoint",
        lambda engine, path, load_module_strict=True: calls.append(load_module_strict),
    )
    with loading_without_frozen_weights():
        trainer.deepspeed_load_checkpoint("engine", "path", load_module_strict=True)
    trainer.deepspeed_load_checkpoint("engine", "path")
    assert calls == [False, True]
