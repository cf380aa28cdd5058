"""Choices: a table of named entries, and a dataclass field that is an option with its help."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import MISSING, field, fields
from typing import Any, ClassVar, Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


def nearest(
    name: object, known: Iterable[object], *, prefix: str = "", meant: Mapping[str, str] | None = None
) -> str:
    """What an error says at its end of a name that is nearly right: "; did you mean 'x'?", or nothing.

    The first word of a known name, up to an underscore, is near it too. prefix: what is said before the name, such as
    dashes. meant: known names by what other tools call them.
    """
    names = [str(entry) for entry in known]
    spelled = {entry.partition("_")[0].casefold(): entry for entry in reversed(names)}
    spelled |= {entry.casefold(): entry for entry in names} | dict(meant or {})
    spelled.pop("", None)
    close = difflib.get_close_matches(str(name)[:200].casefold(), spelled, n=1)
    return f"; did you mean {prefix + spelled[close[0]]!r}?" if close else ""


def unknown(what: str, got: object, known: Iterable[object]) -> ValueError:
    """The error of a name that is none of the known ones."""
    names = [str(name) for name in known]
    expected = f"expected one of {', '.join(names)}{nearest(got, names)}"
    return ValueError(f"unknown {what}; got {repr(got)[:80]}; {expected}")


class Keywords:
    """What a dataclass inherits for a ValueError that names the nearest field, where a keyword is none."""

    MEANT: ClassVar[Mapping[str, str]] = {}

    def __new__(cls, *args: Any, **values: Any) -> Any:
        known = [entry.name for entry in fields(cls)]  # type: ignore[arg-type]
        for name in values:
            if name not in known:
                expected = f"expected some of {', '.join(known)}{nearest(name, known, meant=cls.MEANT)}"
                raise ValueError(f"unknown keyword of {cls.__name__}; got {repr(name)[:80]}; {expected}")
        return super().__new__(cls)


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
        raise unknown(self.what, key, self._entries)

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
