"""Pooled classifiers against a plain reference: transformers' encoder and sums written out by hand."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import LABELS, MINILM, randomize, tiny_batch, tiny_classifier
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModel

from hf_lora import LoRAConfig, TextClassifier, inject_lora, load_adapter, load_classifier, save_adapter
from hf_lora.adapters.card import RunSummary, render_card
from hf_lora.lora.head import find_head
from hf_lora.lora.inject import injection, trainable_parameter_count
from hf_lora.models.bundled import resolve_base
from hf_lora.models.loading import load_base
from hf_lora.models.pooling import (
    HEAD,
    PooledClassifier,
    choose_pooling,
    declared_pooling,
    first_token,
    mean_of_tokens,
    pooling_of,
)
from hf_lora.serving.loading import load_trained

POOLINGS = ["mean", "cls", "mean_layers"]


ENCODERS = ["bert", "roberta", "distilbert", "electra", "mpnet", "albert", "deberta-v2"]


def by_hand(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Row by row, of the tokens that are no padding alone."""
    rows = [
        [token for token, seen in zip(row, seen_of_row, strict=True) if seen]
        for row, seen_of_row in zip(states, mask, strict=True)
    ]
    pooled = [sum(tokens) / len(tokens) if pooling == "mean" else tokens[0] for tokens in rows]
    return torch.stack(pooled)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_is_of_the_tokens_that_are_no_padding(pooling: str, side: str) -> None:
    torch.manual_seed(0)
    states = torch.randn(3, 5, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    mask = mask if side == "right" else mask.flip(1)
    pool = mean_of_tokens if pooling == "mean" else first_token
    assert_close(pool(states, mask), by_hand(states, mask, pooling))


def test_a_mean_of_bf16_states_is_taken_in_fp32() -> None:
    states = torch.full((1, 300, 2), 1.0).bfloat16()
    states[0, 0] = 2.0
    pooled = mean_of_tokens(states, torch.ones(1, 300, dtype=torch.long))
    assert_close(pooled, torch.full((1, 2), 301 / 300))


def encoder_by_hand(encoder: torch.nn.Module, batch: dict[str, torch.Tensor], pooling: str) -> torch.Tensor:
    """What the head gets, of the states that transformers gives for every layer; of two layers both and the last."""
    mask = batch["attention_mask"]
    outputs = encoder(input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=True)
    if pooling != "mean_layers":
        return by_hand(outputs.last_hidden_state, mask, pooling)
    assert len(outputs.hidden_states) == 3
    layers = [outputs.hidden_states[1], outputs.last_hidden_state, outputs.last_hidden_state]
    return torch.cat([by_hand(states, mask, "mean") for states in layers], -1)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("model_type", ENCODERS)
def test_logits_and_loss_are_those_of_the_encoder_pooled_by_hand(model_type: str, pooling: str) -> None:
    plain = tiny_classifier(model_type)
    batch = tiny_batch()
    model = PooledClassifier(plain, pooling).eval()
    head = getattr(model, HEAD)
    expected = encoder_by_hand(model.base_model, batch, pooling) @ head.weight.T + head.bias
    outputs = model(**batch)
    assert_close(outputs.logits, expected)
    assert_close(outputs.loss, F.cross_entropy(expected, batch["labels"]))
    assert find_head(model) == (HEAD,)
    assert pooling_of(model) == pooling


def test_without_a_mask_every_token_counts() -> None:
    model = PooledClassifier(tiny_classifier(), "mean").eval()
    ids = tiny_batch()["input_ids"]
    assert_close(
        model(input_ids=ids).logits, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    )


@pytest.mark.parametrize(
    ("problem_type", "labels", "expected"),
    [
        ("multi_label_classification", torch.tensor([[1.0, 0, 1]] * 4), F.binary_cross_entropy_with_logits),
        ("regression", torch.tensor([[0.5, 1.0, -1.0]] * 4), F.mse_loss),
    ],
)
def test_the_loss_is_that_of_the_problem_type(problem_type, labels, expected) -> None:
    model = PooledClassifier(tiny_classifier(problem_type=problem_type), "mean").eval()
    outputs = model(**{**tiny_batch(), "labels": labels})
    assert_close(outputs.loss, expected(outputs.logits, labels))


def test_the_head_has_the_dropout_of_the_configuration() -> None:
    model = PooledClassifier(tiny_classifier(classifier_dropout=0.4, hidden_dropout_prob=0.0), "mean")
    assert getattr(model, HEAD).dropout.p == 0.4
    batch = tiny_batch()
    model.train()
    model.config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    first = model(**batch).logits
    assert not torch.equal(first, model(**batch).logits)
    model.eval()
    assert torch.equal(model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_an_encoder_decoder_has_nothing_to_pool(model_type: str) -> None:
    sizes = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 4,
    }
    plain = tiny_classifier(model_type, **sizes)
    with pytest.raises(
        ValueError, match="no encoder whose tokens could be pooled; got pooling='mean'; expected"
    ):
        PooledClassifier(plain, "mean")


def test_an_unknown_pooling_names_the_known_ones(tiny_bert_dir: Path) -> None:
    with pytest.raises(
        ValueError,
        match="unknown pooling; got 'maen'; expected one of native, mean, cls, mean_layers; did you mean 'mean'",
    ):
        load_base(str(tiny_bert_dir), LABELS, pooling="maen")


@pytest.mark.parametrize(
    ("count", "layers"), [(1, (1, 1, 1)), (2, (1, 2, 2)), (3, (1, 2, 3)), (6, (2, 4, 6)), (22, (8, 15, 22))]
)
def test_three_layers_are_a_third_two_thirds_and_all_of_the_depth(
    count: int, layers: tuple[int, ...]
) -> None:
    for pooling, expected in {"mean_layers": layers, "mean": (count,), "cls": (count,)}.items():
        model = PooledClassifier(tiny_classifier(num_hidden_layers=count), pooling)
        assert model.layers == expected


def test_layers_of_another_length_are_not_pooled() -> None:
    """A Funnel Transformer shortens its states on the way up."""
    model = PooledClassifier(tiny_classifier(), "mean_layers").eval()
    batch = tiny_batch()
    whole = model.base_model(input_ids=batch["input_ids"], output_hidden_states=True)
    whole["hidden_states"] = tuple(states[:, ::2] for states in whole.hidden_states)
    with (
        mock.patch.object(model.base_model, "forward", lambda **_: whole),
        pytest.raises(
            ValueError, match=r"layers cannot be pooled; got states \[.*; expected 3 of .*pooling='mean'"
        ),
    ):
        model(**batch)


def test_a_head_on_several_layers_becomes_one_on_the_last() -> None:
    """With no weight on the lower layers it says the same before and after."""
    model = PooledClassifier(tiny_classifier(), "mean_layers").eval()
    head, batch = getattr(model, HEAD), tiny_batch()
    with torch.no_grad():
        head.weight[:, : 2 * model.config.hidden_size] = 0.0
    before = model(**batch).logits
    model.read_last_layer()
    assert (pooling_of(model), model.layers, tuple(head.weight.shape)) == ("mean", (2,), (3, 32))
    assert_close(model(**batch).logits, before)
    assert head.weight.requires_grad and head.in_features == 32
    with pytest.raises(ValueError, match="pooling='mean' has no form that reads the last layer alone"):
        model.read_last_layer()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_hidden_states_are_given_to_who_asks_for_them_alone(pooling: str) -> None:
    """A Trainer would collect them over a whole data set."""
    model, batch = PooledClassifier(tiny_classifier(), pooling).eval(), tiny_batch()
    assert set(model(**batch)) == {"loss", "logits"}
    assert len(model(**batch, output_hidden_states=True).hidden_states) == 3
    assert set(model(**batch, output_hidden_states=False)) == {"loss", "logits"}
    model.config.output_hidden_states = True
    assert len(model(**batch).hidden_states) == 3


def test_gradients_reach_every_layer_from_the_head_alone() -> None:
    model = PooledClassifier(tiny_classifier(), "mean_layers")
    head, width = getattr(model, HEAD), model.config.hidden_size
    with torch.no_grad():
        head.weight[:, width:] = 0.0
    model(**tiny_batch()).loss.backward()
    first, second = (layer.output.dense.weight.grad for layer in model.base_model.encoder.layer)
    assert first.abs().sum() > 0
    assert second is None or second.abs().sum() == 0


@pytest.fixture(params=POOLINGS)
def pooled_dir(request, tiny_bert_dir: Path, tmp_path: Path) -> Path:
    torch.manual_seed(3)
    model, tokenizer = load_classifier(
        str(tiny_bert_dir), LABELS, LoRAConfig(rank=4, alpha=8), pooling=request.param, max_length=32
    )
    randomize(model)
    return save_adapter(model, tmp_path / "pooled", tokenizer=tokenizer)


def test_an_adapter_with_a_pooled_head_comes_back_whole(pooled_dir: Path) -> None:
    model, _, info = load_trained(pooled_dir)
    assert info.pooling in POOLINGS
    assert isinstance(model, PooledClassifier)
    tensors = load_file(pooled_dir / "adapter_model.safetensors")
    head = getattr(model, HEAD)
    assert_close(head.weight.detach(), tensors[f"base_model.model.{HEAD}.weight"], rtol=0, atol=0)
    assert_close(head.bias.detach(), tensors[f"base_model.model.{HEAD}.bias"], rtol=0, atol=0)
    again = save_adapter(model, pooled_dir.parent / "again")
    for name, tensor in load_file(again / "adapter_model.safetensors").items():
        assert torch.equal(tensor, tensors[name]), name


def test_peft_loads_the_lora_part_and_the_head_is_two_lines(pooled_dir: Path, tiny_bert_dir: Path) -> None:
    """What the card's snippet does, with peft in the place of our injector."""
    ours, _, info = load_trained(pooled_dir)
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_bert_dir), str(pooled_dir)).eval()
    batch = {name: value for name, value in tiny_batch().items() if name != "labels"}
    tensors = load_file(pooled_dir / "adapter_model.safetensors")
    pooled = encoder_by_hand(model, batch, info.pooling)
    logits = pooled @ tensors[f"base_model.model.{HEAD}.weight"].T + tensors[f"base_model.model.{HEAD}.bias"]
    assert_close(ours(**batch).logits, logits, rtol=1e-5, atol=1e-6)
    assert json.loads((pooled_dir / "adapter_config.json").read_text())["modules_to_save"] is None


