"""Run what a model computes before its first trained block, or go around it.

The blocks below compute the same for an example in every epoch: `hf_lora.training.prefix_cache` keeps their output.
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
        self.model = model
        self.name, self.blocks = _stack(model)
        self.depth = _depth(self.name, self.blocks)
        _check_layers_read(model, self.depth)
        # What each block returns: None for a tensor, else the length of a tuple that starts with it.
        self._returned: dict[int, int | None] = {}
        self.tolerance = 0.0

    def observe(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """An ordinary forward in evaluation mode: the states at the first trained block, and the logits.

        inputs: what the model takes, with input_ids `(batch, length)` and without labels.
        Returns states `(batch, length, width)` and logits `(batch, labels)`.
        Raises ValueError if the states depend on a trained parameter, or are not of that shape.
        """
        with torch.enable_grad(), evaluating(self.model), self._returns_noted(), self._captured() as found:
            logits = self.model(**inputs)["logits"]
        states = self._only(found, inputs)
        self._check_frozen(states)
        return states.detach(), logits.detach()

    def record(self, inputs: Mapping[str, Any]) -> Tensor:
        """The states `(batch, length, width)` at the first trained block: no dropout, no autograd.

        `observe` must have run before: the blocks from there on are gone around in the way it has seen.
        """
        above = range(self.depth, len(self.blocks))
        with torch.no_grad(), evaluating(self.model), self._around(above), self._captured() as found:
            self.model(**inputs)
        return self._only(found, inputs)

    @contextmanager
    def replay(self, states: Tensor) -> Iterator[None]:
        """Inside, forwards of the model go around the frozen blocks, and the first trained one gets `states`.

        states: `(batch, length, width)` for the very batch that the model is called with.
        """

        def substitute(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            hidden = _hidden(args, kwargs)
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

    @contextmanager
    def _captured(self) -> Iterator[list[Tensor]]:
        """Inside, collects the hidden states that the first trained block is called with."""
        found: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(_hidden(args, kwargs))
            self.tolerance = _tolerance(found[-1])

        with self.blocks[self.depth].register_forward_pre_hook(keep, with_kwargs=True):
            yield found

    @contextmanager
    def _returns_noted(self) -> Iterator[None]:
        """Inside, notes what kind of thing each block returns."""

        def note(index: int, _: nn.Module, args: Any, output: Any) -> None:
            self._returned[index] = None if isinstance(output, Tensor) else len(output)

        with ExitStack() as hooks:
            for index, block in enumerate(self.blocks):
                hooks.enter_context(block.register_forward_hook(partial(note, index)))
            yield

    @contextmanager
    def _around(self, indices: Iterable[int]) -> Iterator[None]:
        """Inside, these blocks give back the hidden states they get.

        They stay in their list: a model may count its blocks, or take each one's mask by its number.
        """
        before = {index: self.blocks[index].__dict__.get("forward") for index in indices}
        try:
            for index in before:
                passed = partial(_pass_through, self._returned.get(index))
                self.blocks[index].__dict__["forward"] = passed
            yield
        finally:
            for index, forward in before.items():
                self.blocks[index].__dict__.pop("forward", None)
                if forward is not None:
                    self.blocks[index].__dict__["forward"] = forward

    def _only(self, found: list[Tensor], inputs: Mapping[str, Any]) -> Tensor:
        where = f"{self.name}.{self.depth}"
        if len(found) != 1:
            raise ValueError(
                f"cache_frozen_prefix needs blocks that run once each; got {len(found)} calls of {where}; "
                "run without it"
            )
        expected = tuple(inputs["input_ids"].shape)
        if found[0].dim() != 3 or tuple(found[0].shape[:2]) != expected:
            raise ValueError(
                f"cache_frozen_prefix needs states of shape (batch, length, width); got {tuple(found[0].shape)} at "
                f"{where} for input_ids {expected}; run without it"
            )
        return found[0]

    def _check_frozen(self, states: Tensor) -> None:
        if not states.requires_grad:
            return
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        ones = torch.ones_like(states)
        gradients = torch.autograd.grad(states, list(trained.values()), ones, allow_unused=True)
        used = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is not None]
        if used:
            raise ValueError(
                f"cache_frozen_prefix needs everything before {self.name}.{self.depth} frozen; got {len(used)} trained "
                f"parameters there, first {used[0]!r}; adapt nothing but the top blocks and the head"
            )


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost `nn.ModuleList`s that the adapted modules lie in, by dotted name."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found: dict[str, nn.ModuleList] = {}
    for target in injection(model).targets:
        # Outer modules come before inner ones.
        outermost = next((name for name in lists if target.module.startswith(f"{name}.")), None)
        if outermost is not None:
            found[outermost] = lists[outermost]
    return found


def _stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The one list of blocks that the adapted modules lie in, and its dotted name."""
    found = block_lists(model)
    if len(found) != 1:
        raise ValueError(
            f"cache_frozen_prefix needs one list of blocks that holds the adapted modules; got {len(found)} in "
            f"{type(model).__name__} ({', '.join(found) or 'none'}); run without it"
        )
    return next(iter(found.items()))


def _depth(name: str, blocks: nn.ModuleList) -> int:
    """The number of the first block that has a trained parameter; at least 1."""
    trained = [[n for n, p in block.named_parameters() if p.requires_grad] for block in blocks]
    depth = next((depth for depth, names in enumerate(trained) if names), None)
    if depth is None:
        raise ValueError(
            f"cache_frozen_prefix needs a trained block; got none in {name}; train a LoRA factor there"
        )
    if depth == 0:
        raise ValueError(
            f"cache_frozen_prefix needs frozen blocks below the trained ones; got {name}.0.{trained[0][0]} trained, "
            f"in the first of {len(blocks)} blocks; adapt the top ones only, such as --lora_layers -2 -1, and "
            "not every bias"
        )
    return depth


def _check_layers_read(model: nn.Module, depth: int) -> None:
    """A head that reads the states of layers below the first trained block needs them to be run."""
    if isinstance(model, PooledClassifier) and model.layers[0] <= depth:
        raise ValueError(
            f"cache_frozen_prefix needs a head that reads trained layers alone; got pooling={model.pooling!r}, which "
            f"reads layer {model.layers[0]} of {model.layers[-1]}, where the first {depth} are frozen; "
            f"use pooling={MEAN!r}"
        )


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among the arguments of a block: the first one, or the one of that name."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"cache_frozen_prefix needs blocks that take hidden states; got {type(hidden).__name__}; run without it"
        )
    return hidden


def _tolerance(states: Tensor) -> float:
    """The relative difference that rounding explains: two thirds of the digits of the type computed in must agree.

    Call it inside the forward, where autocast is on.
    """
    kind = states.device.type
    resolutions = [torch.finfo(states.dtype).eps]
    if torch.is_autocast_enabled(kind):
        resolutions.append(torch.finfo(torch.get_autocast_dtype(kind)).eps)
    if kind == "cuda":
        resolutions.append(_TF32)
    return float(max(resolutions) ** (2 / 3))


def _pass_through(returned: int | None, *args: Any, **kwargs: Any) -> Any:
    """The forward of a block that does nothing; None for what it would return besides the hidden states."""
    hidden = _hidden(args, kwargs)
    return hidden if returned is None else (hidden, *(None for _ in range(returned - 1)))
