"""Adapters that peft wrote join a bank, with labels or without, and give what peft gives; others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tokenizer
from helpers_serving import TEXTS, make_adapter, plain_logits
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from hf_lora import AdapterBank, TextClassifier
from hf_lora.adapters.info import FILE

# Options of peft, and the number of labels. The base has a trained head for three.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "lora": ({}, 2),
    "dora": ({"use_dora": True}, 4),
    "rslora": ({"use_rslora": True, "r": 4}, 3),
    "patterns": ({"rank_pattern": {"query": 4}, "alpha_pattern": {"value": 7}}, 2),
    "all_linear": ({"target_modules": "all-linear"}, 5),
    "one_layer": ({"layers_to_transform": [1]}, 3),
    "all_biases": ({"bias": "all"}, 3),
    "biases_of_layers": ({"bias": "lora_only", "use_dora": True}, 2),
    "norms": ({"modules_to_save": ["classifier", "LayerNorm"]}, 3),
    "pooler": ({"modules_to_save": ["pooler"]}, 4),
    "no_head": ({"task_type": None}, 3),
    "head_by_name": ({"task_type": None, "modules_to_save": ["classifier"]}, 6),
    "adapted_head": ({"task_type": None, "target_modules": ["query", "classifier"]}, 3),
}
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained classifier of three labels."""
    directory = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_bert_dir, id2label=dict(enumerate(["x", "y", "z"]))
    )
    model.classifier.weight.data.normal_()
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def plain(base: Path, count: int) -> Any:
    torch.manual_seed(3)
    return AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=count, ignore_mismatched_sizes=True
    )


def make(base: Path, directory: Path, options: dict[str, Any], count: int) -> Path:
    """An adapter of peft with random values in all that it trains."""
    given = {"task_type": "SEQ_CLS", "r": 2, "target_modules": ["query", "value"], **options}
    model = get_peft_model(plain(base, count), LoraConfig(**given))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(directory)
    return directory


def peft_logits(base: Path, directory: Path, count: int) -> Tensor:
    """The oracle: peft on plain transformers."""
    return plain_logits(PeftModel.from_pretrained(plain(base, count), directory).eval(), TEXTS, 64)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("peft")
    return {name: make(base, folder / name, *case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def bank(base: Path, adapters: dict[str, Path]) -> AdapterBank:
    """The first one is of peft, and says what the base is."""
    return AdapterBank.from_pretrained(adapters, precision="fp32")


@pytest.mark.slow
def test_every_kind_gives_what_peft_gives_in_one_batch(
    bank: AdapterBank, base: Path, adapters: dict[str, Path]
) -> None:
    texts = [text for text in TEXTS for _ in CASES]
    mixed = bank.logits(texts, list(CASES) * len(TEXTS))
    for place, (name, (_, count)) in enumerate(CASES.items()):
        expected = peft_logits(base, adapters[name], count)
        found = torch.stack(mixed[place :: len(CASES)])
        assert_close(found, expected, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_labels_are_those_of_the_outputs_of_the_base_or_those_that_are_given(
    bank: AdapterBank, adapters: dict[str, Path]
) -> None:
    assert bank.adapters["lora"].labels == ("LABEL_0", "LABEL_1")
    assert bank.adapters["no_head"].labels == ("x", "y", "z")
    names = ["down", "up"]
    bank.add(adapters["lora"], "named", labels=names)
    try:
        answers = bank.predict(TEXTS, "named")
        best = torch.stack(bank.logits(TEXTS, "lora")).argmax(1).tolist()
        assert [answer["label"] for answer in answers] == [names[index] for index in best]
        assert [list(answer["scores"]) for answer in answers] == [names] * len(TEXTS)
    finally:
        bank.remove("named")


def test_labels_that_do_not_fit_are_refused(bank: AdapterBank, adapters: dict[str, Path]) -> None:
    cases: list[tuple[Any, str]] = [
        (["a", "b", "c"], r"lora' has 2 outputs; got 3 labels, \['a', 'b', 'c'\]; expected one for each"),
        (["a"], "has 2 outputs; got 1 labels"),
        ([], r"labels are not usable; got \[\]"),
        (["a", "a"], "labels are not usable; .*each once"),
        ("ab", "labels are not usable; got 'ab'"),
        ([0, 1], "labels are not usable"),
    ]
    for labels, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            bank.add(adapters["lora"], "wrong", labels=labels)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="has 3 outputs; got 2 labels"):
        bank.add(adapters["no_head"], "wrong", labels=["a", "b"])
    assert "wrong" not in bank.adapters


def test_labels_of_an_adapter_that_has_some_are_its_own(
    tiny_bert_dir: Path, bank: AdapterBank, base: Path, tmp_path: Path
) -> None:
    ours = make_adapter(base, tmp_path / "ours", ["a", "b"])
    with pytest.raises(
        ValueError, match=r"has names for its labels; got labels=\['c', 'd'\]; .*\['a', 'b'\]"
    ):
        bank.add(ours, labels=["c", "d"])
    with pytest.raises(ValueError, match=r"a model in memory has labels; got labels=\['c', 'd'\]"):
        bank.add(TextClassifier.from_pretrained(ours), "ours", labels=["c", "d"])
    values = json.loads((ours / FILE).read_text())
    (ours / FILE).write_text(json.dumps({**values, "labels": ["a", "a"]}))
    with pytest.raises(ValueError, match="labels are not usable"):
        bank.add(ours)
    assert list(bank.adapters) == list(CASES)


def rewritten(adapter: Path, directory: Path, **values: Any) -> Path:
    """The adapter with other values in its configuration."""
    directory.mkdir()
    for path in adapter.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, **values}))
    return directory


