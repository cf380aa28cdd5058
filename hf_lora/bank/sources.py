"""Where a bank's adapters come from: directories, the Hub, or a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_lora.adapters.directory import adapter_info
from hf_lora.adapters.hub import adapter_directory
from hf_lora.bank.loading import BankLoader, Loaded
from hf_lora.bank.slots import Entry
from hf_lora.models.loading import check_labels
from hf_lora.serving.classifier import TextClassifier


def read_entry(
    loader: BankLoader,
    name: str,
    adapter: str | Path,
    *,
    labels: Sequence[str] | None = None,
    check_base: bool = True,
    token: str | None = None,
) -> tuple[Entry, Loaded]:
    """The adapter of a directory or Hub id, which is loaded again from there. Raises ValueError if it does not fit."""
    source, revision = split_revision(adapter)
    if labels is not None:
        check_labels(labels)
    options: dict[str, Any] = {
        "labels": None if labels is None else tuple(labels),
        "check_base": check_base,
    }
    place = adapter_directory(source, revision=revision, token=token)
    if Path(source).is_dir():
        # The same one from wherever the program works later.
        source = str(Path(source).absolute())
    else:
        # The commit that a branch is at now: it is the same when it is loaded again.
        revision = place.name

    def again() -> Loaded:
        directory = adapter_directory(source, revision=revision, token=token)
        found = loader.load(directory, token=token, **options)
        if found.digest != digest:
            raise ValueError(
                f"the adapter {name!r} has changed in {source!r} since it was added; got other files; expected the "
                "same; add it again with replace=True"
            )
        return found

    loaded = loader.load(place, token=token, **options)
    digest = loaded.digest
    return Entry(name, loaded.info, again, source, revision, options), loaded


def taken_entry(
    loader: BankLoader, name: str, adapter: TextClassifier | PreTrainedModel
) -> tuple[Entry, Loaded]:
    """The adapter of a model in memory, of which a copy is kept. Raises ValueError if it does not fit."""
    if isinstance(adapter, TextClassifier):
        loaded = loader.take(adapter.model, adapter.info, adapter.tokenizer)
    else:
        loaded = loader.take(adapter, adapter_info(adapter))
    kept = replace(loaded, model=None)
    return Entry(name, loaded.info, lambda: kept), loaded


def split_revision(adapter: str | Path) -> tuple[str, str | None]:
    """The directory or Hub id, and the revision behind an "@" if there is one."""
    text = str(adapter)
    if Path(text).exists() or "@" not in text:
        return text, None
    source, _, revision = text.rpartition("@")
    if Path(source).is_dir():
        raise ValueError(
            f"a directory has no revisions; got {text!r}; expected {source!r}, or a Hub id that no directory here has"
        )
    return source, revision
