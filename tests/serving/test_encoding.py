"""Texts as a classifier takes them: tokens, padding, batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_serving import PAIRS, TEXTS
from torch import Tensor

from hf_lora import TextClassifier
from hf_lora.serving.encoding import encode, rounded, to_tensors


@pytest.fixture
def classifier(adapter_dir: Path) -> TextClassifier:
    return TextClassifier.from_pretrained(adapter_dir, precision="fp32")


@pytest.fixture
def of_pairs(classifier: TextClassifier) -> TextClassifier:
    """The same classifier as one of pairs."""
    info = replace(classifier.info, text_columns=("premise", "hypothesis"))
    return TextClassifier(classifier.model, classifier.tokenizer, info)


def padded(classifier: TextClassifier, encoded: dict[str, Any]) -> Mapping[str, Tensor]:
    return to_tensors(classifier.tokenizer, encoded, 32, classifier.model.config.pad_token_id)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("texts", [TEXTS, PAIRS])
def test_padding_is_the_tokenizers_with_the_length_rounded_up(
    side: str,
    texts: Sequence[Any],
    classifier: TextClassifier,
    of_pairs: TextClassifier,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    classifier = of_pairs if texts is PAIRS else classifier
    monkeypatch.setattr(classifier.tokenizer, "padding_side", side)
    encoded = encode(classifier.tokenizer, texts, classifier.info.text_columns, 32)
    expected = classifier.tokenizer.pad(encoded, padding="max_length", max_length=32, return_tensors="pt")
    actual = padded(classifier, encoded)
    assert actual.keys() == expected.keys()
    columns = actual["input_ids"].shape[1]
    longest = max(len(ids) for ids in encoded["input_ids"])
    assert longest <= columns == min(rounded(longest), 32)
    for name, tensor in expected.items():
        kept = tensor[:, :columns] if side == "right" else tensor[:, 32 - columns :]
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], kept), name


def test_a_model_that_is_not_told_what_is_padding_gets_no_more_than_it_needs(
    classifier: TextClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = {"input_ids": [list(range(17))]}
    assert padded(classifier, encoded)["input_ids"].shape == (1, 17)
    masked = {**encoded, "attention_mask": [[1] * 17]}
    assert padded(classifier, masked)["input_ids"].shape == (1, 18)
    monkeypatch.setattr(classifier.model.config, "pad_token_id", None)
    assert padded(classifier, masked)["input_ids"].shape == (1, 17)


def test_lengths_are_rounded_to_few_sizes_at_little_cost() -> None:
    lengths = range(1, 513)
    sizes = [rounded(length) for length in lengths]
    assert all(a >= b for a, b in zip(sizes, lengths, strict=True))
    assert max(a / b for a, b in zip(sizes, lengths, strict=True)) < 1.125
    assert len(set(sizes)) <= 15 + 8 * 5 + 1