def test_a_base_of_another_name_is_refused_unless_it_is_said_to_be_the_same(
    bank: AdapterBank, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    renamed = rewritten(adapters["lora"], tmp_path / "renamed", base_model_name_or_path="org/elsewhere")
    with pytest.raises(
        ValueError, match=r"got 'org/elsewhere'; expected '.*'; pass check_base=False"
    ) as error:
        bank.add(renamed)
    assert repr(str(base)) in str(error.value) and "\n" not in str(error.value)
    assert "renamed" not in bank.adapters
    bank.add(renamed, check_base=False)
    try:
        for found, expected in zip(bank.logits(TEXTS, "renamed"), bank.logits(TEXTS, "lora"), strict=True):
            assert torch.equal(found, expected)
    finally:
        bank.remove("renamed")


def test_its_tokenizer_has_to_be_the_banks(
    bank: AdapterBank, adapters: dict[str, Path], tmp_path: Path
) -> None:
    same, other = (rewritten(adapters["lora"], tmp_path / name) for name in ("same", "other"))
    tiny_tokenizer().save_pretrained(same)
    bank.add(same)
    bank.remove("same")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["film was"])
    tokenizer.save_pretrained(other)
    with pytest.raises(
        ValueError, match=r"other' has another tokenizer than the bank.*bank of its own"
    ) as error:
        bank.add(other)
    assert "\n" not in str(error.value) and "other" not in bank.adapters


@pytest.mark.parametrize(
    "task", ["TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"]
)
def test_an_adapter_for_another_task_says_what_it_is_for(
    task: str, bank: AdapterBank, adapters: dict[str, Path], tmp_path: Path
) -> None:
    other = rewritten(adapters["lora"], tmp_path / "other", task_type=task)
    for add in (bank.add, lambda place: AdapterBank.from_pretrained([place])):
        with pytest.raises(ValueError, match=f"got task_type='{task}'; expected 'SEQ_CLS'") as error:
            add(other)
        assert "\n" not in str(error.value)
    assert list(bank.adapters) == list(CASES)


def test_an_adapter_without_a_head_needs_a_base_that_has_one(tiny_bert_dir: Path, tmp_path: Path) -> None:
    headless = make(tiny_bert_dir, tmp_path / "headless", {"task_type": None}, 2)
    with pytest.raises(ValueError, match="would be random") as error:
        AdapterBank.from_pretrained([headless])
    assert "\n" not in str(error.value)


def test_what_cannot_be_stacked_is_refused_by_name(
    bank: AdapterBank, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    words = make(base, tmp_path / "words", {"target_modules": ["query", "word_embeddings"]}, 2)
    experts = rewritten(adapters["lora"], tmp_path / "experts", target_parameters=["experts.weight"])
    for adapter, message in (
        (words, "cannot share its model with others; got 1 updates of other weights.*word_embeddings"),
        (experts, "target_parameters"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            bank.add(adapter)
        assert "\n" not in str(error.value)
    assert list(bank.adapters) == list(CASES)
