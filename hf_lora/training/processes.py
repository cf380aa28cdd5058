"""What the processes of a distributed run agree about, what they send, and how one tells the others of an error."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

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