def test_the_cards_lines_for_peft_give_our_logits(pooled_dir: Path) -> None:
    model, tokenizer, info = load_trained(pooled_dir)
    card = render_card(
        info,
        injection(model).config,
        trainable_parameter_count(model),
        run=RunSummary(place=str(pooled_dir)),
    )
    words = {
        "mean": "mean of the tokens",
        "cls": "first token",
        "mean_layers": "means of the tokens in three layers",
    }
    first = card.split("\n# ")[1].split("\n\n")[1]
    assert first.startswith(
        "> **Load it with hf_lora.** Its head is a linear layer on the " + words[info.pooling]
    )
    assert "raise an error" in first and "trust_remote_code" not in first
    assert f"| head | linear, on the {words[info.pooling]} |" in card
    (lines,) = (block for block in re.findall(r"```python\n(.*?)```", card, re.S) if "from peft" in block)
    found: dict[str, Any] = {}
    exec(lines, found)
    with torch.no_grad():
        expected = model(**tokenizer("A text to classify.", return_tensors="pt")).logits
    assert_close(found["logits"], expected, rtol=1e-5, atol=1e-6)


def test_it_is_not_loaded_into_a_model_with_another_head(pooled_dir: Path, tiny_bert_dir: Path) -> None:
    plain, _ = load_base(str(tiny_bert_dir), LABELS)
    with pytest.raises(
        ValueError, match=r"has a head with pooling='(mean|cls|mean_layers)'; got a model with 'native'"
    ):
        load_adapter(plain, pooled_dir)
    assert not any("lora" in name for name, _ in plain.named_parameters())


