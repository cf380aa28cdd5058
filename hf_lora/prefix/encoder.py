"""Run what a model computes before its first trained block, or go around it.

The blocks below compute the same for an example in every epoch: `hf_lora.prefix.cache` keeps their output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_lora.lora.inject import injection
from hf_lora.models.pooling import MEAN, PooledClassifier
from hf_lora.models.verify import evaluating

# Trainer lets GPUs multiply fp32 with the ten digits of TF32.
_TF32 = 2.0**-10


class FrozenPrefix:
    """The part of a model before its first trained block: embeddings and frozen blocks.

    The blocks are the `nn.ModuleList` that the adapted modules lie in. Nothing stays on the model between calls.
    Raises ValueError for a model without LoRA, without one such list, or whose first block is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        found = block_lists(model)
        if len(found) != 1:
            got = f"{len(found)} in {type(model).__name__} ({', '.join(found) or 'none'})"
            raise _unusable("one list of blocks that holds the adapted modules", got)
        [(self.name, self.blocks)] = found.items()
        trained = [[n for n, p in block.named_parameters() if p.requires_grad] for block in self.blocks]
        depth = next((depth for depth, names in enumerate(trained) if names), None)
        if depth is None:
            raise _unusable("a trained block", f"none in {self.name}", "train a LoRA factor there")
        if depth == 0:
            got = f"{self.name}.0.{trained[0][0]} trained, in the first of {len(trained)} blocks"
            instead = "adapt the top ones only, such as --lora_layers -2 -1, and not every bias"
            raise _unusable("frozen blocks below the trained ones", got, instead)
        # A head that reads the states of layers below the first trained block needs them to be run.
        if isinstance(model, PooledClassifier) and model.layers[0] <= depth:
            got = f"pooling={model.pooling!r}, which reads layer {model.layers[0]} of {model.layers[-1]}"
            got = f"{got}, where the first {depth} are frozen"
            raise _unusable("a head that reads trained layers alone", got, f"use pooling={MEAN!r}")
        self.model, self.depth = model, depth
        # What each block returns: None for a tensor, else the length of a tuple that starts with it.
        self._returned: dict[int, int | None] = {}
        self.tolerance = 0.0

    def observe(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """An ordinary forward in evaluation mode: the states at the first trained block, and the logits.

        inputs: what the model takes, with input_ids `(batch, length)` and without labels.
        Returns states `(batch, length, width)` and logits `(batch, labels)`.
        Raises ValueError if the states depend on a trained parameter, or are not of that shape.
        """

        def note(index: int, _: nn.Module, args: Any, output: Any) -> None:
            self._returned[index] = None if isinstance(output, Tensor) else len(output)

        with torch.enable_grad(), ExitStack() as hooks:
            for index, block in enumerate(self.blocks):
                hooks.enter_context(block.register_forward_hook(partial(note, index)))
            states, logits = self._run(inputs)
        if states.requires_grad:
            trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            ones = torch.ones_like(states)
            gradients = torch.autograd.grad(states, list(trained.values()), ones, allow_unused=True)
            used = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is not None]
            if used:
                what = f"everything before {self.name}.{self.depth} frozen"
                got = f"{len(used)} trained parameters there, first {used[0]!r}"
                raise _unusable(what, got, "adapt nothing but the top blocks and the head")
        return states.detach(), logits.detach()

    def record(self, inputs: Mapping[str, Any]) -> Tensor:
        """The states `(batch, length, width)` at the first trained block: no dropout, no autograd.

        `observe` must have run before: the blocks from there on are gone around in the way it has seen.
        """
        with torch.no_grad(), self._around(range(self.depth, len(self.blocks))):
            return self._run(inputs)[0]

    @contextmanager
    def replay(self, states: Tensor) -> Iterator[None]:
        """Inside, forwards of the model go around the frozen blocks, and the first trained one gets `states`.

        states: `(batch, length, width)` for the very batch that the model is called with.
        """

        def substitute(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            hidden = hidden_states(args, kwargs)
            if hidden.shape != states.shape:
                raise ValueError(
                    f"the kept states do not fit the batch; got {tuple(states.shape)}; "
                    f"expected {tuple(hidden.shape)}; run without cache_frozen_prefix"
                )
            # Reentrant activation checkpointing finds no gradients behind an input that requires none, so that
            # Trainer lets the embeddings' output require them; what stands in for it must do so too.
            given = states.to(hidden.device).requires_grad_(hidden.requires_grad)
            return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})

        hook = self.blocks[self.depth].register_forward_pre_hook(substitute, with_kwargs=True)
        with hook, self._around(range(self.depth)):
            yield

    def _run(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """A forward in evaluation mode: the states that the first trained block is called with, and the logits."""
        found: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(hidden_states(args, kwargs))
            self.tolerance = _tolerance(found[-1])

        first_trained = self.blocks[self.depth]
        with evaluating(self.model), first_trained.register_forward_pre_hook(keep, with_kwargs=True):
            logits = self.model(**inputs)["logits"]
        where, expected = f"{self.name}.{self.depth}", tuple(inputs["input_ids"].shape)
        if len(found) != 1:
            raise _unusable("blocks that run once each", f"{len(found)} calls of {where}")
        shape = tuple(found[0].shape)
        if len(shape) != 3 or shape[:2] != expected:
            got = f"{shape} at {where} for input_ids {expected}"
            raise _unusable("states of shape (batch, length, width)", got)
        return found[0], logits

    @contextmanager
    def _around(self, indices: Iterable[int]) -> Iterator[None]:
        """Inside, these blocks give back the hidden states they get.

        They stay in their list: a model may count its blocks, or take each one's mask by its number.
        """
        before = {index: vars(self.blocks[index]).get("forward") for index in indices}
        try:
            for index in before:
                vars(self.blocks[index])["forward"] = partial(pass_through, self._returned.get(index))
            yield
        finally:
            for index, forward in before.items():
                vars(self.blocks[index]).pop("forward", None)
                if forward is not None:
                    vars(self.blocks[index])["forward"] = forward


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost `nn.ModuleList`s that the adapted modules lie in, by dotted name."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    # Outer modules come before inner ones.
    around = (
        next((name for name in lists if target.module.startswith(f"{name}.")), None)
        for target in injection(model).targets
    )
    return {name: lists[name] for name in around if name is not None}


def _unusable(what: str, got: str, instead: str = "run without it") -> ValueError:
    return ValueError(f"cache_frozen_prefix needs {what}; got {got}; {instead}")


def hidden_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among the arguments of a block: the first one, or the one of that name."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise _unusable("blocks that take hidden states", type(hidden).__name__)
    return hidden


def _tolerance(states: Tensor) -> float:
    """The relative difference that rounding explains: two thirds of the digits of the type computed in must agree.

    Call it inside the forward, where autocast is on.
    """
    kind = states.device.type
    resolution = max(torch.finfo(states.dtype).eps, _TF32 if kind == "cuda" else 0.0)
    if torch.is_autocast_enabled(kind):
        resolution = max(resolution, torch.finfo(torch.get_autocast_dtype(kind)).eps)
    return float(resolution ** (2 / 3))


def pass_through(returned: int | None, *args: Any, **kwargs: Any) -> Any:
    """The forward of a block that does nothing; None for what it would return besides the hidden states."""
    hidden = hidden_states(args, kwargs)
    return hidden if returned is None else (hidden, *[None] * (returned - 1))
