"""A starts along the gradient of the training loss, so that the first steps of LoRA are those of full fine-tuning.

With B = 0 the first gradient of B is scaling * G A^T, where G `(out, in)` is the gradient of the frozen weight: B
learns only what A lets through. The first right singular vectors of G as A's rows let through as much as r rows can.
LoRA-GA (Wang et al. 2024, arXiv:2407.05000) starts A and B there and moves W; here B stays zero and W as it was.
The gradient needs a trained head: `start_head` first.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_lora.data.collation import is_stream
from hf_lora.lora.inject import injection, lora_disabled, lora_layers
from hf_lora.lora.layer import LoRALayer
from hf_lora.lora.linear import is_adaptable
from hf_lora.models.verify import evaluating

if TYPE_CHECKING:
    from hf_lora.training.trainer import LoRATrainer

AUTO, INIT = "auto", "gradient"
# Four times as many cost more and did no better, with 2 labels and with 150.
EXAMPLES = 128
# The norm of A's rows with Kaiming's initialization, uniform in +-1/sqrt(in), in the mean.
ROW_NORM = 3**-0.5
_OVERSAMPLING, _ITERATIONS = 16, 4
_SEED = 0


@dataclass(frozen=True)
class LoRAStart:
    """How A and B begin: `init`, and why; after so many seconds."""

    init: str
    reason: str
    seconds: float = 0.0

    def __str__(self) -> str:
        spent = f", {self.seconds:.1f} s" if self.seconds else ""
        return f"{self.init} ({self.reason}{spent})"


def start_lora(trainer: LoRATrainer, examples: int = EXAMPLES) -> LoRAStart:
    """Before training: turn the rows of every A to the first right singular vectors of its weight's gradient.

    The gradient is of the trainer's loss over `examples` of its training set, with the model as it is. A trainer that
    makes its model anew (`model_init`) starts that one in the same way.
    A keeps its random rows where a weight has no gradient, and beyond the weight's smaller side. Every process
    has to call it; each takes its share of the examples. The model's LoRAConfig says init="gradient" afterwards.
    Raises ValueError for weights that are sharded, quantized or merged, another initialization than Kaiming's, trained
    factors, no training data, and a gradient that is not finite.
    """
    began = time.perf_counter()
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    _check(trainer, model)
    data: Any = trainer.train_dataset
    data = list(islice(data, examples)) if is_stream(data) else data
    rows = np.random.default_rng(_SEED).choice(len(data), min(examples, len(data)), replace=False)
    gradients = weight_gradients(trainer, [data[row] for row in rows.tolist()])
    for name, gradient in gradients.items():
        if not torch.isfinite(gradient).all():
            raise ValueError(
                f"the gradient of {name} is not finite; look at the data and the model, or use lora_init=kaiming"
            )
    turned = sum(_turn(layer, gradients[name]) for name, layer in lora_layers(model).items())
    state = injection(model)
    state.config = replace(state.config, init=INIT)
    reason = f"A along the gradient of {len(rows):,} examples"
    if turned < len(gradients):
        reason += f", without one: {len(gradients) - turned} of {len(gradients)} weights"
    trainer.lora_start = LoRAStart(INIT, reason, time.perf_counter() - began)
    trainer.starts["lora"] = partial(start_lora, trainer, examples)
    return trainer.lora_start


def choose_start(trainer: LoRATrainer, init: str, head: str) -> LoRAStart:
    """Start A as `init` says; "auto": along the gradient, unless the head is random or there is no gradient.

    head: how the head starts, the `kind` of a `HeadStart`. Raises ValueError where "gradient" cannot be had.
    """
    if init not in (AUTO, INIT):
        return LoRAStart(init, "as asked for")
    reason = "the gradient of a random head says nothing"
    if init == INIT or head != "random":
        try:
            return start_lora(trainer)
        except ValueError as error:
            if init == INIT:
                raise
            reason = str(error)
    state = injection(trainer.model)
    state.config = replace(state.config, init="kaiming")
    return LoRAStart("kaiming", reason)


def awaits_start(trainer: LoRATrainer) -> bool:
    """Whether LoRAConfig(init="gradient") has been asked for, and A is still random and B zero."""
    asked = trainer.lora_start is None and injection(trainer.model).config.init == INIT
    return asked and not _is_trained(trainer.model)


def weight_gradients(trainer: LoRATrainer, examples: Sequence[Any]) -> dict[str, Tensor]:
    """The gradient of the loss, summed over the examples, for each adapted weight, in its shape and fp32.

    The adapter is disabled and dropout is off. No gradient is left on any parameter.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    weights = {name: layer.frozen_weight for name, layer in lora_layers(model).items()}
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    own = examples[trainer.args.process_index :: trainer.args.world_size]
    with lora_disabled(model), evaluating(model), _requiring_gradients(weights.values()):
        for batch in _batches(own, trainer.args):
            inputs = trainer.collated(batch)
            loss = trainer.compute_loss(model, inputs) * len(batch)
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), found, strict=True):
                if gradient is not None:
                    total += gradient
    return {name: trainer.accelerator.reduce(total, "sum") for name, total in sums.items()}


