"""What was counted while the data was prepared: to print, to store and to warn with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import numpy as np

from hf_lora.data.files import BADLY_ENCODED, FALLBACK_ENCODING


@dataclasses.dataclass(frozen=True)
class DataReport:
    """Counts by the name of the split, and the warnings that follow from them.

    `truncated`: examples longer than the maximum length. `longest`: tokens of the longest example before it was cut,
    special tokens included. `empty_texts`: examples with a blank text. `badly_encoded`: documents that had to be read
    in another encoding. `label_counts`: examples by label, none for a regression.
    """

    examples: dict[str, int]
    truncated: dict[str, int]
    empty_texts: dict[str, int]
    longest: dict[str, int]
    badly_encoded: dict[str, int]
    label_counts: dict[str, dict[str, int]]
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        splits: Mapping[str, datasets.Dataset],
        text_columns: tuple[str, ...],
        lengths: Mapping[str, np.ndarray],
        max_length: int,
        label_counts: dict[str, dict[str, int]],
        warnings: tuple[str, ...],
    ) -> DataReport:
        """Count the texts of each split; `lengths` are in tokens, before they were cut to `max_length`."""
        report, found = cls({}, {}, {}, {}, {}, label_counts), [*warnings, *_leaks(splits, text_columns)]
        for split, dataset in splits.items():
            empty = sum(any(not text.strip() for text in row) for row in _rows(dataset, text_columns))
            bad = sum(dataset[BADLY_ENCODED]) if BADLY_ENCODED in dataset.column_names else 0
            report.examples[split] = len(dataset)
            report.truncated[split] = int((lengths[split] > max_length).sum())
            report.empty_texts[split] = empty
            report.longest[split] = int(lengths[split].max(initial=0))
            report.badly_encoded[split] = bad
            if empty:
                found.append(f"{split}: {empty:,} of {len(dataset):,} examples have an empty text")
            if bad:
                found.append(f"{split}: {bad:,} of {len(dataset):,} files were read as {FALLBACK_ENCODING}")
            counts = label_counts[split]
            absent = [name for name, count in counts.items() if not count]
            if split == "train" and absent:
                found.append(
                    f"train: {len(absent):,} of {len(counts):,} labels have no example: {absent[:5]}"
                )
        return dataclasses.replace(report, warnings=tuple(found))

    def as_dict(self) -> dict[str, Any]:
        """Return plain dictionaries and lists, ready for JSON."""
        return {**dataclasses.asdict(self), "warnings": list(self.warnings)}

    def __str__(self) -> str:
        lines = []
        for split, examples in self.examples.items():
            lines.append(
                f"{split}: {examples:,} examples, {self.truncated[split]:,} truncated, longest "
                f"{self.longest[split]:,} tokens, {self.empty_texts[split]:,} with an empty text, "
                f"{self.badly_encoded[split]:,} badly encoded"
            )
            if sizes := self.label_counts[split].values():
                lines.append(f"{split} labels: {len(sizes):,}, of {min(sizes):,} to {max(sizes):,} examples")
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def _leaks(splits: Mapping[str, datasets.Dataset], text_columns: tuple[str, ...]) -> Iterator[str]:
    """A warning for each split that repeats texts of the training split."""
    train = {hash(row) for row in _rows(splits["train"], text_columns)} if "train" in splits else set()
    for split, dataset in splits.items():
        count = sum(hash(row) in train for row in _rows(dataset, text_columns))
        if count and split != "train":
            yield f"{split}: {count:,} of {len(dataset):,} examples have a text that is also in train"


def _rows(dataset: datasets.Dataset, text_columns: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    return zip(*(dataset[column] for column in text_columns), strict=True)
