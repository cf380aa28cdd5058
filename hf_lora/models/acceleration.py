"""The fast path of training on a CPU: put into a model for the time of a training run, and taken out again."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_lora.lora.dropout import FastDropout
from hf_lora.models import attention

# Numbers of mallopt's options in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@contextmanager
def fast_training(model: nn.Module) -> Iterator[None]:
    """Inside, a model on a CPU trains with quick dropout masks and attention; the mathematics is the same.

    Every plain `nn.Dropout` draws its mask as `hf_lora.lora.dropout` does. Attention that is left to torch's choice
    ("sdpa", transformers' default) is computed by `hf_lora.models.attention`; another that was asked for stays. On
    other devices nothing changes.
    """
    if next(model.parameters()).device.type != "cpu":
        yield
        return
    keep_freed_memory()
    dropouts = [module for module in model.modules() if type(module) is nn.Dropout]
    switched = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        and module.config._attn_implementation == "sdpa"
        and module._can_set_attn_implementation()
    ]
    try:
        for dropout in dropouts:
            dropout.__class__ = FastDropout
        for module in switched:
            module.set_attn_implementation(attention.NAME)
        yield
    finally:
        for dropout in dropouts:
            dropout.__class__ = nn.Dropout
        for module in switched:
            module.set_attn_implementation("sdpa")


def keep_freed_memory() -> None:
    """Tell glibc to keep memory that is freed: every step asks for the same sizes again.

    Otherwise each step gives large activations back to the system, which then hands them out page by page,
    zeroed. Does nothing where the C library has no `mallopt`.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def set_threads(local_processes: int) -> None:
    """Share the host's cores among its training processes, where each would else take all or, under torchrun, one."""
    if local_processes > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_processes))
