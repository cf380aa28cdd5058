from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LABELS, randomize, tiny_tokenizer
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from hf_lora import LoRAConfig, TextClassifier, inference, load_classifier, save_adapter
from hf_lora.fingerprint import fingerprint
from hf_lora.inference import WINDOW

LONG = "the film was good and the meal was awful but we had fun " * 5
TEXTS = [
    "good",
    "the trip was broken and sad but the food we had there was lovely and warm",
    "",
    LONG,
    "words nobody knows",
    "a very bad day",
]
PAIRS = [("the film", "it was good and we had fun"), ("the meal was cold and rude", "bad"), ("a", "b")]


def peft_logits(base: Path, adapter: Path, texts: Sequence[Any], max_length: int = 32) -> Tensor:
    """The oracle: peft on plain transformers, one text (or pair) at a time, nothing of hf_lora."""
    config = json.loads((adapter / "hf_lora.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(config["labels"]))
    return plain_logits(PeftModel.from_pretrained(model, adapter).eval(), texts, max_length)


@torch.inference_mode()
def plain_logits(model: torch.nn.Module, texts: Sequence[Any], max_length: int = 32) -> Tensor:
    tokenizer = tiny_tokenizer()
    rows = []
    for text in texts:
        parts = [text] if isinstance(text, str) else text
        encoded = tokenizer(*parts, truncation=True, max_length=max_length, return_tensors="pt")
        rows.append(model(**encoded).logits[0])
    return torch.stack(rows)


def make_adapter(base: Path, directory: Path, labels: Sequence[str], **options: Any) -> Path:
    """An adapter with random A, B and a head large enough to give outputs of both signs."""
    torch.manual_seed(4)
    model, tokenizer = load_classifier(str(base), labels, LoRAConfig(rank=2), **options)
    randomize(model, 0.3)
    model.classifier.weight.data.normal_(generator=torch.Generator().manual_seed(6))
    return save_adapter(model, directory, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def classifier(adapter_dir: Path) -> TextClassifier:
    # What these tests compare with computes in fp32, whatever this machine is good at.
    return TextClassifier.from_pretrained(adapter_dir, precision="fp32")


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory, tiny_bert_dir: Path) -> Path:
    """The same architecture and tokenizer with other random weights."""
    directory = tmp_path_factory.mktemp("other_base")
    torch.manual_seed(99)
    AutoModel.from_config(AutoConfig.from_pretrained(tiny_bert_dir)).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_logits_are_those_of_peft_one_by_one(
    classifier: TextClassifier, tiny_bert_dir: Path, adapter_dir: Path
) -> None:
    expected = peft_logits(tiny_bert_dir, adapter_dir, TEXTS)
    for batch_size in (1, 4, 32):
        actual = classifier.logits(TEXTS, batch_size=batch_size)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    # Were the rows equal, their order could not be told.
    assert torch.pdist(expected).min() > 1e-3


def test_text_pairs_are_those_of_peft_one_by_one(
    classifier: TextClassifier, tiny_bert_dir: Path, adapter_dir: Path
) -> None:
    expected = peft_logits(tiny_bert_dir, adapter_dir, PAIRS)
    torch.testing.assert_close(classifier.logits(PAIRS), expected, rtol=0, atol=1e-5)
    results = classifier.predict(PAIRS)
    assert [result["text"] for result in results] == [list(pair) for pair in PAIRS]
    scores = [[result["scores"][label] for label in LABELS] for result in results]
    torch.testing.assert_close(torch.tensor(scores), expected.softmax(-1), rtol=0, atol=1e-5)


def test_predictions_are_softmax_in_the_order_of_the_input(
    classifier: TextClassifier, tiny_bert_dir: Path, adapter_dir: Path
) -> None:
    probabilities = peft_logits(tiny_bert_dir, adapter_dir, TEXTS).softmax(-1)
    results = classifier.predict(TEXTS, batch_size=2)
    assert [result["text"] for result in results] == TEXTS
    for result, row in zip(results, probabilities, strict=True):
        assert list(result) == ["text", "label", "score", "scores"]
        assert result["scores"] == pytest.approx(dict(zip(LABELS, row.tolist(), strict=True)), abs=1e-5)
        assert result["label"] == LABELS[int(row.argmax())]
        assert result["score"] == result["scores"][result["label"]]


def test_one_string_gives_one_result(classifier: TextClassifier) -> None:
    one = classifier.predict(TEXTS[1])
    assert isinstance(one, dict)
    [same] = classifier.predict([TEXTS[1]])
    assert one == same


def test_empty_list_gives_an_empty_list(classifier: TextClassifier) -> None:
    assert classifier.predict([]) == []
    assert classifier.logits([]).shape == (0, 2)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([5], ["not a text", "got 5", "a string or a pair"]),
        (["good", None], ["not a text", "got None"]),
        ([("a", "b", "c")], ["not a text", "('a', 'b', 'c')"]),
        ([("a", 1)], ["not a text", "('a', 1)"]),
        (["good", ("a", "b")], ["single texts and text pairs", "mixed"]),
        (5, ["not", "text", "5"]),
        (None, ["not", "text", "None"]),
    ],
)
def test_anything_but_texts_is_refused(classifier: TextClassifier, texts: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        classifier.predict(texts)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_below_one_is_refused(classifier: TextClassifier, batch_size: int) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        classifier.predict(TEXTS, batch_size=batch_size)


def test_stream_reads_one_window_ahead_at_most(
    classifier: TextClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert WINDOW == 2048
    monkeypatch.setattr(inference, "WINDOW", 4)
    read: list[str] = []

    def endless() -> Iterator[str]:
        while True:
            read.append(TEXTS[len(read) % len(TEXTS)])
            yield read[-1]

    stream = classifier.predict_stream(endless())
    assert read == []
    seen = []
    for count in range(1, 10):
        seen.append(next(stream)["text"])
        # Windows of 4: the first to fourth result need 4 texts, the fifth to eighth need 8, ...
        assert len(read) == 4 * ((count + 3) // 4)
    assert seen == read[:9]


def test_stream_equals_predict(classifier: TextClassifier, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = classifier.predict(TEXTS)
    monkeypatch.setattr(inference, "WINDOW", 4)
    parts = list(classifier.predict_stream(iter(TEXTS)))
    assert [result["text"] for result in parts] == TEXTS
    for one, other in zip(parts, whole, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-6)


def test_directory_alone_restores_everything(classifier: TextClassifier, tiny_bert_dir: Path) -> None:
    assert classifier.info.labels == LABELS
    assert classifier.info.max_length == 32
    assert classifier.info.text_columns == ("text",)
    assert classifier.info.base_model.name_or_path == str(tiny_bert_dir)
    assert classifier.model.config.id2label == dict(enumerate(LABELS))
    assert classifier.model.config.label2id == {"negative": 0, "positive": 1}
    assert classifier.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert not classifier.model.training


def test_multi_label_scores_are_sigmoids_and_labels_those_above_half(
    tiny_bert_dir: Path, tmp_path: Path
) -> None:
    labels = ("food", "travel", "mood", "other")
    kind = "multi_label_classification"
    directory = make_adapter(tiny_bert_dir, tmp_path / "multi", labels, problem_type=kind, max_length=32)
    expected = peft_logits(tiny_bert_dir, directory, TEXTS).sigmoid()
    assert (expected >= 0.5).any() and (expected < 0.5).any()
    for result, row in zip(
        TextClassifier.from_pretrained(directory, precision="fp32").predict(TEXTS),
        expected.tolist(),
        strict=True,
    ):
        assert result["scores"] == pytest.approx(dict(zip(labels, row, strict=True)), abs=1e-5)
        chosen = [label for label, score in zip(labels, row, strict=True) if score >= 0.5]
        assert result["label"] == chosen
        assert result["score"] == [result["scores"][label] for label in chosen]


def test_regression_score_is_the_output_itself(tiny_bert_dir: Path, tmp_path: Path) -> None:
    directory = make_adapter(
        tiny_bert_dir, tmp_path / "regression", ("stars",), problem_type="regression", max_length=32
    )
    expected = peft_logits(tiny_bert_dir, directory, TEXTS)[:, 0].tolist()
    results = TextClassifier.from_pretrained(directory, precision="fp32").predict(TEXTS)
    assert [result["label"] for result in results] == ["stars"] * len(TEXTS)
    assert [result["score"] for result in results] == pytest.approx(expected, abs=1e-5)
    assert [result["scores"] for result in results] == [{"stars": result["score"]} for result in results]


def test_without_max_length_texts_are_cut_where_the_positions_end(
    tiny_bert_dir: Path, tmp_path: Path
) -> None:
    directory = make_adapter(tiny_bert_dir, tmp_path / "adapter", LABELS)
    assert len(tiny_tokenizer()(LONG)["input_ids"]) > 64
    expected = peft_logits(tiny_bert_dir, directory, [LONG], max_length=64)
    actual = TextClassifier.from_pretrained(directory, precision="fp32").logits([LONG])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_bare_peft_directory_gets_numbered_labels(
    classifier: TextClassifier, adapter_dir: Path, tmp_path: Path
) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter_dir / name, tmp_path / name)
    bare = TextClassifier.from_pretrained(tmp_path, precision="fp32")
    assert bare.info.labels == ("LABEL_0", "LABEL_1")
    # The longest text is cut at another length: the bare directory does not know of 32.
    short = [text for text in TEXTS if text != LONG]
    torch.testing.assert_close(bare.logits(short), classifier.logits(short), rtol=0, atol=1e-6)


def test_base_may_be_in_another_place(
    classifier: TextClassifier, tiny_bert_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny_bert_dir, tmp_path / "moved")
    other = TextClassifier.from_pretrained(adapter_dir, base=str(moved), precision="fp32")
    torch.testing.assert_close(other.logits(TEXTS), classifier.logits(TEXTS), rtol=0, atol=0)


def test_other_weights_are_refused_with_both_fingerprints(adapter_dir: Path, other_base: Path) -> None:
    trained_on = json.loads((adapter_dir / "hf_lora.json").read_text())["base_model"]["fingerprint"]
    encoder = AutoModel.from_pretrained(other_base)
    given = fingerprint({f"bert.{name}": tensor for name, tensor in encoder.named_parameters()})
    with pytest.raises(ValueError, match="not the one the adapter") as error:
        TextClassifier.from_pretrained(adapter_dir, base=str(other_base))
    assert [words for words in (trained_on, given, "check_base=False") if words not in str(error.value)] == []
    assert trained_on != given


def test_check_base_false_takes_other_weights(adapter_dir: Path, other_base: Path) -> None:
    options = {"base": str(other_base), "check_base": False, "precision": "fp32"}
    classifier = TextClassifier.from_pretrained(adapter_dir, **options)
    expected = peft_logits(other_base, adapter_dir, TEXTS)
    torch.testing.assert_close(classifier.logits(TEXTS), expected, rtol=0, atol=1e-5)
