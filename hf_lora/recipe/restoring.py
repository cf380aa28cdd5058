"""Training that is undone: for a while a trainer trains, and then everything is as it was, to the bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def restored(trainer: Any) -> Iterator[None]:
    """Afterwards model, optimizer, trainer, accelerator and random states are as they were, to the bit."""
    accelerator = trainer.accelerator
    model: Any = trainer.model
    with ExitStack() as stack:
        # In the reverse order: attributes first, so that the rest is put into the objects that were there.
        stack.enter_context(_same_random_states())
        stack.enter_context(_same_tensors(model))
        for holder in (trainer.optimizer, accelerator.scaler):
            if holder is not None:
                stack.callback(holder.load_state_dict, copy.deepcopy(holder.state_dict()))
        # `gradient_state` remembers the loader that the test left in its middle.
        for holder in (accelerator.gradient_state, accelerator, model, trainer):
            stack.enter_context(_same_attributes(holder))
        yield


@contextmanager
def _same_attributes(holder: Any) -> Iterator[None]:
    before = dict(vars(holder))
    try:
        yield
    finally:
        vars(holder).clear()
        vars(holder).update(before)


@contextmanager
def _same_tensors(model: nn.Module) -> Iterator[None]:
    """Trained parameters, gradients, buffers and modes. What is frozen has no gradient and is not touched."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values = [(tensor, tensor.detach().clone()) for tensor in (*trained, *model.buffers())]
    gradients = [(p, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


@contextmanager
def _same_random_states() -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
