"""A bank as a file: its base model, and where each adapter comes from."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_lora._files import MAX_JSON_BYTES, check_types, parse_object, read_bytes, write_text
from hf_lora._text import shortened
from hf_lora.bank.loading import BankLoader
from hf_lora.bank.names import named
from hf_lora.bank.slots import Entry
from hf_lora.bank.sources import split_revision
from hf_lora.models._transformers_private import commit_of

FORMAT_VERSION = 1
# The types of the keys of each object.
_ADAPTER: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "source", "revision"), (str,)),
    **{"labels": (list,), "check_base": (bool,)},
}
_BASE: dict[str, tuple[type, ...]] = {"name_or_path": (str,), "revision": (str,)}
_BANK: dict[str, tuple[type, ...]] = {"capacity": (int,)}


@dataclass(frozen=True)
class SavedAdapter:
    """Where an adapter comes from: a directory, or a Hub id with a revision.

    labels: names that were given for an adapter of peft. check_base: as of `AdapterBank.add`.
    """

    name: str
    source: str
    revision: str | None = None
    labels: tuple[str, ...] | None = None
    check_base: bool = True

    @property
    def place(self) -> str:
        """What `AdapterBank.add` takes."""
        return self.source if self.revision is None else f"{self.source}@{self.revision}"


@dataclass(frozen=True)
class SavedBank:
    """What a bank is made of. base, revision: its base model; None: that of the first adapter."""

    adapters: tuple[SavedAdapter, ...]
    base: str | None = None
    revision: str | None = None
    capacity: int | None = None

    @classmethod
    def of(cls, adapters: str | Path | Iterable[str | Path] | Mapping[str, str | Path]) -> SavedBank:
        """A saved file, adapters by their names, or adapters that are called like the last part of their paths.

        Raises ValueError if there are none, and for two of one name.
        """
        if isinstance(adapters, str | Path):
            return cls.read(Path(adapters))
        if not isinstance(adapters, Iterable):
            raise ValueError(
                f"no adapters; got {adapters!r}; expected a list, a mapping from names, or a saved file"
            )
        found = adapters if isinstance(adapters, Mapping) else dict[Any, Any]()
        places = list(found.values() if found else adapters)
        if wrong := [place for place in places if not isinstance(place, str | Path)]:
            raise ValueError(
                f"not an adapter; got {shortened(wrong[0])}; expected a directory or Hub id; a model in memory joins "
                "with bank.add(model, name)"
            )
        found = found or named(map(str, places))
        if not found:
            raise ValueError("a bank needs an adapter; got none; expected directories or Hub ids")
        return cls(tuple(SavedAdapter(name, *split_revision(place)) for name, place in found.items()))

    @classmethod
    def of_entries(
        cls, entries: Sequence[Entry], loader: BankLoader, capacity: int | None, folder: Path
    ) -> SavedBank:
        """The bank with these adapters. folder: directories in it are named as seen from there, others from the root.

        Raises ValueError if there are none, and for adapters that were in memory.
        """
        memory = [entry.name for entry in entries if entry.source is None]
        if memory or not entries:
            raise ValueError(
                f"the bank cannot be saved; got {f'adapters from memory, {shortened(memory)}' if memory else 'none'}; "
                "expected adapters of directories or the Hub; write one with save_adapter, and add the directory"
            )
        adapters = tuple(
            SavedAdapter(entry.name, _seen_from(folder, entry), entry.revision, **entry.options)
            for entry in entries
        )
        revision = commit_of(loader.config) or loader.hub.get("revision")
        return cls(adapters, str(loader.base), revision, capacity)

    def write(self, path: Path) -> Path:
        """Write the file; it appears whole. Returns its path."""
        values = {
            "adapters": [asdict(adapter) for adapter in self.adapters],
            "base_model": {"name_or_path": self.base, "revision": self.revision},
            "capacity": self.capacity,
            "format_version": FORMAT_VERSION,
        }
        write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> SavedBank:
        """Read a file. Raises ValueError, in one line, for anything that `write` does not write."""
        if not path.is_file():
            kind = "a directory" if path.is_dir() else "no file"
            raise ValueError(
                f"no saved bank; got {str(path)!r}, which is {kind}; expected a file that AdapterBank.save wrote, or a "
                "list of adapters"
            )
        source = str(path)
        values = parse_object(read_bytes(path.parent, path.name, limit=MAX_JSON_BYTES), source)
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{source} has another format version; got {version!r}; expected {FORMAT_VERSION}; upgrade hf_lora to "
                "read it"
            )
        _check(values, _BANK, source, also=("adapters", "base_model", "format_version"))
        base: Any = values.get("base_model")
        adapters = values.get("adapters")
        _check(base, _BASE, f"base_model in {source}", required=("name_or_path",))
        if not isinstance(adapters, list) or not adapters:
            raise ValueError(
                f"{source} cannot be read; got adapters={shortened(adapters)}; expected a list of some"
            )
        for number, adapter in enumerate(adapters):
            _check(adapter, _ADAPTER, f"adapter {number} in {source}", required=("name", "source"))
        folder = path.absolute().parent
        found = tuple(_adapter(folder, adapter) for adapter in adapters)
        return cls(found, base["name_or_path"], base.get("revision"), values.get("capacity"))


def _check(
    values: Any,
    kinds: Mapping[str, tuple[type, ...]],
    source: str,
    *,
    also: Collection[str] = (),
    required: Iterable[str] = (),
) -> None:
    """Raise ValueError, naming `source`, unless a JSON value is an object with these keys, of these types.

    also: keys that are checked elsewhere. required: keys that must be there and not null.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{source} cannot be read; got {shortened(values)}; expected an object")
    if unknown := sorted(values.keys() - kinds.keys() - set(also)):
        raise ValueError(f"{source} has unknown keys; got {shortened(unknown)}")
    check_types(values, kinds, source)
    for name in required:
        if values.get(name) in (None, ""):
            raise ValueError(f"{source} cannot be read; got no {name}; expected one")


def _adapter(folder: Path, values: Mapping[str, Any]) -> SavedAdapter:
    """An adapter of a file in a folder."""
    given = {name: value for name, value in values.items() if value is not None}
    if "revision" not in given:
        given["source"] = str(folder / given["source"])
    if "labels" in given:
        given["labels"] = tuple(given["labels"])
    return SavedAdapter(**given)


def _seen_from(folder: Path, entry: Entry) -> str:
    """Where an adapter is."""
    if entry.revision is not None:
        return str(entry.source)
    directory = Path(os.path.abspath(str(entry.source)))
    return (
        directory.relative_to(folder).as_posix() if directory.is_relative_to(folder) else directory.as_posix()
    )
