"""Which adapter each sequence of a batch has: what stacked layers read in a forward."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Sequences in groups, one after the other, each with the slot of its adapter.

    slots, sizes: of the groups. index: the slot of each sequence `(sequences,)`, on the device of the model.
    enabled: whether the encoder has the updates; without them it is the pretrained one, and the heads stay.
    """

    slots: tuple[int, ...]
    sizes: tuple[int, ...]
    index: Tensor
    enabled: bool = True

    @classmethod
    def of(cls, slots: Sequence[int], device: torch.device | str = "cpu", *, enabled: bool = True) -> Batch:
        """The batch of sequences with these slots. Raises ValueError unless equal ones stand side by side."""
        groups = [(slot, len(list(group))) for slot, group in groupby(slots)]
        distinct, sizes = zip(*groups, strict=True)
        if len(set(distinct)) != len(distinct):
            raise ValueError(f"sequences of one adapter are not side by side; got the slots {list(slots)}")
        return cls(distinct, sizes, torch.tensor(list(slots), device=device), enabled)

    def __len__(self) -> int:
        return len(self.index)

    def groups(self) -> Iterator[tuple[int, slice]]:
        """The slot and the sequences of each group."""
        start = 0
        for slot, size in zip(self.slots, self.sizes, strict=True):
            yield slot, slice(start, start + size)
            start += size


class _Current(threading.local):
    batch: Batch | None = None


_CURRENT = _Current()


@contextmanager
def running(batch: Batch) -> Iterator[None]:
    """Inside, and in this thread alone, stacked layers compute for `batch`."""
    before, _CURRENT.batch = _CURRENT.batch, batch
    try:
        yield
    finally:
        _CURRENT.batch = before


def current() -> Batch:
    """The batch of this thread. Raises RuntimeError where there is none: no sequence runs without its adapter."""
    if _CURRENT.batch is None:
        raise RuntimeError(
            "a model with stacked adapters was called outside of a batch; predict with the bank"
        )
    return _CURRENT.batch