def test_merged_and_beside_the_weights_it_predicts_the_same(pooled_dir: Path) -> None:
    texts = ["the film was good", "a dull book", "we had a very warm and lovely day"]
    merged = TextClassifier.from_pretrained(pooled_dir, precision="fp32").logits(texts)
    beside = TextClassifier.from_pretrained(pooled_dir, precision="fp32", merge=False).logits(texts)
    assert_close(merged, beside, rtol=1e-4, atol=1e-5)


def test_minilm_means_are_those_of_its_own_recipe(minilm: str) -> None:
    """The mean of the last states over the mask, as the model's repository computes sentence embeddings."""
    model, tokenizer = load_classifier(minilm, LABELS, pooling="mean")
    encoder = AutoModel.from_pretrained(resolve_base(MINILM)).eval()
    batch = tokenizer(
        ["A short text.", "Another one, which is a little longer."], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        states = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).expand(states.size()).float()
        embeddings = torch.sum(states * mask, 1) / torch.clamp(mask.sum(1), min=1e-9)
        head = getattr(model, HEAD)
        assert_close(model.eval()(**batch).logits, F.linear(embeddings, head.weight, head.bias))


def test_lora_in_a_pooled_classifier_is_where_it_is_in_the_plain_one() -> None:
    plain = tiny_classifier()
    names = inject_lora(PooledClassifier(tiny_classifier(), "mean"), LoRAConfig())
    assert names == inject_lora(plain, LoRAConfig())


