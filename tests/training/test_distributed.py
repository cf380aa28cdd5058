"""What processes agree about, and sharded models; here in one process, in several in tests/integration."""

import os
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import MODEL_TYPES, tiny_classifier
from torch import nn
from transformers.integrations import deepspeed

from hf_lora import LoRAConfig, inject_lora, lora_parameters
from hf_lora.training.distributed import (
    any_process,
    check_equal,
    check_fsdp,
    first_to_fail,
    gathered,
    keep_frozen_local,
    mean_shares,
    name_blocks,
    on_first,
    shard_on_cpu,
    whole_weights,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([16], [1.0]), ([8, 8, 8], [1.0, 1.0, 1.0]), ([8, 4], [4 / 3, 2 / 3]), ([], []), ([0], [1.0])],
)
def test_means_of_batches_are_weighted_by_their_examples(sizes, expected):
    assert mean_shares(sizes, CPU) == expected
    if len(set(sizes)) == 1:
        # Exactly: the loss of equal batches must not be touched.
        assert all(share == 1.0 for share in mean_shares(sizes, CPU))


def test_shares_make_the_mean_over_all_examples():
    losses, sizes = [0.5, 2.0, 1.0], [3, 1, 6]
    shares = mean_shares(sizes, CPU)
    mean = sum(loss * share for loss, share in zip(losses, shares, strict=True)) / 3
    assert mean == pytest.approx((3 * 0.5 + 1 * 2.0 + 6 * 1.0) / 10)


def test_one_process_agrees_with_itself(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    check_equal({"base model": "a"})
    assert any_process(True, CPU) and not any_process(False, CPU)
    assert on_first(lambda: 3) == 3 and first_to_fail()
    with pytest.raises(ValueError, match="wrong"):
        on_first(lambda: (_ for _ in ()).throw(ValueError("wrong")))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not first_to_fail()


def test_frozen_weights_and_buffers_are_not_sent_and_what_changes_is():
    model = tiny_classifier("bert")
    inject_lora(model, LoRAConfig(rank=4))
    model.norm = nn.BatchNorm1d(3)
    model.norm.requires_grad_(False)
    keep_frozen_local(model)
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    everything = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert everything - ignored == trained | statistics


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
