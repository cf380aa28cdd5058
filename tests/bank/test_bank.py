"""Every answer of a bank is that of the adapter's own classifier, whatever stands beside it in a batch."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import without_pooler
from helpers_serving import TEXTS

from hf_lora import AdapterBank, LoRAConfig, TextClassifier, load_classifier, save_adapter

# Options of LoRA, the number of labels, and what else `load_classifier` is given.
CASES: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "plain": ({}, 3, {}),
    "rank_3": ({"rank": 3}, 5, {}),
    "lora_fa": ({"variant": "lora_fa"}, 4, {}),
    "rslora": ({"scaling": "rslora"}, 3, {}),
    "dora": ({"variant": "dora"}, 2, {}),
    "dora_biases": ({"variant": "dora", "bias": "all"}, 3, {"pooling": "mean"}),
    "biases_of_layers": ({"bias": "lora_only"}, 2, {}),
    "all_biases": ({"bias": "all"}, 3, {}),
    "pissa": ({"init": "pissa"}, 2, {}),
    "olora": ({"init": "olora"}, 2, {}),
    "ranks": ({"rank_pattern": {"query": 5}, "alpha_pattern": {"value": 1}}, 2, {}),
    "parametrized": ({"form": "parametrization"}, 3, {}),
    "all_linear": ({"target_modules": "all-linear"}, 3, {}),
    "last_block": ({"layers": (-1,), "projections": "qv"}, 3, {}),
    "mean": ({}, 6, {"pooling": "mean"}),
    "cls": ({}, 2, {"pooling": "cls"}),
    "mean_layers": ({}, 3, {"pooling": "mean_layers"}),
    "multi_label": ({}, 3, {"problem_type": "multi_label_classification"}),
    "regression": ({}, 2, {"problem_type": "regression"}),
    "short": ({}, 3, {"max_length": 5}),
}


def make(base: str, directory: Path, name: str, seed: int = 0, **also: Any) -> Path:
    """An adapter of a case, all of whose trained parameters are far from where they started."""
    lora, count, options = CASES[name]
    torch.manual_seed(seed)
    labels = [f"{name} {number}" for number in range(count)]
    model, tokenizer = load_classifier(
        base, labels, LoRAConfig(**{"rank": 2, **lora}), **{"max_length": 32, **options, **also}
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return save_adapter(model, directory, tokenizer=tokenizer)


@pytest.fixture(scope="module", params=["with pooler", "without pooler"])
def adapters(
    request: pytest.FixtureRequest, tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One adapter of each case, of a base with a pretrained pooler or without one."""
    folder = tmp_path_factory.mktemp("bank")
    base = (
        str(tiny_bert_dir)
        if request.param == "with pooler"
        else without_pooler(tiny_bert_dir, folder / "base")
    )
    return {name: make(base, folder / name, name, seed) for seed, name in enumerate(CASES)}


@pytest.fixture(scope="module")
def bank(adapters: Mapping[str, Path]) -> AdapterBank:
    return AdapterBank.from_pretrained(adapters, precision="fp32")


@pytest.fixture(scope="module")
def alone(adapters: Mapping[str, Path]) -> dict[str, TextClassifier]:
    return {name: TextClassifier.from_pretrained(path, precision="fp32") for name, path in adapters.items()}


def shuffled(names: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Every text for every adapter, in any order."""
    pairs = [(text, name) for name in names for text in TEXTS]
    random.Random(0).shuffle(pairs)
    texts, asked = zip(*pairs, strict=True)
    return list(texts), list(asked)


def test_mixed_batches_give_what_each_adapter_gives_alone(
    bank: AdapterBank, alone: dict[str, TextClassifier]
) -> None:
    texts, names = shuffled(alone)
    for batch_size in (None, 7):
        for text, name, got in zip(
            texts, names, bank.logits(texts, names, batch_size=batch_size), strict=True
        ):
            expected = alone[name].logits([text])[0]
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_batches_of_one_adapter_give_what_it_gives_alone(
    bank: AdapterBank, alone: dict[str, TextClassifier]
) -> None:
    for name, classifier in alone.items():
        got = torch.stack(bank.logits(TEXTS * 40, name, batch_size=64))
        torch.testing.assert_close(got, classifier.logits(TEXTS * 40), atol=1e-5, rtol=1e-5)
