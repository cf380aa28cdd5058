"""The examples of every kind of data set that Trainer takes: in memory or streamed, with a transform or without."""

from __future__ import annotations

from collections.abc import Callable, Sized
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset


def is_stream(dataset: Any) -> bool:
    """Whether a data set can only be read from its beginning."""
    return not isinstance(dataset, Sized) or isinstance(dataset, IterableDataset | datasets.IterableDataset)


def some_of(dataset: Any, most: int, seed: int = 0) -> Any:
    """A data set with at most `most` of the examples, in their order: drawn, or of a stream the first ones."""
    if is_stream(dataset):
        return list(islice(dataset, most))
    if len(dataset) <= most:
        return dataset
    rows = np.sort(np.random.default_rng(seed).choice(len(dataset), most, replace=False))
    return dataset.select(rows) if isinstance(dataset, datasets.Dataset) else Subset(dataset, rows.tolist())


def label_column(dataset: Any) -> Any:
    """The labels of all examples where a data set has them as a column "labels"; otherwise None."""
    # A transform that runs at reading may change what the column holds.
    plain = isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
    return dataset["labels"] if plain and "labels" in dataset.column_names else None


def labels_of(dataset: Any, collate: Callable[[list[Any]], Any] | None) -> Any:
    """The labels of all examples of a training set. Raises ValueError for a stream and for examples without."""
    if dataset is None or is_stream(dataset):
        raise ValueError(
            f"class_weights='balanced' needs a data set of known size; got {type(dataset).__name__}; give numbers"
        )
    column = label_column(dataset)
    if column is not None or collate is None:
        return column
    batches = DataLoader(dataset, batch_size=256, collate_fn=collate)
    found = [batch["labels"].cpu() for batch in batches if "labels" in batch]
    if not found:
        raise ValueError(
            "class_weights='balanced' needs labels; got none; expected a column 'labels' or 'label'"
        )
    return torch.cat(found).tolist()
