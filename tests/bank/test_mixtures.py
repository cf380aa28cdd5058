"""Adapters that have little in common in one bank, slots that are used again, and callers of every kind."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize, tiny_tokenizer
from helpers_serving import LONG, PAIRS, TEXTS
from torch import Tensor

from hf_lora import (
    AdapterBank,
    LoRAConfig,
    TextClassifier,
    inject_lora,
    load_classifier,
    lora_disabled,
    lora_parameters,
    merge_lora,
    save_adapter,
)
from hf_lora.adapters.info import AdapterInfo
from hf_lora.lora.inject import injection
from hf_lora.models.loading import load_base

# Everything that can stay in a slot: factors, magnitudes, biases, norms, a head of several layers or of many labels.
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "full": (3, {"rank": 6, "variant": "dora", "bias": "all", "target_modules": "all-linear"}, {}),
    "bare": (2, {"rank": 1, "projections": "q", "layers": (-1,)}, {"pooling": "mean"}),
    "many": (300, {}, {"pooling": "mean"}),
    "pair": (2, {}, {"text_columns": ("first", "second")}),
    "unlimited": (2, {}, {"max_length": None}),
    "several": (4, {}, {"problem_type": "multi_label_classification"}),
    "number": (1, {}, {"problem_type": "regression"}),
}


def model_of(base: Path, name: str) -> Any:
    count, lora, options = CASES[name]
    torch.manual_seed(len(name))
    labels = [f"{name} {number}" for number in range(count)]
    model, tokenizer = load_classifier(
        str(base), labels, LoRAConfig(**{"rank": 2, **lora}), **{"max_length": 32, **options}
    )
    randomize(model, 0.1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def adapters(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mixtures")
    made = {}
    for name in CASES:
        model, tokenizer = model_of(tiny_bert_dir, name)
        made[name] = save_adapter(model, folder / name, tokenizer=tokenizer)
    return made


@pytest.fixture(scope="module")
def alone(adapters: Mapping[str, Path]) -> dict[str, TextClassifier]:
    return {name: TextClassifier.from_pretrained(path, precision="fp32") for name, path in adapters.items()}


@pytest.fixture(scope="module")
def bank(adapters: Mapping[str, Path]) -> AdapterBank:
    return AdapterBank.from_pretrained(adapters, precision="fp32")


def texts_of(name: str) -> list[Any]:
    return [*PAIRS, ("", "good")] if name == "pair" else TEXTS


def assert_alone(bank: AdapterBank, alone: Mapping[str, TextClassifier], names: list[str]) -> None:
    """Every text of every adapter in one call."""
    asked = [(name, text) for name in names for text in texts_of(name)]
    got = bank.logits([text for _, text in asked], [name for name, _ in asked])
    expected: list[Tensor] = [row for name in names for row in alone[name].logits(texts_of(name))]
    for (name, _), row, own in zip(asked, got, expected, strict=True):
        torch.testing.assert_close(row, own, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_pairs_many_labels_and_all_problem_types_go_together(
    bank: AdapterBank, alone: dict[str, TextClassifier]
) -> None:
    assert_alone(bank, alone, list(CASES))
    texts = [texts_of(name)[0] for name in CASES]
    for name, text, answer in zip(CASES, texts, bank.predict(texts, list(CASES)), strict=True):
        expected = alone[name].predict([text])[0]
        assert answer.keys() == {*expected, "adapter"} and answer["adapter"] == name
        assert answer.get("label") == expected.get("label")
        assert answer.get("labels") == expected.get("labels")


def test_long_texts_are_cut_where_their_adapter_says(
    bank: AdapterBank, alone: dict[str, TextClassifier]
) -> None:
    names = ["full", "unlimited"]
    for name, row in zip(names, bank.logits([LONG * 3] * 2, names), strict=True):
        torch.testing.assert_close(row, alone[name].logits([LONG * 3])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("capacity", [None, 1])
def test_nothing_of_an_adapter_stays_in_its_slot(
    adapters: dict[str, Path], alone: dict[str, TextClassifier], capacity: int | None
) -> None:
    """The one with everything goes, one with as little as possible comes, and back."""
    bank = AdapterBank.from_pretrained({"x": adapters["full"]}, precision="fp32", capacity=capacity)
    for name in ("bare", "full", "many", "full", "several", "bare"):
        bank.remove("x")
        bank.add(adapters[name], "x")
        assert_alone(bank, {"x": alone[name]}, ["x"])
        off = torch.stack(bank.logits(TEXTS, "x", enabled=False))
        with lora_disabled(alone[name].model):
            torch.testing.assert_close(off, alone[name].logits(TEXTS), atol=1e-5, rtol=1e-5)


def test_one_directory_under_two_names_and_room_for_one(
    adapters: dict[str, Path], alone: dict[str, TextClassifier]
) -> None:
    places = {"one": adapters["full"], "two": adapters["full"], "three": adapters["bare"]}
    bank = AdapterBank.from_pretrained(places, precision="fp32", capacity=1)
    of = {"one": alone["full"], "two": alone["full"], "three": alone["bare"]}
    assert_alone(bank, of, ["one", "two", "three", "one"][:3])
    assert len(bank.loaded) == 1
    bank.remove("one")
    assert_alone(bank, of, ["two", "three"])


def test_callers_may_have_inference_mode_gradients_or_a_generator_left_half_way(
    bank: AdapterBank, alone: dict[str, TextClassifier]
) -> None:
    expected = alone["full"].logits(TEXTS)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            got = torch.stack(bank.logits(TEXTS, "full"))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    stream = bank.predict_stream(iter(TEXTS * 2), "full")
    assert next(stream)["adapter"] == "full"
    stream.close()
    assert not any(entry.calls for entry in bank._entries.values())
    assert not any(bank._slots._running.values())
    assert_alone(bank, alone, list(CASES))


def test_adding_in_inference_mode_changes_nothing(
    adapters: dict[str, Path], alone: dict[str, TextClassifier]
) -> None:
    with torch.inference_mode():
        bank = AdapterBank.from_pretrained({"bare": adapters["bare"]}, precision="fp32")
        bank.add(adapters["full"], "full")
    bank.add(adapters["many"], "many")
    bank.remove("full")
    bank.add(adapters["full"], "full")
    assert_alone(bank, alone, ["bare", "full", "many"])


@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_half_precision_is_near_fp32(
    adapters: dict[str, Path], alone: dict[str, TextClassifier], how: str
) -> None:
    """bf16 has three digits, and two blocks add up: 6 % of the norm."""
    bank = AdapterBank.from_pretrained(adapters, precision="bf16" if how == "bf16" else "fp32")
    names = [name for name in CASES if name != "pair"]
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        got = bank.logits([text for text in TEXTS for _ in names], names * len(TEXTS))
    for place, name in enumerate(names):
        own, expected = torch.stack(got[place :: len(names)]), alone[name].logits(TEXTS)
        assert own.dtype == torch.float32
        error = torch.linalg.vector_norm(own - expected) / torch.linalg.vector_norm(expected)
        assert error < 0.06, (name, float(error))


def test_models_in_memory_stay_as_they_are(
    adapters: dict[str, Path], alone: dict[str, TextClassifier], tiny_bert_dir: Path
) -> None:
    """As they are trained, merged, and in bf16 with fp32 factors."""
    bank = AdapterBank.from_pretrained({"bare": adapters["bare"]}, precision="fp32")
    plain, _ = model_of(tiny_bert_dir, "full")
    merged = copy.deepcopy(plain)
    merge_lora(merged)
    for name, model in (("plain", plain), ("merged", merged)):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        bank.add(model, name)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    bank.add(alone["full"], "classifier")
    of = {**dict.fromkeys(("plain", "merged", "classifier"), alone["full"]), "bare": alone["bare"]}
    assert_alone(bank, of, list(of))


def in_memory(base: Path, config: LoRAConfig, head: tuple[str, ...], labels: int = 3) -> Any:
    torch.manual_seed(1)
    names = [str(number) for number in range(labels)]
    model, _ = load_base(str(base), names)
    inject_lora(model, config, head=head)
    injection(model).info = AdapterInfo(tuple(names))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


HEADS: dict[str, tuple[LoRAConfig, tuple[str, ...]]] = {
    "a norm of the encoder": (
        LoRAConfig(rank=2),
        ("classifier", "bert.encoder.layer.1.output.LayerNorm"),
    ),
    "a block": (LoRAConfig(rank=2, variant="dora"), ("classifier", "bert.encoder.layer.1.output.LayerNorm")),
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_with_parts_in_the_encoder_or_updates_of_their_own(
    adapters: dict[str, Path], alone: dict[str, TextClassifier], tiny_bert_dir: Path, kind: str
) -> None:
    bank = AdapterBank.from_pretrained({name: adapters[name] for name in ("bare", "full")}, precision="fp32")
    model = in_memory(tiny_bert_dir, *HEADS[kind])
    bank.add(model, "x")
    own = TextClassifier(model, alone["full"].tokenizer, injection(model).info)
    assert_alone(bank, {**alone, "x": own}, ["bare", "x", "full"])
    with lora_disabled(model):
        expected = own.logits(TEXTS)
    off = torch.stack(bank.logits(TEXTS, "x", enabled=False))
    torch.testing.assert_close(off, expected, atol=1e-5, rtol=1e-5)


def test_a_directory_that_was_copied_away_is_no_part_of_the_bank(
    adapters: dict[str, Path], alone: dict[str, TextClassifier], tmp_path: Path
) -> None:
    place = shutil.copytree(adapters["full"], tmp_path / "moved")
    bank = AdapterBank.from_pretrained({"full": place}, precision="fp32")
    shutil.rmtree(place)
    assert_alone(bank, alone, ["full"])


def test_what_a_call_loads_again_can_be_written_by_the_next_one(
    adapters: dict[str, Path], alone: dict[str, TextClassifier]
) -> None:
    """Calls are in inference mode, whose tensors nobody may write outside of it."""
    places = {name: adapters[name] for name in ("full", "bare", "many")}
    bank = AdapterBank.from_pretrained(places, precision="fp32", capacity=1)
    for name in ("full", "bare"):
        assert_alone(bank, alone, [name])
        bank.add(adapters["several"], "several", replace=True)
        bank.remove("several")
    assert_alone(bank, alone, list(places))


@pytest.mark.parametrize("order", [("full", "whole"), ("whole", "full")])
def test_a_layer_may_be_adapted_by_one_and_replaced_by_another(
    adapters: dict[str, Path], alone: dict[str, TextClassifier], tiny_bert_dir: Path, order: tuple[str, str]
) -> None:
    layer = "bert.encoder.layer.0.intermediate.dense"
    model = in_memory(tiny_bert_dir, LoRAConfig(rank=2), ("classifier", layer))
    assert f"{layer}.lora_A" in lora_parameters(alone["full"].model)
    with torch.no_grad():
        model.get_submodule(layer).weight.mul_(1.5)
        expected = [
            model.eval()(**tiny_tokenizer()(text, return_tensors="pt")).logits[0] for text in TEXTS[:1]
        ]
    bank = AdapterBank.from_pretrained({"bare": adapters["bare"]}, precision="fp32")
    for name in order:
        bank.add(model if name == "whole" else adapters[name], name)
    assert_alone(bank, alone, ["full", "bare"])
    got = bank.logits([TEXTS[0], TEXTS[1], TEXTS[1]], ["whole", "full", "bare"])
    torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=1e-5)
