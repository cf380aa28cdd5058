"""Three adapters trained on real texts, in one pass of one encoder: topics of news, the tone of tweets, 150 intents."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from data_sets import bbc_folder

from hf_lora import AdapterBank, TextClassifier, finetune
from hf_lora.data import DataConfig, prepare_data
from hf_lora.models.loading import load_tokenizer

pytestmark = pytest.mark.slow
# Of what is added in other orders, in logits of up to twenty.
TOLERANCE = 2e-4
# A few examples of each class are enough for accuracies far from those of chance.
SETTINGS: dict[str, dict[str, Any]] = {
    "news": {"max_train_samples": 128, "max_seq_length": 48, "pooling": "native"},
    "tweets": {"max_train_samples": 160, "max_seq_length": 32, "pooling": "mean"},
    "clinc150": {"max_train_samples": 450, "max_seq_length": 16, "pooling": "mean"},
}
Rows = list[dict[str, str]]


def some(path: Path, count: int) -> Rows:
    """Some rows from all over a file."""
    with path.open(newline="", encoding="utf-8") as stream:
        rows = [{"text": row["text"], "label": row["label"]} for row in csv.DictReader(stream)]
    return rows[:: len(rows) // count][:count]


@pytest.fixture(scope="module")
def data(minilm: str, data_dir: Path) -> dict[str, tuple[Any, Rows]]:
    """Of each task the training texts, and others that no training has seen."""
    config = DataConfig(train_file=str(bbc_folder()), validation_fraction=0.2)
    prepared = prepare_data(config, load_tokenizer(minilm))
    news: dict[str, Rows] = {}
    for split in ("train", "validation"):
        texts, numbers = prepared.texts[split][prepared.text_columns[0]], prepared.splits[split]["labels"][:]
        pairs = zip(texts, numbers, strict=True)
        news[split] = [{"text": text, "label": prepared.labels[number]} for text, number in pairs]
    assert len(news["validation"]) == 445
    files = {name: data_dir / name for name in ("tweets", "clinc150")}
    others = {name: (str(path / "train.csv"), some(path / "test.csv", 200)) for name, path in files.items()}
    return {"news": (news["train"], news["validation"]), **others}


@pytest.fixture(scope="module")
def adapters(
    minilm: str, data: dict[str, tuple[Any, Rows]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    for name, settings in SETTINGS.items():
        train, test = data[name]
        settings = {**settings, "num_train_epochs": 1, "eval_strategy": "no"}
        finetune(minilm, train, test=test, output_dir=folder / name, **settings)
    return {name: folder / name for name in SETTINGS}


def test_one_mixed_pass_gives_the_labels_of_three_classifiers_and_the_accuracies_they_state(
    adapters: dict[str, Path], data: dict[str, tuple[Any, Rows]]
) -> None:
    bank = AdapterBank.from_pretrained(adapters, precision="fp32", device="cpu")
    asked = [(name, place) for name, (_, test) in data.items() for place in range(len(test))]
    random.Random(0).shuffle(asked)
    texts, names = [data[name][1][place]["text"] for name, place in asked], [name for name, _ in asked]
    answers = dict(zip(asked, bank.predict(texts, names), strict=True))
    logits = dict(zip(asked, bank.logits(texts, names), strict=True))
    for name, (_, test) in data.items():
        alone = TextClassifier.from_pretrained(adapters[name], precision="fp32", device="cpu")
        own, places = [row["text"] for row in test], range(len(test))
        got = [answers[name, place]["label"] for place in places]
        assert got == [answer["label"] for answer in alone.predict(own)]
        together = torch.stack([logits[name, place] for place in places])
        torch.testing.assert_close(together, alone.logits(own), atol=TOLERANCE, rtol=TOLERANCE)
        right = sum(label == row["label"] for label, row in zip(got, test, strict=True))
        stated = bank.adapters[name].metrics["test_accuracy"]
        assert right / len(test) == pytest.approx(stated, abs=1e-6), name
        # Far more than the commonest class has.
        assert stated > {"news": 0.8, "tweets": 0.75, "clinc150": 0.5}[name]
