"""Files, data sets and a tokenizer of a few words for the tests of the data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

import hf_lora.data.splits
from hf_lora.data import DataConfig

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij"]
FOUR_ROWS = "text,label\na b,x\nc d,y\ne f,x\ng h,y\n"


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> str:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def labelled(*labels: Any, **columns: Any) -> list[dict[str, Any]]:
    return [{"text": f"a {index}", "label": label, **columns} for index, label in enumerate(labels)]


def words(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def column(dataset: datasets.Dataset, name: str) -> list[Any]:
    return dataset[name][:]


def hub(monkeypatch: pytest.MonkeyPatch, **splits: datasets.Dataset) -> DataConfig:
    """Stand in for the Hub: a dataset with these splits."""
    monkeypatch.setattr(
        hf_lora.data.splits.datasets, "load_dataset", lambda *args, **kwargs: datasets.DatasetDict(splits)
    )
    return DataConfig(dataset_name="someone/something")


def class_labels(names: Sequence[str], ids: Sequence[int], tag: str = "a") -> datasets.Dataset:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))}
    )
    texts = [f"{tag} {index}" for index in range(len(ids))]
    return datasets.Dataset.from_dict({"text": texts, "label": list(ids)}, features=features)
