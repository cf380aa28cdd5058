"""Passes of a bank's encoder: texts for many adapters, as tokens, in batches of similar length, to logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor

from hf_lora.bank.loading import BankLoader
from hf_lora.bank.slots import Entry, Slots
from hf_lora.prefix.shared import SharedPrefix
from hf_lora.serving.encoding import CPU_TOKENS, TOKENS, Text, batches, encode, longest_text, to_tensors


@dataclass(frozen=True)
class _Row:
    """A text for an adapter: which text, and which of its adapters; unit: of its tokens."""

    text: int
    place: int
    entry: Entry
    unit: int
    longest: int


class Passes:
    """The logits of texts by the adapters that are asked about each."""

    def __init__(self, loader: BankLoader, slots: Slots) -> None:
        self.loader, self.slots = loader, slots

    @torch.inference_mode()
    def logits(
        self,
        texts: list[Text],
        asked: Sequence[Sequence[Entry]],
        batch_size: int | None,
        enabled: bool = True,
    ) -> list[list[Tensor]]:
        """The outputs of all adapters that are asked about each text."""
        tokens, rows = self._encoded(texts, asked)
        results: list[list[Tensor]] = [[torch.empty(0)] * len(entries) for entries in asked]
        memo: dict[Any, Any] = {}
        budget = CPU_TOKENS if self.loader.device.type == "cpu" else TOKENS
        for part in self._in_parts(rows):
            lengths = [len(tokens[row.unit]["input_ids"]) for row in part]
            for chosen in batches(lengths, batch_size, budget):
                for row, output in self._run([part[place] for place in chosen], tokens, enabled, memo):
                    results[row.text][row.place] = output
        return results

    def _encoded(
        self, texts: list[Text], asked: Sequence[Sequence[Entry]]
    ) -> tuple[list[dict[str, list[int]]], list[_Row]]:
        """The tokens of every text in every form that an adapter takes it in, and which row needs which of them."""
        loader = self.loader
        groups: dict[tuple[tuple[str, ...], int], dict[int, int]] = {}
        rows, units = list[_Row](), count()
        for index, entries in enumerate(asked):
            for place, entry in enumerate(entries):
                longest = longest_text(entry.info, loader.tokenizer, loader.config)
                group = groups.setdefault((entry.info.text_columns, longest), {})
                if index not in group:
                    group[index] = next(units)
                rows.append(_Row(index, place, entry, group[index], longest))
        tokens: list[dict[str, list[int]]] = [{} for _ in range(next(units))]
        for (columns, longest), members in groups.items():
            encoded = encode(loader.tokenizer, [texts[index] for index in members], columns, longest)
            for number, unit in enumerate(members.values()):
                tokens[unit] = {name: values[number] for name, values in encoded.items()}
        return tokens, rows

    def _in_parts(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        """The rows, as many adapters at a time as there is room for; those that are loaded first."""
        entries = dict.fromkeys(row.entry for row in rows)
        most = self.slots.capacity or max(1, len(entries))
        order = sorted(entries, key=lambda entry: entry.slot is None)
        for start in range(0, len(order), most):
            chosen = set(order[start : start + most])
            yield [row for row in rows if row.entry in chosen]

    def _run(
        self, rows: list[_Row], tokens: list[dict[str, list[int]]], enabled: bool, memo: dict[Any, Any]
    ) -> Iterator[tuple[_Row, Tensor]]:
        """One batch. memo: of the batch before."""
        loader = self.loader
        with self.slots.batch({row.entry for row in rows}) as taken:
            rows = sorted(rows, key=lambda row: (row.entry.info.pooling, taken[row.entry]))
            units = {unit: place for place, unit in enumerate(sorted({row.unit for row in rows}))}
            chosen = [tokens[unit] for unit in units]
            columns = {name: [unit[name] for unit in chosen] for name in chosen[0]}
            longest = max(row.longest for row in rows)
            tensors = to_tensors(loader.tokenizer, columns, longest, loader.config.pad_token_id)
            texts = {name: tensor.to(loader.device) for name, tensor in tensors.items()}
            which = torch.tensor([units[row.unit] for row in rows], device=loader.device)
            slots, inputs = [taken[row.entry] for row in rows], {name: t[which] for name, t in texts.items()}
            depth = min(row.entry.depth for row in rows)
            begun: AbstractContextManager[None] = nullcontext()
            if depth and 2 * len(units) <= len(rows) and loader.model.alike(slots):
                key = tuple(units), depth, rows[0].entry.info.pooling, texts["input_ids"].shape
                shared = self._shared(key, texts, depth, slots[0], memo)
                below = [layer - 1 for layer in loader.model.read_below(slots)]
                begun = cast(SharedPrefix, loader.prefix).replaying(depth, shared, which, below)
            with begun:
                groups = loader.model(inputs, slots, enabled=enabled)
                outputs = [(part, logits.float().cpu()) for part, logits in groups]
        for part, logits in outputs:
            for row, output in zip(rows[part], logits, strict=True):
                yield row, output[: len(row.entry.info.labels)]

    def _shared(
        self, key: Any, texts: Mapping[str, Tensor], depth: int, slot: int, memo: dict[Any, Any]
    ) -> Mapping[int, Tensor]:
        """The states of texts behind the blocks that no adapter of the batch changes, or those of the batch before."""
        if key not in memo:
            memo.clear()
            with cast(SharedPrefix, self.loader.prefix).recording(depth) as states:
                self.loader.model.pretrained(texts, slot)
            memo[key] = states
        return cast(Mapping[int, Tensor], memo[key])


def answers_of(
    asked: Sequence[Sequence[Entry]], rows: Sequence[Sequence[Tensor]]
) -> list[dict[str, dict[str, Any]]]:
    """For each text the answers by name of the adapters that were asked; rows: their outputs."""
    outputs: dict[Entry, dict[int, Tensor]] = {}
    for index, entries in enumerate(asked):
        for entry, output in zip(entries, rows[index], strict=True):
            outputs.setdefault(entry, {})[index] = output
    answers: list[dict[str, dict[str, Any]]] = [{} for _ in asked]
    for entry, given in outputs.items():
        info = entry.info
        found = info.task.predictions(torch.stack(list(given.values())), info.labels, info.calibration)
        for index, answer in zip(given, found, strict=True):
            answers[index][entry.name] = answer
    return answers
