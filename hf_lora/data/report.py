"""What was counted while the data was prepared: a report to print, to store and to warn with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from hf_lora.data.files import FALLBACK_ENCODING


@dataclass(frozen=True)
class SplitCounts:
    """The facts of one split; lengths are in tokens, special tokens included, before truncation."""

    examples: int
    truncated: int
    empty_texts: int
    longest: int
    badly_encoded: int
    labels: dict[str, int]


@dataclass(frozen=True)
class DataReport:
    """Counted facts by split name, and the warnings that follow from them.

    `truncated` examples are longer than the maximum length, `longest` is the length in tokens of the longest
    example, `empty_texts` counts examples with a text that is null or blank, `badly_encoded` documents that
    had to be read in another encoding, and `label_counts` examples by label (none for a regression).
    """

    examples: dict[str, int]
    truncated: dict[str, int]
    empty_texts: dict[str, int]
    longest: dict[str, int]
    badly_encoded: dict[str, int]
    label_counts: dict[str, dict[str, int]]
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_counts(cls, counts: dict[str, SplitCounts], warnings: tuple[str, ...]) -> DataReport:
        """Transpose the counts of each split, and add the warnings that they call for."""
        by_fact = {
            field.name: {split: getattr(count, field.name) for split, count in counts.items()}
            for field in dataclasses.fields(SplitCounts)
        }
        label_counts = by_fact.pop("labels")
        return cls(**by_fact, label_counts=label_counts, warnings=(*warnings, *_count_warnings(counts)))

    def as_dict(self) -> dict[str, Any]:
        """Return plain dictionaries and lists, ready for JSON."""
        return {**dataclasses.asdict(self), "warnings": list(self.warnings)}

    def __str__(self) -> str:
        return "\n".join([*self._split_lines(), *(f"warning: {warning}" for warning in self.warnings)])

    def _split_lines(self) -> Iterator[str]:
        for split, examples in self.examples.items():
            yield (
                f"{split}: {examples:,} examples, {self.truncated[split]:,} truncated, longest "
                f"{self.longest[split]:,} tokens, {self.empty_texts[split]:,} with an empty text, "
                f"{self.badly_encoded[split]:,} badly encoded"
            )
            if sizes := self.label_counts[split].values():
                yield f"{split} labels: {len(sizes):,}, of {min(sizes):,} to {max(sizes):,} examples"


def count_empty(texts: datasets.Dataset, text_columns: tuple[str, ...]) -> int:
    """Return how many rows have a blank text in any of the columns."""
    return sum(any(not text.strip() for text in row) for row in _rows(texts, text_columns))


def leakage_warnings(texts: datasets.DatasetDict, text_columns: tuple[str, ...]) -> tuple[str, ...]:
    """Return a warning for each other split that repeats texts of the training split."""
    if "train" not in texts:
        return ()
    train = {hash(row) for row in _rows(texts["train"], text_columns)}
    repeated = {
        split: sum(hash(row) in train for row in _rows(dataset, text_columns))
        for split, dataset in texts.items()
        if split != "train"
    }
    return tuple(
        f"{split}: {count:,} of {len(texts[split]):,} examples have a text that is also in train"
        for split, count in repeated.items()
        if count
    )


def length_counts(lengths: np.ndarray, max_length: int) -> tuple[int, int]:
    """Return how many of the lengths exceed `max_length`, and the greatest length."""
    return int((lengths > max_length).sum()), int(lengths.max(initial=0))


def _rows(texts: datasets.Dataset, text_columns: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    return zip(*(texts[column] for column in text_columns), strict=True)


def _count_warnings(counts: dict[str, SplitCounts]) -> Iterator[str]:
    for split, count in counts.items():
        of_all = f"of {count.examples:,}"
        absent = [name for name, examples in count.labels.items() if not examples]
        if count.empty_texts:
            yield f"{split}: {count.empty_texts:,} {of_all} examples have an empty text"
        if count.badly_encoded:
            yield f"{split}: {count.badly_encoded:,} {of_all} files were read as {FALLBACK_ENCODING}"
        if split == "train" and absent:
            yield f"train: {len(absent):,} of {len(count.labels):,} labels have no example: {absent[:5]}"
