"""The adapters that people name in words: paths and Hub ids, with names in front of them, or a folder of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hf_lora._text import shortened
from hf_lora.adapters.directory import CONFIG, TENSORS
from hf_lora.bank.sources import split_revision

# A path or a Hub id, perhaps with a revision and a name: it has a slash, and neither spaces nor most marks of a text.
_PLACE = re.compile(r"[\w.@=~+-]*(/[\w.@=~+-]*)+")


ALL = "*"
Names = str | Sequence[str]
"""The name of an adapter, "*" for all of them, or several names."""


def names_of(adapter: Any) -> Names:
    """The adapters of one text, checked. Raises ValueError for anything but a name, "*" or a list of names."""
    if isinstance(adapter, str):
        return adapter
    names = adapter.tolist() if hasattr(adapter, "tolist") else adapter
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"not the name of an adapter; got {shortened(adapter)}; expected a name, {ALL!r} for all of them, or a "
            "list of names"
        )
    if not names or ALL in names:
        got = f"{ALL!r} in a list" if names else "an empty list"
        raise ValueError(
            f"no adapters are named; got {got}; expected names, or {ALL!r} by itself for all of them"
        )
    return list(names)


def names_of_each(adapter: Any, count: int) -> list[Names]:
    """The adapters of each of so many texts: one name for all, or a list with an entry for each."""
    if isinstance(adapter, str):
        return [adapter] * count
    entries = adapter.tolist() if hasattr(adapter, "tolist") else adapter
    if not isinstance(entries, list | tuple):
        return [names_of(adapter)]
    if len(entries) != count:
        raise ValueError(
            f"expected a name for each text; got {len(entries)} names for {count} texts; for several adapters on every "
            "text pass a list of names for each"
        )
    return [names_of(entry) for entry in entries]


def split_name(word: str) -> tuple[str, str]:
    """The two parts of NAME=ADAPTER. The name is empty where there is none."""
    name, _, place = word.partition("=")
    return (name, place) if name and place and "/" not in name and not os.path.isdir(word) else ("", word)


def may_be_adapter(word: str) -> bool:
    """Whether a word is an adapter directory, or looks like a path or a Hub id."""
    _, place = split_name(word)
    return os.path.isfile(os.path.join(place, CONFIG)) or _PLACE.fullmatch(word) is not None


def named(words: Iterable[str]) -> dict[str, str]:
    """Directories and Hub ids by the names in front of them, or else by the last parts of their paths.

    Raises ValueError for two of one name.
    """
    found: dict[str, str] = {}
    for word in words:
        name, place = split_name(word)
        name = name or os.path.basename(os.path.abspath(split_revision(place)[0]))
        if name in found:
            raise ValueError(
                f"two adapters have the name {name!r}; got {found[name]!r} and {place!r}; expected another name for "
                f"one of them, such as {name}_2={place}"
            )
        found[name] = place
    return found


def adapters_in(folder: str | Path) -> dict[str, Path]:
    """The adapter directories directly in a folder, by their names and in their order.

    Raises ValueError if there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no such folder; got {str(folder)!r}; expected one with adapter directories in it")
    # What is hidden was not written to its end.
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    found = {path.name: path for path in inside if any((path / name).is_file() for name in (CONFIG, TENSORS))}
    if not found:
        own = f"; {str(folder)!r} is an adapter itself" if (folder / CONFIG).is_file() else ""
        names = shortened([path.name for path in inside])
        raise ValueError(
            f"no adapter in {str(folder)!r}; got {names}; expected directories with {CONFIG}{own}"
        )
    return found
