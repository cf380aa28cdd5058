"""Adapters of a model that is sharded over processes (FSDP2, DeepSpeed ZeRO-3): whole for a while, and what to wrap."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import trainer
from transformers.integrations import deepspeed

from hf_lora.lora.inject import head_parameters, lora_parameters
from hf_lora.models.prefix import block_lists


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, LoRA, head and trained biases are whole tensors in every process; changes to them are kept.

    Every process has to enter. Nothing happens to a model that is not sharded.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the outermost stays whole after a forward, and would be sharded under our hands
    own = {id(p): p for p in (*lora_parameters(model).values(), *head_parameters(model).values())}
    own |= {id(p): p for p in model.parameters() if p.requires_grad}
    with ExitStack() as stack:
        partitioned = [p for p in own.values() if hasattr(p, "ds_id")]
        if partitioned:
            zero = import_module("deepspeed").zero
            stack.enter_context(zero.GatheredParameters(partitioned, modifier_rank=0))
        swapped: list[tuple[nn.Module, str, Any, nn.Parameter]] = []
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if isinstance(parameter, DTensor) and id(parameter) in own:
                    whole = nn.Parameter(parameter.detach().full_tensor(), parameter.requires_grad)
                    swapped.append((module, name, parameter, whole))
        for module, name, _, whole in swapped:
            module._parameters[name] = whole
        try:
            yield
        finally:
            for module, name, shard, whole in swapped:
                module._parameters[name] = shard
                # Each process takes its part of what it has itself; nothing is sent.
                part = distribute_tensor(
                    whole.detach(), shard.device_mesh, shard.placements, src_data_rank=None
                )
                with torch.no_grad():
                    shard.copy_(part)


@contextmanager
def whole_weights() -> Iterator[None]:
    """Inside, pretrained models are loaded whole in every process, whatever the launcher has asked for.

    The probe before training and the digest of the base need all weights. FSDP and DeepSpeed divide them afterwards.
    """
    asked = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    known = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = known
        if asked is None:
            del os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]
        else:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = asked


@contextmanager
def loading_without_frozen_weights() -> Iterator[None]:
    """Inside, Trainer takes a DeepSpeed checkpoint without the frozen weights, as it does for peft's own model class.

    The adapter's tensors are compared one by one, as they are read from their own file.
    """
    strict = trainer.deepspeed_load_checkpoint
    trainer.deepspeed_load_checkpoint = lambda engine, path, **_: strict(
        engine, path, load_module_strict=False
    )
    try:
        yield
    finally:
        trainer.deepspeed_load_checkpoint = strict


def shard_on_cpu(accelerator: Any) -> bool:
    """Let FSDP work between CPU processes, where accelerate passes it over without a word; whether it was asked for.

    Does what accelerate does on GPUs, with the settings that its launcher put into the environment.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not asked or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return False
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return True


def check_fsdp(plugin: Any) -> None:
    """Refuse what an adapter cannot be saved from. Raises ValueError for the first version of FSDP."""
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            f"FSDP is supported in its second version; got fsdp_version {plugin.fsdp_version}; expected 2; set "
            "fsdp_version: 2 in the accelerate configuration, as scripts/accelerate/fsdp2.yaml does"
        )


def name_blocks(model: nn.Module) -> None:
    """Tell accelerate which layers FSDP wraps: the blocks that hold the adapters.

    Several model types name none (distilbert, electra, albert, mpnet, deberta), and FSDP would gather the whole model
    at once. Others name their embeddings too, in which accelerate then shards the word embeddings a second time.
    """
    blocks = {type(block).__name__ for blocks in block_lists(model).values() for block in blocks}
    model._no_split_modules = sorted(blocks)  # type: ignore[assignment]
