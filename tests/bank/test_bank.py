"""Every answer of a bank is that of the adapter's own classifier, whatever stands beside it in a batch."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from conftest import without_pooler
from helpers_serving import TEXTS

from hf_lora import AdapterBank, LoRAConfig, TextClassifier, load_classifier, lora_disabled, save_adapter

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
# Those that leave the first of the two blocks as it is.
TOP: dict[str, Any] = {"layers": (-1,)}
for _name in ("native", "mean", "mean_layers"):
    CASES[f"top_{_name}"] = (TOP, 2, {"pooling": _name})


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


def test_every_adapter_answers_one_text(bank: AdapterBank, alone: dict[str, TextClassifier]) -> None:
    for names in (
        "*",
        ["dora", "mean_layers", "plain"],
        ["top_native", "top_mean", "top_mean_layers", "last_block"],
    ):
        answer = bank.predict(TEXTS[1], names)
        assert answer["text"] == TEXTS[1]
        assert list(answer["answers"]) == (list(alone) if names == "*" else names)
        for name, given in answer["answers"].items():
            expected: Any = alone[name].predict(TEXTS[1])
            assert given.keys() == expected.keys() - {"text"} and given["label"] == expected["label"], name
            assert given["scores"] == pytest.approx(expected["scores"], abs=1e-5), name


def test_blocks_that_no_adapter_changes_run_once_for_a_text(
    bank: AdapterBank, alone: dict[str, TextClassifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["top_mean", "top_native", "top_mean_layers", "last_block"]
    rows: list[int] = []
    first = bank._loader.model.encoder.get_submodule("encoder.layer.0.intermediate.dense")
    hook = first.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    answers = bank.predict(TEXTS[:3], [names, names[::-1], names[1:]], batch_size=11)
    hook.remove()
    assert rows == [3]
    for text, answer in zip(TEXTS, answers, strict=False):
        for name, given in answer["answers"].items():
            assert given["scores"] == pytest.approx(alone[name].predict(text)["scores"], abs=1e-5), name
    with torch.autocast("cpu", torch.bfloat16):
        assert bank.predict(TEXTS[:3], [names, names[::-1], names[1:]], batch_size=11) == answers
    # The same where each text is in a batch of its own, or one text in several.
    for size in (1, 2, 4):
        assert [a["answers"].keys() for a in bank.predict(TEXTS[:3], [names] * 3, batch_size=size)] == [
            dict.fromkeys(names).keys()
        ] * 3


def test_answers_are_those_of_the_asked_adapters_in_order(
    bank: AdapterBank, alone: dict[str, TextClassifier]
) -> None:
    names = ["multi_label", "regression", "short", "cls", "plain", "rank_3"]
    answers = bank.predict(TEXTS, names)
    assert [(answer["text"], answer["adapter"]) for answer in answers] == list(zip(TEXTS, names, strict=True))
    for answer, text, name in zip(answers, TEXTS, names, strict=True):
        expected: Any = alone[name].predict(text)
        assert answer["label"] == expected["label"] and answer["scores"] == pytest.approx(
            expected["scores"], abs=1e-5
        )
    assert list(bank.predict_stream(iter(TEXTS), "cls")) == bank.predict(TEXTS, "cls")
    assert bank.predict([], "cls") == [] and bank.predict_stream([], "*") is not None


def test_an_unknown_name_is_an_error_with_the_nearest_one(bank: AdapterBank) -> None:
    for call in (
        lambda: bank.predict("good", "plian"),
        lambda: bank.predict(["good", "bad"], ["plain", "plian"]),
        lambda: bank.predict("good", ["plain", "plian"]),
        lambda: bank.logits(["good"], "plian"),
        lambda: bank.remove("plian"),
        lambda: next(bank.predict_stream(["good"], "plian")),
    ):
        with pytest.raises(ValueError, match=r"unknown adapter; got 'plian'; .*did you mean 'plain'"):
            call()
    for call in (bank.predict, bank.logits):
        with pytest.raises(ValueError, match="a name for each text; got 1 names for 2 texts"):
            call(["good", "bad"], ["plain"])
    with pytest.raises(ValueError, match=r"logits are of one adapter for a text; got '\*'; expected a name"):
        bank.logits(["good"], "*")


def test_a_stream_holds_as_many_answers_as_one_of_one_adapter(
    bank: AdapterBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_lora.bank.bank.WINDOW", 6)
    taken: list[str] = []

    def stream() -> Iterator[str]:
        for text in TEXTS:
            taken.append(text)
            yield text

    answers = bank.predict_stream(stream(), ["plain", "cls", "mean"])
    assert next(answers)["answers"].keys() == {"plain", "cls", "mean"} and len(taken) == 2
    assert [answer["text"] for answer in answers] == TEXTS[1:]
    monkeypatch.undo()
    again = bank.predict(TEXTS, [["plain", "cls", "mean"]] * len(TEXTS))
    assert [answer["text"] for answer in again] == TEXTS


def test_without_the_updates_the_encoder_is_the_pretrained_one(
    bank: AdapterBank, alone: dict[str, TextClassifier]
) -> None:
    names = ["plain", "dora_biases", "all_biases", "mean_layers", "pissa"]
    got = bank.logits(TEXTS[:5], names, enabled=False)
    for text, name, logits in zip(TEXTS, names, got, strict=False):
        with lora_disabled(alone[name].model):
            torch.testing.assert_close(logits, alone[name].logits([text])[0], atol=1e-5, rtol=1e-5)


def test_the_least_recently_used_adapter_makes_room(
    adapters: Mapping[str, Path], alone: dict[str, TextClassifier]
) -> None:
    chosen = {name: adapters[name] for name in ("plain", "dora", "mean", "all_biases")}
    bank = AdapterBank.from_pretrained(chosen, precision="fp32", capacity=2)
    assert list(bank.adapters) == list(chosen) and bank.loaded == ["mean", "all_biases"]
    bank.predict("good", "mean")
    bank.predict("good", "dora")
    assert bank.loaded == ["dora", "mean"]
    # More than there is room for, in one call.
    texts, names = shuffled(chosen)
    for text, name, got in zip(texts, names, bank.logits(texts, names), strict=True):
        torch.testing.assert_close(got, alone[name].logits([text])[0], atol=1e-5, rtol=1e-5)
    assert len(bank.loaded) == 2


def test_a_call_ends_with_the_adapters_that_it_began_with(
    adapters: Mapping[str, Path], alone: dict[str, TextClassifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = AdapterBank.from_pretrained({"x": adapters["plain"], "y": adapters["cls"]}, precision="fp32")
    monkeypatch.setattr("hf_lora.bank.bank.WINDOW", 2)
    changed = iter([lambda: bank.add(adapters["mean"], "x", replace=True), lambda: bank.remove("x")])

    def texts() -> Iterator[str]:
        for number, text in enumerate(TEXTS):
            if number in (2, 4):
                next(changed)()
            yield text

    answers = list(bank.predict_stream(texts(), "x"))
    for answer, text in zip(answers, TEXTS, strict=True):
        assert answer["scores"] == pytest.approx(alone["plain"].predict(text)["scores"], abs=1e-5)
    assert list(bank.adapters) == bank.loaded == ["y"]
    bank.remove("y")
    with pytest.raises(ValueError, match=r"the bank has no adapters; got '\*'; expected one that was added"):
        bank.predict("good", "*")


def test_a_directory_that_has_changed_is_not_loaded_again(
    adapters: Mapping[str, Path], alone: dict[str, TextClassifier], tmp_path: Path
) -> None:
    place = tmp_path / "x"
    shutil.copytree(adapters["plain"], place)
    bank = AdapterBank.from_pretrained({"x": place, "y": adapters["cls"]}, precision="fp32", capacity=1)
    shutil.rmtree(place)
    shutil.copytree(adapters["short"], place)
    with pytest.raises(
        ValueError, match=r"the adapter 'x' has changed in .* since it was added; got other files"
    ):
        bank.predict(TEXTS[3], "x")
    assert bank.adapters["x"].labels == alone["plain"].info.labels
    bank.add(place, "x", replace=True)
    for _ in range(2):
        got = bank.logits([TEXTS[3]], "x")[0]
        torch.testing.assert_close(got, alone["short"].logits([TEXTS[3]])[0], atol=1e-5, rtol=1e-5)
        bank.predict("good", "y")


NOT_NAMES: list[Any] = [None, 3, b"plain", {"plain", "cls"}, {"plain": 1}, (name for name in ("plain",))]


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        *((value, "not the name of an adapter; got ") for value in NOT_NAMES),
        (["plain", None], "not the name of an adapter; got "),
        (["*", "plain"], "no adapters are named; got '\\*' in a list; expected names, or '\\*' by itself"),
        ([], "no adapters are named; got an empty list"),
    ],
)
def test_what_names_no_adapter_is_refused(bank: AdapterBank, adapter: Any, message: str) -> None:
    for call in (
        lambda: bank.predict("good", adapter),
        lambda: bank.predict(["good"], [adapter]),
        lambda: bank.predict_stream(["good"], adapter),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_names_may_be_a_column_of_a_table(bank: AdapterBank) -> None:
    names = ["plain", "cls"]
    expected = bank.predict(TEXTS[:2], names)
    assert bank.predict(pandas.Series(TEXTS[:2]), pandas.Series(names)) == expected
    assert bank.predict(TEXTS[:2], np.array(names)) == expected
    assert [type(answer["adapter"]) for answer in expected] == [str, str]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda bank: bank.logits("abc", "plain"), "not texts; got 'abc'"),
        (lambda bank: bank.predict([], "plian"), "unknown adapter; got 'plian'"),
        (lambda bank: bank.predict("good", "plain", batch_size=2.5), "batch_size is not usable; got 2.5"),
        (lambda bank: bank.predict("good", "plain", batch_size=True), "batch_size is not usable; got True"),
        (lambda bank: bank.remove(["plain"]), "unknown adapter; got"),
        (lambda bank: bank.add(None), "an adapter needs a name; got None; .*bank.add"),
        (lambda bank: bank.add("x", 3), "an adapter needs a name; got 3"),
        (lambda bank: bank.add("x", ""), "an adapter needs a name; got ''"),
        (lambda bank: AdapterBank.from_pretrained(3), "no adapters; got 3; expected a list"),  # type: ignore[arg-type]
        (lambda bank: AdapterBank.from_pretrained([None]), "not an adapter; got None"),  # type: ignore[list-item]
        (lambda bank: AdapterBank.from_pretrained({"a": 1}), "not an adapter; got 1; .*bank.add"),  # type: ignore[dict-item]
        (lambda bank: AdapterBank.from_pretrained(["x"], capacity="2"), "capacity is not usable; got '2'"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_one_clear_line(bank: AdapterBank, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call(bank)
    assert "\n" not in str(error.value)
