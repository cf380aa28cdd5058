"""Many classifiers on one encoder: each text goes to the adapters that are asked for, all of them in one batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lora._choices import unknown
from hf_lora.adapters.directory import save_adapter
from hf_lora.adapters.hub import adapter_directory
from hf_lora.adapters.info import AdapterInfo
from hf_lora.bank.finetuned import FinetunedReport, classifier_of, expected_of, extracted, report_of
from hf_lora.bank.loading import BankLoader
from hf_lora.bank.names import ALL, Names, names_of, names_of_each
from hf_lora.bank.passes import Passes, answers_of
from hf_lora.bank.saved import SavedBank
from hf_lora.bank.slots import Entry, Slots, check_capacity
from hf_lora.bank.sources import read_entry, split_revision, taken_entry
from hf_lora.serving.classifier import TextClassifier
from hf_lora.serving.encoding import WINDOW, Text, several, shown
from hf_lora.serving.loading import describe


class AdapterBank:
    """Classifiers that share one encoder, in memory once, and one tokenizer; each has labels and a head of its own.

    Adapters may be added and removed by one thread while others predict: an answer is always that of a whole adapter.
    capacity: how many adapters are loaded at a time; the least recently used one makes room, and is loaded again from
    where it came when it is asked for. None: all of them.
    """

    def __init__(self, loader: BankLoader, capacity: int | None = None) -> None:
        self._loader, self._slots = loader, Slots(loader, capacity)
        self._passes = Passes(loader, self._slots)
        self._entries: dict[str, Entry] = {}

    @classmethod
    def from_pretrained(
        cls,
        adapters: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
        *,
        base: str | None = None,
        check_base: bool = True,
        device: str | torch.device | None = None,
        precision: str | None = "auto",
        capacity: int | None = None,
        token: str | None = None,
    ) -> AdapterBank:
        """A bank of adapter directories and Hub ids, such as "me/mood" or "me/mood@v2"; or of a mapping from names.

        One path is that of a file that `save` wrote, with its base and capacity, but for what is given here.
        Without names an adapter is called like the last part of its path. The first one says what the base model and
        the tokenizer are. base, check_base, device, precision, token: as of `TextClassifier.from_pretrained`.
        Raises ValueError for an adapter of another base or tokenizer, and for anything that does not fit.
        """
        check_capacity(capacity)
        saved = SavedBank.of(adapters)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        source, revision = split_revision(saved.adapters[0].place)
        directory = adapter_directory(source, revision=revision, token=token)
        first = describe(directory, base=base or saved.base, token=token)
        if saved.base and not base:
            first = replace(first, hub={**first.hub, "revision": saved.revision})
        bank = cls(BankLoader(first, device, precision), saved.capacity if capacity is None else capacity)
        for adapter in saved.adapters:
            check = check_base and adapter.check_base
            bank.add(adapter.place, adapter.name, labels=adapter.labels, check_base=check, token=token)
        return bank

    def save(self, path: str | Path) -> Path:
        """Write a file that `from_pretrained` takes; returns its path. It lists the base, and the adapters in order.

        Directories under the file's folder are named as seen from there, others from the root. An adapter of the Hub
        has the commit that it was loaded at. The file lists capacity, too, and labels that were given.
        Raises ValueError for adapters that were in memory: write them with `save_adapter`, and add the directories.
        """
        with self._slots.changed:
            entries = list(self._entries.values())
        folder = Path(path).absolute().parent
        return SavedBank.of_entries(entries, self._loader, self._slots.capacity, folder).write(Path(path))

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """What is known of each adapter, by name, in the order in which they came."""
        with self._slots.changed:
            return {name: entry.info for name, entry in self._entries.items()}

    @property
    def loaded(self) -> list[str]:
        """The names of the adapters that are in memory now."""
        with self._slots.changed:
            return [name for name, entry in self._entries.items() if entry.slot is not None]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of all adapters."""
        return self._loader.tokenizer

    @property
    def setting(self) -> str:
        """How the bank runs, in one line for people."""
        precision = self._loader.precision or "precision: as the model was loaded"
        count = len(self._entries)
        return f"{precision}; {count} adapter{'s' * (count != 1)} on one encoder"

    def add(
        self,
        adapter: str | Path | TextClassifier | PreTrainedModel,
        name: str | None = None,
        *,
        labels: Sequence[str] | None = None,
        check_base: bool = True,
        token: str | None = None,
        replace: bool = False,
    ) -> str:
        """Add an adapter: a directory, a Hub id with or without "@revision", or a model in memory; returns its name.

        name: default: the last part of the path. labels: names for an adapter of peft that has none.
        replace: an adapter of that name is taken out; calls that have it end with it.
        Raises ValueError, and leaves the bank as it was, for an adapter that does not fit.
        """
        with self._slots.loading:
            name = self._free_name(adapter, name, replace)
            if isinstance(adapter, str | Path):
                options: dict[str, Any] = {"labels": labels, "check_base": check_base, "token": token}
                entry, loaded = read_entry(self._loader, name, adapter, **options)
            elif labels is not None:
                raise ValueError(f"a model in memory has labels; got labels={list(labels)}; expected none")
            else:
                entry, loaded = taken_entry(self._loader, name, adapter)
            self._slots.fill(entry, loaded)
            with self._slots.changed:
                before = self._entries.get(name)
                self._entries[name] = entry
            if before is not None:
                self._slots.remove(before)
        return name

    def add_finetuned(
        self,
        checkpoint: str | Path,
        name: str | None = None,
        *,
        energy: float = 0.95,
        rank: int | None = None,
        projections: str | None = None,
        texts: Sequence[Text] = (),
        labels: Sequence[Any] | None = None,
        output_dir: str | Path | None = None,
        token: str | None = None,
        replace: bool = False,
    ) -> FinetunedReport:
        """Add a full fine-tuned classifier of the base: what it changed becomes an adapter; returns what that costs.

        checkpoint: a directory, or a Hub id with or without "@revision". energy: the share of the squared singular
        values that each module keeps; rank: the highest rank, in its place. projections: letters of qkvo; None: all
        linear layers. texts: answered by the checkpoint and by the bank, and compared; labels: the right ones.
        output_dir: the adapter is written there and added from there, so that `save` can name it.
        Raises ValueError, and leaves the bank as it was, for a checkpoint that does not fit.
        """
        name = self._free_name(checkpoint, name, replace)
        budget: dict[str, Any] = {"rank": rank, "energy": energy if rank is None else None}
        found = extracted(self._loader, checkpoint, token=token, projections=projections, **budget)
        expected = expected_of(found, self._loader, several(texts), labels)
        if output_dir is None:
            self.add(classifier_of(found, self._loader), name, replace=replace)
        else:
            directory = save_adapter(found.model, output_dir, tokenizer=found.tokenizer)
            self.add(directory, name, replace=replace)
        return report_of(found, name, expected, self.logits(texts, name))

    def remove(self, name: str) -> None:
        """Take an adapter out; calls that have it end with it. Raises ValueError for an unknown name."""
        with self._slots.loading, self._slots.changed:
            self._slots.remove(self._entry(name))
            del self._entries[name]

    def predict(
        self,
        texts: Text | Sequence[Text],
        adapter: Names | Sequence[Names],
        *,
        batch_size: int | None = None,
    ) -> Any:
        """The answers of adapters to texts, in order; all texts share the passes of the encoder.

        adapter: a name for all texts, or one for each; "*" for all adapters, or a list of names for each text, or for
        the only one. A tuple of strings is one text, a pair.
        An answer is that of `TextClassifier.predict` with "adapter", the name, besides. Of several adapters it is
        `{"text", "answers"}`, with the answers by name.
        Raises ValueError for a name that the bank does not have, before anything is computed.
        """
        one = isinstance(texts, str | Mapping | tuple)
        listed = [cast(Text, texts)] if one else list(several(texts))
        asked = [names_of(adapter)] if one else names_of_each(adapter, len(listed))
        known = self._known([adapter] if isinstance(adapter, str) else asked)
        entries = known * len(listed) if isinstance(adapter, str) else known
        answers = list(self._answers(zip(listed, asked, entries, strict=True), known, batch_size))
        return answers[0] if one else answers

    def predict_stream(
        self, texts: Iterable[Text], adapter: Names, *, batch_size: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """As `predict` for any number of texts, holding 2,048 answers at a time.

        adapter: a name, a list of names or "*": those of every text. They are the ones that the bank has now.
        """
        asked = names_of(adapter)
        known = self._known([asked])
        return self._answers(((text, asked, known[0]) for text in several(texts)), known, batch_size)

    def logits(
        self,
        texts: Sequence[Text],
        adapter: str | Sequence[str],
        *,
        batch_size: int | None = None,
        enabled: bool = True,
    ) -> list[Tensor]:
        """The outputs of each text's adapter, each `(labels,)`, fp32 on the CPU, not calibrated.

        adapter: a name for all texts, or one for each. enabled: False for the encoder without the updates.
        """
        listed = list(several(texts))
        asked = names_of_each(adapter, len(listed))
        if wrong := [names for names in asked if not isinstance(names, str) or names == ALL]:
            raise ValueError(f"logits are of one adapter for a text; got {wrong[0]!r}; expected a name")
        entries, results = self._known(asked), list[Tensor]()
        with self._slots.call({entry for [entry] in entries}):
            for start in range(0, len(listed), WINDOW):
                part = slice(start, start + WINDOW)
                rows = self._passes.logits(listed[part], entries[part], batch_size, enabled)
                results += [row for [row] in rows]
        return results

    def _answers(
        self,
        asked: Iterator[tuple[Text, Names, list[Entry]]],
        known: Sequence[list[Entry]],
        batch_size: int | None,
    ) -> Iterator[dict[str, Any]]:
        """The answers to texts, so many at a time that about 2,048 are given. known: all adapters that are asked."""
        most = max(map(len, known), default=1)
        with self._slots.call({entry for entries in known for entry in entries}):
            while window := list(islice(asked, max(1, WINDOW // most))):
                texts, names, entries = zip(*window, strict=True)
                answers = answers_of(entries, self._passes.logits(list(texts), entries, batch_size))
                for text, name, own, answer in zip(texts, names, entries, answers, strict=True):
                    told = {"text": shown(text, own[0].info.text_columns)}
                    if isinstance(name, str) and name != ALL:
                        yield {**told, "adapter": name, **answer[name]}
                    else:
                        yield {**told, "answers": {entry.name: answer[entry.name] for entry in own}}

    def _known(self, asked: Sequence[Names]) -> list[list[Entry]]:
        """The adapters by their names, of one moment. Raises ValueError for one that is not there."""
        with self._slots.changed:
            everything = list(self._entries.values())
            if asked and not everything:
                raise ValueError(f"the bank has no adapters; got {asked[0]!r}; expected one that was added")
            return [
                everything
                if names == ALL
                else [self._entry(name) for name in ([names] if isinstance(names, str) else names)]
                for names in asked
            ]

    def _free_name(self, adapter: object, name: str | None, replace: bool) -> str:
        if isinstance(adapter, str | Path) and name is None:
            name = Path(split_revision(adapter)[0]).name
        if not isinstance(name, str) or not name or name == ALL:
            raise ValueError(
                f"an adapter needs a name; got {name!r}; expected a word, but for {ALL!r}; one from memory is given "
                "it: bank.add(model, name)"
            )
        if name in self._entries and not replace:
            raise ValueError(
                f"the bank has an adapter of that name; got {name!r}; expected another name, or replace=True"
            )
        return name

    def _entry(self, name: str) -> Entry:
        if not isinstance(name, str) or name not in self._entries:
            raise unknown("adapter", name, self._entries)
        return self._entries[name]
