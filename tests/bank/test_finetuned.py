"""A full fine-tuned checkpoint in a bank gives its own answers, as far as its rank allows; the report says how far."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tokenizer
from helpers_serving import TEXTS, make_adapter, plain_logits
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from hf_lora import AdapterBank, TextClassifier
from hf_lora.adapters.directory import TENSORS

LABELS = ["low", "middle", "high"]
Make = Callable[..., Path]


@pytest.fixture
def make(tiny_bert_dir: Path, tmp_path: Path) -> Make:
    """Writes a fine-tuned checkpoint of the tiny BERT: all parameters moved, those of the embeddings if told so."""

    def make(name: str, *, embeddings: bool = False, tokenizer: bool = True, **config: Any) -> Path:
        torch.manual_seed(5)
        config = {"id2label": dict(enumerate(LABELS)), **config}
        model = AutoModelForSequenceClassification.from_pretrained(tiny_bert_dir, **config)
        for key, parameter in model.named_parameters():
            if embeddings or "_embeddings." not in key:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        model.save_pretrained(tmp_path / name)
        if tokenizer:
            tiny_tokenizer().save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def bank(tiny_bert_dir: Path, tmp_path: Path) -> AdapterBank:
    first = make_adapter(tiny_bert_dir, tmp_path / "first", ["a", "b"], max_length=32)
    return AdapterBank.from_pretrained([first], precision="fp32")


def logits_of(bank: AdapterBank, name: str) -> Tensor:
    return torch.stack(bank.logits(TEXTS, name))


def own_logits(checkpoint: Path) -> Tensor:
    """The oracle: plain transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    return plain_logits(model, TEXTS, 64)


@pytest.mark.parametrize("tokenizer", [True, False])
def test_with_all_energy_it_gives_the_answers_of_the_checkpoint(
    bank: AdapterBank, make: Make, tokenizer: bool
) -> None:
    checkpoint = make("tuned", tokenizer=tokenizer)
    expected, before = own_logits(checkpoint), logits_of(bank, "first")
    right = [LABELS[index] for index in expected.argmax(1).tolist()]
    wrong = next(label for label in LABELS if label != right[0])
    report = bank.add_finetuned(checkpoint, energy=1.0, texts=TEXTS, labels=[wrong, *right[1:]])
    assert_close(logits_of(bank, "tuned"), expected, atol=1e-4, rtol=1e-4)
    assert (report.name, report.texts, report.same_labels) == ("tuned", len(TEXTS), len(TEXTS))
    assert report.accuracy == report.checkpoint_accuracy == pytest.approx(1 - 1 / len(TEXTS))
    assert report.largest_difference is not None and report.largest_difference < 1e-4
    assert report.kept_energy == pytest.approx(1.0) and not report.left_out
    # A random change of each of the linear layers, all of their ranks.
    assert set(report.ranks.values()) == {32} and len(report.ranks) == 2 * 6 + 1
    assert bank.predict("good", "tuned")["label"] == right[0]
    assert torch.equal(logits_of(bank, "first"), before)


def test_the_report_says_what_a_low_rank_costs(
    bank: AdapterBank, make: Make, tiny_bert_dir: Path, tmp_path: Path
) -> None:
    checkpoint = make("tuned", embeddings=True)
    labels = ["high", "low", "low", "middle", "high", "middle"]
    options: dict[str, Any] = {"texts": TEXTS, "labels": labels, "projections": "qv"}
    report = bank.add_finetuned(checkpoint, "low", rank=2, output_dir=tmp_path / "written", **options)
    ours, theirs = logits_of(bank, "low"), own_logits(checkpoint)
    written = TextClassifier.from_pretrained(tmp_path / "written", precision="fp32")
    assert_close(ours, written.logits(TEXTS), atol=1e-5, rtol=1e-5)
    assert list(report.ranks) == [
        f"bert.encoder.layer.{block}.attention.self.{role}" for block in (0, 1) for role in ("query", "value")
    ]
    assert set(report.ranks.values()) == {2}
    assert 0 < report.kept_energy < 0.5
    assert {
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.0.output.dense.weight",
    } <= set(report.left_out)
    moved = AutoModelForSequenceClassification.from_pretrained(checkpoint).get_parameter(
        name := "bert.embeddings.word_embeddings.weight"
    )
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert_dir).get_parameter(name)
    assert report.left_out[name] == pytest.approx(((moved - base).norm() / base.norm()).item(), rel=1e-5)
    size = (tmp_path / "written" / TENSORS).stat().st_size
    assert size - 20_000 < report.bytes < size
    gaps = (ours.softmax(1) - theirs.softmax(1)).abs()
    assert report.largest_difference == pytest.approx(gaps.max().item(), abs=1e-5)
    assert report.largest_difference > 0.01
    assert report.same_labels == (ours.argmax(1) == theirs.argmax(1)).sum().item()
    ids = torch.tensor([LABELS.index(label) for label in labels])
    assert report.accuracy == pytest.approx((ours.argmax(1) == ids).float().mean().item())
    assert report.checkpoint_accuracy == pytest.approx((theirs.argmax(1) == ids).float().mean().item())


