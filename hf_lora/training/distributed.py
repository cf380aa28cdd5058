"""What the processes of a distributed run agree about and send to each other; models sharded between them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import transformers
from accelerate.utils import DistributedType, patch_environment
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_lora.lora.inject import base_parameters, head_parameters, lora_parameters
from hf_lora.models.fingerprint import fingerprint
from hf_lora.prefix.encoder import block_lists
from hf_lora.training import _trainer_hooks as hooks
from hf_lora.version import __version__

T = TypeVar("T")
_FAILURES = "hf_lora/failures"
_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


def process_count() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def meets_over_cpus() -> bool:
    """Whether a launcher has started several processes where no accelerator connects them.

    accelerate connects CPUs only where it is told, and its launcher does not pass on that its file says so.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return launched_count() > 1 and (accelerator is None or accelerator.type == "mps")


def launched_count() -> int:
    """How many processes a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_met() -> None:
    """Raise ValueError where a launcher has started several processes, and this one trains alone."""
    if launched_count() > 1 and process_count() == 1:
        raise ValueError(
            f"a launcher has started {launched_count()} processes, and each would train alone; expected one process "
            "group; use LoRATrainingArguments, or set use_cpu=True in the arguments where there is no GPU"
        )


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
    """What the mean loss of each batch of a step, by size, is multiplied by to give the mean over its examples."""
    total = torch.tensor(float(sum(sizes)), device=device)
    if process_count() > 1:
        dist.all_reduce(total)
    mean = total.item() / (len(sizes) * process_count()) if sizes else 1.0
    return [size / mean if mean else 1.0 for size in sizes]


def on_first(act: Callable[[], T]) -> T:
    """What `act` returns in the first process, in every process. A ValueError or OSError of it is raised in all."""
    if process_count() == 1:
        return act()
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [act()]
        except (ValueError, OSError) as error:
            outcome = [error]  # the others are waiting for an answer
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], ValueError | OSError):
        raise outcome[0]
    return outcome[0]


def check_equal(facts: Mapping[str, str]) -> None:
    """Compare facts about the run between processes. Raises ValueError in all of them, naming what differs."""
    if process_count() == 1:
        return
    everywhere: list[Any] = [None] * process_count()
    dist.all_gather_object(everywhere, dict(facts))
    for what, (rank, other) in product(facts, enumerate(everywhere)):
        if other[what] != everywhere[0][what]:
            raise ValueError(
                f"the processes do not train the same; got another {what} in process {rank} ({other[what]}) than in "
                f"process 0 ({everywhere[0][what]}); expected the same everywhere; give every machine the same files "
                "and versions"
            )


def check_processes(model: nn.Module, lengths: np.ndarray | None, sharded: bool) -> None:
    """Raise ValueError unless every process starts from the same weights, data and versions.

    lengths: of the examples, None where they are not known. sharded: whether each takes a part of its own weights;
    otherwise DDP sends the first process's trained ones to all.
    """
    digest = "of unknown length" if lengths is None else hashlib.sha256(lengths.tobytes()).hexdigest()[:16]
    facts = {
        "hf_lora, torch or transformers": f"{__version__}, {torch.__version__}, {transformers.__version__}",
        "base model": fingerprint(base_parameters(model)),
        "training set": digest,
    }
    if sharded:
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        facts["adapter and head at the start"] = fingerprint(trained)
    check_equal(facts)


def keep_frozen_local(model: nn.Module) -> None:
    """Let DistributedDataParallel leave what is not trained alone: neither sent at the start nor compared.

    Every process reads the pretrained weights itself. Running statistics (BatchNorm) do change and are kept equal.
    """
    buffers = [name for name, _ in model.named_buffers() if name.rpartition(".")[2] not in _RUNNING]
    # A tensor under several names counts under each of them.
    frozen = [name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad]
    hooks.ignore_in_ddp(model, [*frozen, *buffers])


def first_to_fail() -> bool:
    """Whether this process is the first of its run (or, before they have met, of its machine) to end with an error."""
    if process_count() > 1:
        try:
            return hooks.count_in_store(_FAILURES) == 1
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
    """Inside, LoRA, head and trained biases are whole in every process, which all have to enter; changes are kept."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the outermost stays whole after a forward, and FSDP would reshard it here
    own = {id(p): p for p in (*lora_parameters(model).values(), *head_parameters(model).values())}
    own |= {id(p): p for p in model.parameters() if p.requires_grad}
    with ExitStack() as stack:
        partitioned = [p for p in own.values() if hasattr(p, "ds_id")]
        if partitioned:
            zero = import_module("deepspeed").zero
            stack.enter_context(zero.GatheredParameters(partitioned, modifier_rank=0))
        swapped: list[tuple[nn.Module, str, Any, nn.Parameter]] = []
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if isinstance(parameter, DTensor) and id(parameter) in own:
                    shard: Any = parameter.detach()
                    whole = nn.Parameter(shard.full_tensor(), parameter.requires_grad)
                    swapped.append((module, name, parameter, whole))
        for module, name, _, whole in swapped:
            hooks.set_parameter(module, name, whole)
        try:
            yield
        finally:
            for module, name, shard, whole in swapped:
                hooks.set_parameter(module, name, shard)
                with torch.no_grad():
                    # Each process takes its part of what it has itself; nothing is sent.
                    mesh = (shard.device_mesh, shard.placements)
                    shard.copy_(distribute_tensor(whole.detach(), *mesh, src_data_rank=None))


@contextmanager
def whole_weights() -> Iterator[None]:
    """Inside, pretrained models are loaded whole in every process, for the probe and the digest of the base."""
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"), hooks.without_deepspeed_config():
        yield


def shard_on_cpu(accelerator: Any) -> bool:
    """Let FSDP work between CPU processes, which accelerate passes over; returns whether it was asked for."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    passed_over = asked and accelerator.distributed_type == DistributedType.MULTI_CPU
    if passed_over:
        hooks.set_fsdp(accelerator)
    return passed_over


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
    hooks.set_wrapped_classes(model, blocks)
