"""The private parts of the libraries below that `training` touches, beside Trainer's own protected methods.

`tests/training/test_trainer_hooks.py` fails by name where a new version moves one of either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler
from transformers import trainer as trainer_module
from transformers.integrations import deepspeed


def with_batches(loader: DataLoaderShard, batches: Sampler[list[int]]) -> DataLoaderShard:
    """The loader that accelerate prepared, with batches that are divided between processes already."""
    # accelerate's own division takes batches of one size and repeats examples to fill the last.
    names = (
        *("collate_fn", "in_order", "multiprocessing_context", "num_workers", "persistent_workers"),
        *("pin_memory", "prefetch_factor", "worker_init_fn", "device", "_non_blocking"),
    )
    options = {name: getattr(loader, name) for name in names}
    return DataLoaderShard(loader.dataset, batch_sampler=batches, **options)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, the attribute has another value."""
    before = getattr(owner, name, None)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def trainable_if_quantized(model: nn.Module | None) -> AbstractContextManager[None]:
    """Inside, Trainer takes a quantized model, which it refuses unless transformers' own adapters are loaded."""
    quantized = getattr(model, "is_quantized", False)
    return replaced(model, "_hf_peft_config_loaded", True) if quantized else nullcontext()


@contextmanager
def keeping_rates(trainer: Any) -> Iterator[None]:
    """Inside, the states of optimizer and schedule are loaded; then rate, decay and the like are this run's again."""
    groups = trainer.optimizer.param_groups
    own = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    yield
    for group, new in zip(trainer.optimizer.param_groups, own, strict=True):
        # Where the schedule is now stays: the share of the initial rate.
        share = group["lr"] / group["initial_lr"] if group.get("initial_lr") else 1.0
        group |= new
        group["lr"] = share * group.get("initial_lr", group["lr"])
    if hasattr(trainer.lr_scheduler, "base_lrs"):
        trainer.lr_scheduler.base_lrs = [group["initial_lr"] for group in own]
        trainer.lr_scheduler._last_lr = [
            group["lr"] for group in trainer.optimizer.param_groups
        ]  # what is logged


def loading_without_frozen_weights() -> AbstractContextManager[None]:
    """Inside, Trainer takes a DeepSpeed checkpoint without the frozen weights, as for peft's own model class."""
    strict = trainer_module.deepspeed_load_checkpoint

    def load(engine: Any, path: str, **_: Any) -> None:
        strict(engine, path, load_module_strict=False)

    return replaced(trainer_module, "deepspeed_load_checkpoint", load)


def without_deepspeed_config() -> AbstractContextManager[None]:
    """Inside, `from_pretrained` does not know of DeepSpeed."""
    return replaced(deepspeed, "_hf_deepspeed_config_weak_ref", None)


def count_in_store(key: str) -> int:
    """Count this call under `key` among all processes; returns the calls so far. RuntimeError without the store."""
    return dist.distributed_c10d._get_default_store().add(key, 1)


def ignore_in_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Let DistributedDataParallel leave these parameters and buffers alone."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(names))


def set_fsdp(accelerator: Any) -> None:
    """Make FSDP the accelerator's way of distributing, as accelerate does on GPUs with the launcher's settings."""
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def set_wrapped_classes(model: nn.Module, names: Iterable[str]) -> None:
    """Name the classes of the layers that FSDP wraps."""
    model._no_split_modules = sorted(names)  # type: ignore[assignment]


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter in the place of another, without the checks of `setattr`."""
    module._parameters[name] = parameter


def chosen_rows(dataset: Any) -> Any:
    """The rows that a `datasets.Dataset` has of its Arrow table, as an Arrow column; None: all in order."""
    return None if dataset._indices is None else dataset._indices.column(0)