@pytest.mark.slow
def test_several_labels_and_numbers(bank: AdapterBank, make: Make) -> None:
    many = make("many", problem_type="multi_label_classification")
    given = (own_logits(many) > 0).tolist()
    labels = [[name for name, on in zip(LABELS, row, strict=True) if on] for row in given]
    labels[0] = [name for name in LABELS if name not in labels[0]]
    report = bank.add_finetuned(many, energy=1.0, texts=TEXTS, labels=labels)
    assert report.same_labels == len(TEXTS)
    assert report.accuracy == report.checkpoint_accuracy == pytest.approx(1 - 1 / len(TEXTS))
    found = bank.predict(TEXTS, "many")
    assert [answer["label"] for answer in found[1:]] == labels[1:]

    number = make("number", num_labels=1, id2label={0: "stars"}, problem_type="regression")
    report = bank.add_finetuned(number, rank=1, texts=TEXTS)
    assert report.same_labels is None and report.accuracy is None
    gap = (logits_of(bank, "number") - own_logits(number)).abs().max().item()
    assert report.largest_difference == pytest.approx(gap, rel=1e-4) and gap > 1e-3
    with pytest.raises(ValueError, match="a regression has no accuracy"):
        bank.add_finetuned(number, "again", texts=TEXTS, labels=[1.0] * len(TEXTS))


@pytest.mark.slow
def test_a_bank_in_bf16_extracts_against_the_base_in_fp32(
    make: Make, tiny_bert_dir: Path, tmp_path: Path
) -> None:
    first = make_adapter(tiny_bert_dir, tmp_path / "first", ["a", "b"], max_length=32)
    rounded, exact = (AdapterBank.from_pretrained([first], precision=kind) for kind in ("bf16", "fp32"))
    checkpoint = make("tuned")
    reports = [
        bank.add_finetuned(checkpoint, energy=0.8, texts=TEXTS, output_dir=folder)
        for bank, folder in ((rounded, tmp_path / "a"), (exact, tmp_path / "b"))
    ]
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()
    assert reports[0].ranks == reports[1].ranks and reports[0].bytes == reports[1].bytes
    alone = TextClassifier.from_pretrained(tmp_path / "a", precision="bf16", merge=False)
    assert_close(logits_of(rounded, "tuned"), alone.logits(TEXTS), atol=0.05, rtol=0.05)
    assert rounded.add_finetuned(checkpoint, "memory", energy=0.8).texts == 0
    assert_close(logits_of(rounded, "memory"), logits_of(rounded, "tuned"), atol=0, rtol=0)


def test_one_that_is_written_can_be_saved_with_the_bank(
    bank: AdapterBank, make: Make, tmp_path: Path
) -> None:
    bank.add_finetuned(make("tuned"), output_dir=tmp_path / "adapter")
    again = AdapterBank.from_pretrained(bank.save(tmp_path / "bank.json"), precision="fp32")
    for name in ("first", "tuned"):
        assert torch.equal(logits_of(again, name), logits_of(bank, name))
    bank.add_finetuned(make("tuned"), rank=1, replace=True)
    with pytest.raises(ValueError, match=r"adapters from memory, \['tuned'\]"):
        bank.save(tmp_path / "bank.json")


def test_what_does_not_fit_is_refused_and_the_bank_stays(
    bank: AdapterBank, make: Make, tiny_bert_dir: Path, tmp_path: Path
) -> None:
    good, wide = make("good"), make("wide", intermediate_size=48, ignore_mismatched_sizes=True)
    other = make("other")
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(other)
    cases: dict[str, dict[str, Any]] = {
        "an adapter of that name; got 'first'": {"checkpoint": tmp_path / "nowhere" / "first"},
        "an adapter needs a name; got '\\*'": {"checkpoint": good, "name": "*"},
        "not one of this base": {"checkpoint": wide},
        "no fine-tuned classifier": {"checkpoint": tiny_bert_dir},
        "which is an adapter; expected its base": {"checkpoint": tmp_path / "first", "name": "x"},
        "no such base model": {"checkpoint": tmp_path / "nowhere"},
        "a directory has no revisions": {"checkpoint": f"{good}@v1"},
        "another tokenizer than the bank": {"checkpoint": other},
        "energy is not a share": {"checkpoint": good, "energy": 2.0},
        "rank is not usable": {"checkpoint": good, "rank": 0},
        "projections": {"checkpoint": good, "projections": "qx"},
        "a label for each text; got 1 labels for 2": {
            "checkpoint": good,
            "texts": ["a", "b"],
            "labels": ["low"],
        },
        "a label for each text; got 1 labels for 0": {"checkpoint": good, "labels": ["low"]},
        "'lou'": {"checkpoint": good, "texts": ["a"], "labels": ["lou"]},
        "not a text; got 3": {"checkpoint": good, "texts": [3]},
        "not texts; got 'a text'": {"checkpoint": good, "texts": "a text"},
    }
    before = logits_of(bank, "first")
    for message, options in cases.items():
        with pytest.raises((ValueError, OSError), match=message) as error:
            bank.add_finetuned(**options)
        assert "\n" not in str(error.value)
    assert list(bank.adapters) == ["first"]
    assert torch.equal(logits_of(bank, "first"), before)
