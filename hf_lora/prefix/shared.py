"""Run the blocks below every adapter once for a text, whatever the number of adapters that it is for."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from hf_lora.prefix.encoder import hidden_states, pass_through

_BLOCK = re.compile(r"(.*?)\.(\d+)$")


@dataclass(frozen=True)
class _Run:
    """A forward that ends, or begins, behind `depth` blocks; `states` by number of the block that gives them."""

    depth: int
    states: dict[int, Tensor] = field(default_factory=dict)
    ends: bool = False


class _Current(threading.local):
    run: _Run | None = None


_CURRENT = _Current()


class SharedPrefix:
    """The blocks of an encoder, and which of them an adapter leaves as they are.

    encoder: its blocks lie in one `nn.ModuleList`. run: calls it once, with so many `sequences`.
    Threads may use it at the same time.
    Raises ValueError for an encoder without such a list, whose blocks run more than once, or whose states are not of
    shape `(sequences, tokens, width)`.
    """

    def __init__(self, encoder: nn.Module, run: Callable[[], Any], sequences: int) -> None:
        calls: list[str] = []
        # What each block returns: None for a tensor, else the length of a tuple that starts with it.
        returned: dict[str, int | None] = {}
        shapes: dict[str, tuple[int, ...]] = {}

        def note(name: str, _: nn.Module, inputs: Any, output: Any) -> None:
            returned[name] = None if isinstance(output, Tensor) else len(output)
            shapes[name] = tuple((output if isinstance(output, Tensor) else output[0]).shape)

        def begin(name: str, *_: Any) -> None:
            calls.append(name)

        hooks = []
        for name, module in encoder.named_modules():
            hooks.append(module.register_forward_pre_hook(partial(begin, name)))
            if _BLOCK.match(name):
                hooks.append(module.register_forward_hook(partial(note, name)))
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        self.name, self.blocks = _block_list(encoder, calls)
        wrong = [
            shape
            for n in range(len(self.blocks))
            if len(shape := shapes[f"{self.name}.{n}"]) != 3 or shape[0] != sequences
        ]
        if wrong:
            raise ValueError(f"a shared prefix needs states of {sequences} sequences; got {wrong[0]}")
        self._before = set(calls[: calls.index(f"{self.name}.0")])
        for index, block in enumerate(self.blocks):
            length = returned[f"{self.name}.{index}"]
            vars(block)["forward"] = partial(_block, index, length, block.forward)

    def depth(self, modules: Iterable[str]) -> int:
        """How many blocks run before the first of these modules, by their dotted names in the encoder."""
        depth = len(self.blocks)
        for name in modules:
            if name in self._before:
                return 0
            inside = name.removeprefix(f"{self.name}.")
            if inside != name:
                depth = min(depth, int(inside.partition(".")[0]))
        return depth

    @contextmanager
    def recording(self, depth: int) -> Iterator[Mapping[int, Tensor]]:
        """Inside, and in this thread, a forward ends behind `depth` blocks; gives their states by number."""
        with _running(_Run(depth, ends=True)) as run:
            yield run.states

    @contextmanager
    def replaying(
        self, depth: int, states: Mapping[int, Tensor], rows: Tensor, needed: Sequence[int] = ()
    ) -> Iterator[None]:
        """Inside, and in this thread, a forward begins behind `depth` blocks, with some rows of what they gave.

        states: of `recording`. rows: which of its texts each row is `(rows,)`. needed: blocks whose states are read
        besides those of the last one.
        """
        chosen = {
            index: states[index].index_select(0, rows) for index in {*needed, depth - 1} if index < depth
        }
        with _running(_Run(depth, chosen)):
            yield


@contextmanager
def _running(run: _Run) -> Iterator[_Run]:
    before, _CURRENT.run = _CURRENT.run, run
    try:
        yield run
    finally:
        _CURRENT.run = before


def _block(
    index: int, returned: int | None, forward: Callable[..., Any], *inputs: Any, **options: Any
) -> Any:
    """The forward of a block, or what stands in its place."""
    run = _CURRENT.run
    if run is None:
        return forward(*inputs, **options)
    if run.ends:
        if index >= run.depth:
            return pass_through(returned, *inputs, **options)
        output = forward(*inputs, **options)
        run.states[index] = output if isinstance(output, Tensor) else output[0]
        return output
    if index >= run.depth:
        return forward(*inputs, **options)
    states = run.states.get(index)
    if states is None:
        return pass_through(returned, *inputs, **options)
    given = hidden_states(inputs, options)
    if states.shape != given.shape:
        raise RuntimeError(
            f"the shared states do not fit; got {tuple(states.shape)} for {tuple(given.shape)}"
        )
    return states if returned is None else (states, *[None] * (returned - 1))


def _block_list(encoder: nn.Module, calls: Sequence[str]) -> tuple[str, nn.ModuleList]:
    """The one outermost list of blocks that are called once each, one after the other."""
    lists = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}
    called = {
        name: blocks for name, blocks in outer.items() if any(call.startswith(f"{name}.") for call in calls)
    }
    if len(called) == 1:
        [(name, blocks)] = called.items()
        order = [call for call in calls if (match := _BLOCK.match(call)) and match.group(1) == name]
        if order == [f"{name}.{index}" for index in range(len(blocks))]:
            return name, blocks
    raise ValueError(
        f"a shared prefix needs one list of blocks that run once each; got {', '.join(called) or 'none'} in "
        f"{type(encoder).__name__}"
    )
