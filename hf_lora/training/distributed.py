"""What the processes of a distributed run agree about, what they send, and how one tells the others of an error."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import trainer
from transformers.integrations import deepspeed

from hf_lora.lora.inject import head_parameters, lora_parameters
from hf_lora.models.prefix import block_lists

T = TypeVar("T")
_FAILURES = "hf_lora/failures"


def process_count() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def wait_for_all() -> None:
    """Return when every process has called this."""
    if process_count() > 1:
        dist.barrier()


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true in any process; every process has to ask at the same time."""
    if process_count() == 1:
        return flag
    raised = torch.tensor([float(flag)], device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


def mean_shares(sizes: Sequence[int], device: torch.device) -> list[float]:
    """For each batch of a step, what its mean loss is multiplied by to give the mean over all examples of the step.

    sizes: of this process's batches, whose losses are averaged over, and then over the processes. 1.0 each where
    all batches of all processes are of one size.
    """
    total = torch.tensor(float(sum(sizes)), device=device)
    if process_count() > 1:
        dist.all_reduce(total)
    mean = total.item() / (len(sizes) * process_count()) if sizes else 1.0
    return [size / mean if mean else 1.0 for size in sizes]


def on_first(act: Callable[[], T]) -> T:
    """What `act` returns in the first process, in every process. A ValueError or OSError of it is raised in all."""
    rank = dist.get_rank() if process_count() > 1 else 0
    outcome: Any = None
    if rank == 0:
        try:
            outcome = act()
        except (ValueError, OSError) as error:
            outcome = error  # the others are waiting for an answer
    if process_count() > 1:
        values = [outcome]
        dist.broadcast_object_list(values, src=0)
        outcome = values[0]
    if isinstance(outcome, ValueError | OSError):
        raise outcome
    return outcome


def check_equal(facts: Mapping[str, str]) -> None:
    """Compare facts about the run between processes. Raises ValueError in all of them, naming what differs."""
    if process_count() == 1:
        return
    everywhere: list[Any] = [None] * process_count()
    dist.all_gather_object(everywhere, dict(facts))
    for what in facts:
        for rank, other in enumerate(everywhere):
            if other[what] != everywhere[0][what]:
                raise ValueError(
                    f"the processes do not train the same; got another {what} in process {rank} "
                    f"({other[what]}) than in process 0 ({everywhere[0][what]}); expected the same everywhere; "
                    "give every machine the same files and versions"
                )


def keep_frozen_local(model: nn.Module) -> None:
    """Let DistributedDataParallel leave what is not trained alone: neither sent at the start nor compared.

    Every process reads the pretrained weights itself. Running statistics (BatchNorm) do change and are kept equal.
    """
    changing = {
        f"{name}.{buffer}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for buffer, _ in module.named_buffers(recurse=False)
    }
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in model.named_buffers() if name not in changing]
    # A tensor under several names counts under each of them.
    shared = [name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad]
    ignored = list(dict.fromkeys([*frozen, *shared, *buffers]))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)


def first_to_fail() -> bool:
    """Whether this process is the first of its run to end with an error; the others end because of it.

    Before the processes have met, the first of each machine.
    """
    if process_count() > 1:
        try:
            return dist.distributed_c10d._get_default_store().add(_FAILURES, 1) == 1
        except RuntimeError:  # the process that kept the count is gone
            return False
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def leave() -> None:
    """Leave the process group at the end of a run, after all the others have come to it too."""
    if process_count() > 1:
        dist.barrier()
        dist.destroy_process_group()


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
