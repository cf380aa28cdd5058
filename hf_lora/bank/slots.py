"""Which adapter is in which slot of a bank's model: taken for a batch, filled, emptied; the oldest one makes room."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, cast

import psutil
import torch

from hf_lora.adapters.info import AdapterInfo
from hf_lora.bank.loading import BankLoader, Loaded

# The slots of a bank without a capacity at first; they are doubled.
_FIRST = 16


@dataclass(eq=False)
class Entry:
    """An adapter of a bank. source: its directory or Hub id; None: it was in memory.

    revision: of a Hub id, the commit. options: the labels and check_base that it was added with.
    load: gives what is put into a slot. depth: as of `Loaded`. slot: None: in none now. used: when it was used last.
    calls: how many have it now; once it is `removed`, its slot is emptied after the last one.
    """

    name: str
    info: AdapterInfo
    load: Callable[[], Loaded]
    source: str | None = None
    revision: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    depth: int = 0
    slot: int | None = None
    used: int = 0
    calls: int = 0
    removed: bool = False


def check_capacity(capacity: object) -> None:
    """Raise ValueError for anything but a whole number above 0, or None."""
    if capacity is not None and (type(capacity) is not int or capacity < 1):
        raise ValueError(f"capacity is not usable; got {capacity!r}; expected at least 1 adapter")


class Slots:
    """The slots of a bank's model. One changes only while no batch runs with it; other batches go on meanwhile.

    capacity: how many adapters are in slots at a time; None: all of them. Raises ValueError for less than one.
    `loading` is held by whoever changes slots, and `changed` for a moment where their state is read or written.
    """

    def __init__(self, loader: BankLoader, capacity: int | None) -> None:
        check_capacity(capacity)
        self.capacity = capacity
        self._loader, self._model = loader, loader.model
        # By slot: the adapter in it, and how many batches run with it.
        self._entries: dict[int, Entry] = {}
        self._running: dict[int, int] = {}
        # Slots whose adapters have gone, and are still there.
        self._left: list[int] = []
        self._clock = count(1)
        self.loading = threading.RLock()
        self.changed = threading.Condition()

    @contextmanager
    def call(self, entries: Collection[Entry]) -> Iterator[None]:
        """Inside, these adapters can be used, even where they are removed meanwhile."""
        with self.changed:
            for entry in entries:
                entry.calls += 1
        try:
            yield
        finally:
            with self.changed:
                for entry in entries:
                    entry.calls -= 1
                    self._empty(entry)

    @contextmanager
    def batch(self, entries: Collection[Entry]) -> Iterator[dict[Entry, int]]:
        """Inside, these adapters are in slots and stay there; at most `capacity` of them."""
        taken = list[Entry]()
        try:
            if self._take(entries):
                taken += entries
            else:
                # Who waits for the batches of others holds no slot itself.
                with self.loading:
                    for entry in entries:
                        if not self._take([entry]):
                            self.fill(entry, entry.load())
                            self._take([entry])
                        taken.append(entry)
            yield {entry: cast(int, entry.slot) for entry in entries}
        finally:
            with self.changed:
                for entry in taken:
                    self._running[cast(int, entry.slot)] -= 1
                self.changed.notify_all()

    @torch.inference_mode(False)
    def fill(self, entry: Entry, loaded: Loaded) -> None:
        """Put an adapter into a free slot. Raises ValueError, with all others as they were, if it does not fit."""
        with self.loading:
            slot = self._free(loaded)
            try:
                self._model.put(slot, loaded.info.pooling, loaded.contents)
                self._loader.verify(loaded, slot)
            except BaseException:
                self._model.remove(slot)
                raise
            self._make_room()
            with self.changed:
                entry.info, entry.depth = loaded.info, loaded.depth
                entry.slot, entry.used = slot, next(self._clock)
                self._entries[slot] = entry

    @torch.inference_mode(False)
    def remove(self, entry: Entry) -> None:
        """Empty the slot of an adapter when the calls that have it have ended."""
        with self.loading:
            with self.changed:
                entry.removed = True
                self._empty(entry)
            self._clear()

    def _take(self, entries: Collection[Entry]) -> bool:
        """Count a batch that runs with adapters, if all of them are in slots."""
        with self.changed:
            if any(entry.slot is None for entry in entries):
                return False
            for entry in entries:
                slot = cast(int, entry.slot)
                self._running[slot] = self._running.get(slot, 0) + 1
                entry.used = next(self._clock)
            return True

    def _empty(self, entry: Entry) -> None:
        if entry.removed and not entry.calls and entry.slot is not None:
            self._leave(entry)

    def _leave(self, entry: Entry) -> None:
        slot, entry.slot = cast(int, entry.slot), None
        del self._entries[slot]
        self._left.append(slot)

    def _clear(self) -> None:
        """Empty the slots whose adapters have gone."""
        while self._left:
            self._model.remove(self._left.pop())

    def _free(self, loaded: Loaded) -> int:
        """A slot without an adapter. There is one more than the capacity, so that none makes room for a failure."""
        with self.changed:
            self._clear()
            there = self._model.slots - 1
            wanted = there if len(self._entries) < there else max(_FIRST, 2 * there)
            wanted = wanted if self.capacity is None else self.capacity + 1
            self._check_memory(wanted, loaded)
            self._model.reserve(wanted)
            return next(slot for slot in range(1, wanted + 1) if slot not in self._entries)

    def _make_room(self) -> None:
        """Take out the adapter that was used longest ago, of those that no batch runs with, if there are enough."""
        with self.changed:
            while self.capacity is not None and len(self._entries) >= self.capacity:
                idle = [entry for slot, entry in self._entries.items() if not self._running.get(slot)]
                if idle:
                    self._leave(min(idle, key=lambda entry: entry.used))
                else:
                    self.changed.wait()
        self._clear()

    def _check_memory(self, slots: int, loaded: Loaded) -> None:
        """Raise ValueError if the stacks would not fit into memory, before they are made."""
        needed, device = self._model.bytes_of(slots, loaded.contents), self._loader.device
        more = needed - self._model.bytes_of(self._model.slots - 1)
        free = (
            torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        )
        if more > free:
            raise ValueError(
                f"{slots:,} adapters of rank {max(self._model.rank, loaded.contents.rank)} do not fit into memory; got "
                f"{needed / 1e9:,.1f} GB for them, and {free / 1e9:,.1f} GB free; expected a lower capacity"
            )
