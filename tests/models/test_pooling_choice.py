from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import tiny_classifier

from hf_lora.models.pooling import choose_pooling, declared_pooling


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
        ValueError, match="unknown pooling; got 'max'; expected one of mean, cls, mean_layers"
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
