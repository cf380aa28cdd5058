"""Choices: a table of named entries, and a dataclass field that is an option with its help."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterator
from copy import copy
from dataclasses import MISSING, field
from typing import Any, Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Registry(Generic[K, V]):
    """Entries under unique keys; an unknown key is an error that lists the known ones.

    `what` is the noun the errors use, such as "architecture".
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[K, V] = {}

    def register(self, key: K, entry: V, *, replace: bool = False) -> V:
        """Add `entry` under `key`. Raises ValueError if the key is taken and `replace` is not set."""
        if key in self._entries and not replace:
            raise ValueError(f"{self.what} {key!r} is registered already; pass replace=True to replace it")
        self._entries[key] = entry
        return entry

    def get(self, key: K) -> V:
        """The entry of `key`. Raises ValueError that names the known keys and the closest of them."""
        # What cannot be a key, such as a list out of a file, is unknown too.
        if isinstance(key, Hashable) and key in self._entries:
            return self._entries[key]
        names = [str(name) for name in self._entries]
        close = difflib.get_close_matches(str(key), names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"unknown {self.what}; got {repr(key)[:80]}; expected one of {', '.join(names)}{hint}"
        )

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[K]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def items(self) -> list[tuple[K, V]]:
        """The entries in the order of their registration."""
        return list(self._entries.items())


def option(default: Any = MISSING, *, help: str, flag: str | None = None, **more: Any) -> Any:
    """A dataclass field that is an option of a run: default and help stand here, and nowhere else.

    flag: its name on the command line; None: the field's name after its topic's prefix; "": it has none.
    more: further metadata, as HfArgumentParser takes it. A default that is a dict or list is copied for each instance.
    """
    metadata = {"help": help, "flag": flag, **more}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)