@pytest.fixture
def base(tiny_bert_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bert_dir, tmp_path / "base"))


def declare(base: Path, **values: object) -> str:
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **values}))
    return str(base)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": "lasttoken"}, None),
        ({"pooling_mode_max_tokens": True}, None),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, None),
        ({}, None),
    ],
)
def test_a_sentence_encoder_says_how_it_was_pooled(base: Path, values: dict, expected: str | None) -> None:
    directory = declare(base, **values)
    assert declared_pooling(directory) == expected
    chosen = {"mean": "mean_layers", "cls": "cls", None: "native"}[expected]
    assert choose_pooling("auto", directory, labels=2).pooling == chosen


def test_other_models_keep_their_own_head(base: Path) -> None:
    choice = choose_pooling("auto", str(base), labels=2)
    assert str(choice) == "pooling: native (the model's own head; its files name no pooling)"


def test_minilm_is_a_mean_pooled_encoder(minilm: str) -> None:
    assert str(choose_pooling("auto", minilm, labels=2)) == (
        "pooling: mean_layers (by the 1_Pooling/config.json of this sentence encoder, in three layers)"
    )


@pytest.mark.parametrize(("labels", "expected"), [(64, "mean_layers"), (65, "mean"), (None, "mean_layers")])
def test_a_head_of_many_labels_reads_the_last_layer_alone(
    minilm: str, labels: int | None, expected: str
) -> None:
    assert choose_pooling("auto", minilm, labels=labels).pooling == expected


def test_there_may_be_a_reason_to_read_the_last_layer_alone(minilm: str) -> None:
    choice = choose_pooling("auto", minilm, labels=2, last_only="it rains")
    assert choice.pooling == "mean" and choice.reason.endswith("in the last layer alone, since it rains")
    assert choose_pooling("mean_layers", minilm, labels=2, last_only="it rains").pooling == "mean_layers"


def test_what_is_asked_for_is_taken(minilm: str) -> None:
    assert choose_pooling("native", minilm).pooling == "native"
    assert choose_pooling("cls", minilm).pooling == "cls"
    with pytest.raises(
        ValueError,
        match="unknown pooling; got 'max'; expected one of native, mean, cls, mean_layers",
    ):
        choose_pooling("max", minilm)


def test_a_classifier_of_as_many_labels_keeps_its_trained_head(tmp_path: Path) -> None:
    tiny_classifier(num_labels=3).save_pretrained(tmp_path / "classifier")
    directory = declare(tmp_path / "classifier", pooling_mode="mean")
    assert choose_pooling("auto", directory, labels=3).pooling == "native"
    assert "trained head for 3 labels" in choose_pooling("auto", directory, labels=3).reason
    assert choose_pooling("auto", directory, labels=4).pooling == "mean_layers"


def test_a_broken_file_is_an_error_in_one_line(base: Path) -> None:
    declare(base)
    (base / "1_Pooling" / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json"):
        choose_pooling("auto", str(base), labels=2)
