"""The private parts of the libraries below that `training` touches, beside Trainer's own protected methods.

`tests/training/test_trainer_hooks.py` fails by name where a new version moves one of either.
"""

from __future__ import annotations

import copy
import json
import typing
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from enum import Enum
from functools import cache
from numbers import Integral, Real
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers import trainer as trainer_module
from transformers.integrations import deepspeed, is_deepspeed_available
from transformers.trainer_utils import has_length

from hf_lora._choices import nearest, unknown
from hf_lora.lora.inject import lora_layers


def with_batches(loader: DataLoaderShard, batches: Sampler[list[int]]) -> DataLoaderShard:
    """The loader that accelerate prepared, with batches that are divided between processes already."""
    # accelerate's own division takes batches of one size and repeats examples to fill the last.
    names = (
        *("collate_fn", "in_order", "multiprocessing_context", "num_workers", "persistent_workers"),
        *("pin_memory", "prefetch_factor", "worker_init_fn", "device", "_non_blocking"),
    )
    options = {name: getattr(loader, name) for name in names}
    return DataLoaderShard(loader.dataset, batch_sampler=batches, **options)


def not_empty(loader: Any, args: TrainingArguments) -> Any:
    """The loader. Raises ValueError where `dataloader_drop_last` leaves nothing to train on."""
    if args.dataloader_drop_last and has_length(loader) and not len(loader):
        raise ValueError(
            f"no batch is left; got {len(loader.dataset)} examples, per_device_train_batch_size="
            f"{args.per_device_train_batch_size} and dataloader_drop_last; expected one full batch; leave it out"
        )
    return loader


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


def check_types(args: TrainingArguments) -> None:
    """Raise ValueError unless numbers are numbers, words are those that are known, and JSON texts are JSON."""
    if args.deepspeed and not is_deepspeed_available():
        # Before transformers makes half of its configuration, which every model that is loaded then asks.
        raise ValueError("deepspeed is not installed; pip install deepspeed, or train without it")
    for name, members in _members(type(args)).items():  # type: ignore[arg-type]
        value = getattr(args, name)
        if dict in members and isinstance(value, str) and value.startswith("{"):
            with one_line(f"{name} is not valid JSON; got {value!r}"):
                json.loads(value)
        words = [each.value for kind in members if issubclass(kind, Enum) for each in kind]
        kinds = set(members) - {type(None)}
        expected = ", ".join(words) or " or ".join(sorted(kind.__name__ for kind in kinds))
        usable = getattr(value, "value", value) in words if words and isinstance(value, str) else True
        if value is not None and kinds and kinds <= {int, float, bool}:
            usable = isinstance(value, Integral) or (float in kinds and isinstance(value, Real))
        if not usable:
            near = nearest(value, words)
            raise ValueError(f"{name} is not usable; got {value!r}; expected {expected}{near}")


@cache
def _members(kind: Any) -> dict[str, tuple[Any, ...]]:
    """The types of each argument: of a union all of them, of generic ones the origin."""
    hints = typing.get_type_hints(kind)
    unions = {
        entry.name: typing.get_args(hints[entry.name]) or (hints[entry.name],) for entry in fields(kind)
    }
    origins = {name: [typing.get_origin(each) or each for each in kinds] for name, kinds in unions.items()}
    return {name: tuple(each for each in kinds if isinstance(each, type)) for name, kinds in origins.items()}


def try_arguments(args: TrainingArguments) -> None:
    """Make what Trainer makes when it trains: optimizer, schedule, loader, compiler; of one parameter and example."""
    layer = nn.Linear(1, 1)
    optim, schedule = (getattr(value, "value", value) for value in (args.optim, args.lr_scheduler_type))
    with one_line(f"optim={optim!r} cannot be made with its arguments"):
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, layer)
        optimizer = kind([{"params": list(layer.parameters()), "weight_decay": args.weight_decay}], **options)
    if args.optim_args:
        plain = copy.copy(args)
        plain.optim_args = None
        unused = Trainer.get_optimizer_cls_and_kwargs(plain, layer)[1] == options
        if unused:
            raise ValueError(f"optim_args is not usable; got {args.optim_args!r}; optim={optim!r} takes none")
    with one_line(
        f"lr_scheduler_type={schedule!r} cannot be made; its options go into lr_scheduler_kwargs, as JSON"
    ):
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, args.lr_scheduler_kwargs)
    names = ("num_workers", "persistent_workers", "prefetch_factor", "multiprocessing_context")
    with one_line("the dataloader_ arguments do not go together"):
        DataLoader([0], **{name: getattr(args, f"dataloader_{name}") for name in names})  # type: ignore[arg-type]
    if args.torch_compile:
        backends = torch._dynamo.list_backends(exclude_tags=())
        backend = args.torch_compile_backend
        if backend not in backends:
            raise unknown("torch_compile_backend", backend, backends)
        mode, modes = args.torch_compile_mode, torch._inductor.list_mode_options()
        if mode is not None and mode not in modes:
            raise ValueError(f"torch_compile_mode is not usable; got {mode!r}; expected {', '.join(modes)}")


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Inside, an error of the libraries below becomes a ValueError of one line; `what` stands before it."""
    try:
        yield
    except (ValueError, OSError, TypeError, KeyError, ImportError, RuntimeError, AssertionError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{what}: {told}") from error


def check_acting(model: nn.Module) -> None:
    """Raises ValueError for a model whose LoRA would get no gradient: without it, merged or disabled."""
    if wrong := [name for name, layer in lora_layers(model).items() if layer.merged or not layer.enabled]:
        raise ValueError(
            f"cannot train a merged or disabled adapter; got {len(wrong)} such layers, first {wrong[0]!r}; "
            "call unmerge_lora first, and train outside lora_disabled"
        )


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Nothing trained may be missing from the optimizer: the head made after it is the classic case."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise ValueError(
            f"the optimizer does not hold {len(missing)} trained parameters, first {missing[0]!r}; "
            "make the optimizer after inject_lora and load_classifier, or let LoRATrainer make it"
        )