def leading_rows(matrix: Tensor, count: int) -> Tensor:
    """The first right singular vectors of a matrix `(out, in)` as rows `(count, in)`, or as many as there are."""
    width = min(count + _OVERSAMPLING, *matrix.shape)
    # Drawn on the CPU from a seed of its own, so that every process and device gets the same rows.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        _, _, right = torch.svd_lowrank(matrix.cpu().float(), q=width, niter=_ITERATIONS)
    return right[:, :count].T


@torch.no_grad()
def _turn(layer: LoRALayer, gradient: Tensor) -> bool:
    """Turn A's rows, those of each part of a fused weight to its own gradient; returns whether there was any."""
    matrix = layer.layout.to_matrix(gradient)
    parts = [matrix] if layer.parts is None else [matrix[list(rows)] for rows in layer.parts]
    for number, part in enumerate(parts):
        if part.any():
            first = number * layer.rank
            found = leading_rows(part, layer.rank)
            layer.lora_A[first : first + len(found)] = (ROW_NORM * found).to(layer.lora_A)
    return bool(matrix.any())


def _batches(examples: Sequence[Any], args: Any) -> Iterator[list[Any]]:
    """The examples by length, in batches that are no larger than those of training."""
    lengths = [len(row.get("input_ids", ())) if isinstance(row, Mapping) else 0 for row in examples]
    size = args.train_batch_size
    if (budget := getattr(args, "max_tokens_per_batch", None)) is not None:
        size = max(1, min(size, budget // max(1, *lengths, 1)))
    ordered = [examples[index] for index in np.argsort(lengths, kind="stable")]
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]


@contextmanager
def _requiring_gradients(weights: Iterable[Tensor]) -> Iterator[None]:
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def _is_trained(model: nn.Module) -> bool:
    return any(bool(layer.lora_B.any()) for layer in lora_layers(model).values())


def _check(trainer: LoRATrainer, model: nn.Module) -> None:
    layers, init = lora_layers(model).values(), injection(model).config.init
    data, sharded = trainer.train_dataset, trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    problems = {
        "FSDP or DeepSpeed, whose weights are sharded": sharded,
        "a quantized weight": not all(is_adaptable(layer.frozen_weight) for layer in layers),
        "a merged adapter": any(layer.merged for layer in layers),
        f"init={init!r}": init not in ("kaiming", INIT),
        "factors that have been trained": _is_trained(model),
        "no training data": data is None or (not is_stream(data) and not len(data)),
    }
    if problem := next((problem for problem, present in problems.items() if present), None):
        raise ValueError(
            f"A cannot start along the gradient of its weight; got {problem}; use lora_init=kaiming"
        )
