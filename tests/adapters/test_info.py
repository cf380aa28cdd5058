from __future__ import annotations

import json
import re
from typing import Any

import pytest

from hf_lora.adapters.info import FORMAT_VERSION, AdapterInfo, BaseModel
from hf_lora.tasks import TASKS

FULL = AdapterInfo(
    labels=("böse", "gut", "neutral"),
    problem_type="multi_label_classification",
    max_length=77,
    text_columns=("premise", "hypothesis"),
    label_columns=("böse", "gut", "neutral"),
    label_layout="columns",
    projections="qv",
    temperature=1.75,
    thresholds=(0.25, 0.5, 0.875),
    base_model=BaseModel("org/base", "abc123", "sha256:0f"),
    metrics={"eval_accuracy": 0.25, "by_class": {"gut": {"wrong": 3}}},
    sha256={"adapter_model.safetensors": "00ff"},
    hf_lora_version="1.2.3",
    transformers_version="5.4.3",
)


MULTI = "multi_label_classification"
# Temperatures that are none, and how the error shows them.
UNUSABLE = (
    (0, "got 0"),
    (-1.5, "got -1.5"),
    (1e-9, "1e-09"),
    (1e9, "from 0.001 to 1000"),
    (True, "got True"),
    ("1.5", "'1.5'"),
    ([1.5], "[1.5]"),
    (float("nan"), "nan"),
    (float("inf"), "inf"),
)


def as_json(**changes: Any) -> str:
    return json.dumps({"format_version": FORMAT_VERSION, "labels": ["a", "b"], **changes})


def test_round_trip_gives_an_equal_object() -> None:
    assert AdapterInfo.from_json(FULL.to_json()) == FULL
    minimal = AdapterInfo(labels=("score",), problem_type="regression")
    assert AdapterInfo.from_json(minimal.to_json()) == minimal


def test_file_is_plain_json_with_every_field() -> None:
    text = FULL.to_json()
    assert text.endswith("}\n")
    assert "böse" in text
    assert json.loads(text) == {
        "format_version": 1,
        "labels": ["böse", "gut", "neutral"],
        "problem_type": "multi_label_classification",
        "pooling": "native",
        "max_length": 77,
        "text_columns": ["premise", "hypothesis"],
        "label_columns": ["böse", "gut", "neutral"],
        "label_layout": "columns",
        "projections": "qv",
        "lora": None,
        "temperature": 1.75,
        "thresholds": [0.25, 0.5, 0.875],
        "base_model": {"name_or_path": "org/base", "revision": "abc123", "fingerprint": "sha256:0f"},
        "metrics": {"eval_accuracy": 0.25, "by_class": {"gut": {"wrong": 3}}},
        "sha256": {"adapter_model.safetensors": "00ff"},
        "hf_lora_version": "1.2.3",
        "transformers_version": "5.4.3",
    }


def test_missing_optional_keys_get_defaults() -> None:
    assert AdapterInfo.from_json(as_json()) == AdapterInfo(labels=("a", "b"))


def test_a_file_without_calibration_has_none() -> None:
    old = AdapterInfo.from_json(as_json(problem_type=MULTI))
    assert (old.temperature, old.thresholds) == (None, None)
    assert AdapterInfo.from_json(as_json(temperature=None, thresholds=None)) == AdapterInfo(labels=("a", "b"))
    new = AdapterInfo.from_json(as_json(problem_type=MULTI, temperature=2, thresholds=[0.25, 0.75]))
    assert (new.temperature, new.thresholds) == (2, (0.25, 0.75))


def test_calibration_is_checked_in_python_too() -> None:
    with pytest.raises(ValueError, match="temperature is not usable; got True"):
        AdapterInfo(labels=("a",), temperature=True)
    with pytest.raises(ValueError, match=r"thresholds are not usable; got \(0\.5,\); expected 2 numbers"):
        AdapterInfo(labels=("a", "b"), problem_type=MULTI, thresholds=(0.5,))


def test_unknown_problem_type_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown problem type; got 'ranking'") as error:
        AdapterInfo(labels=("a",), problem_type="ranking")
    assert all(known in str(error.value) for known in TASKS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["here.json", "not valid JSON", "line 1"]),
        ("[1]", ["here.json", "not a JSON object", "list"]),
        (
            as_json(format_version=2),
            ["here.json", "format version", "got 2", "expected 1", "upgrade hf_lora"],
        ),
        (json.dumps({"labels": ["a"]}), ["here.json", "format version", "got None", "expected 1"]),
        (as_json(colour="red", age=3), ["here.json", "unknown keys", "['age', 'colour']"]),
        (json.dumps({"format_version": 1}), ["here.json", "no usable labels", "got None", "list of strings"]),
        (as_json(labels="ab"), ["here.json", "no usable labels", "'ab'"]),
        (as_json(labels=["a", 1]), ["here.json", "no usable labels", "['a', 1]"]),
        (as_json(base_model={"name": "x"}), ["here.json", "cannot be read", "name"]),
        (as_json(base_model="org/base"), ["here.json", "cannot be read"]),
        (as_json(problem_type="ranking"), ["problem type", "'ranking'"]),
        *((as_json(temperature=value), ["here.json", "temperature", shown]) for value, shown in UNUSABLE),
        (as_json(temperature=2, problem_type="regression"), ["here.json", "regression has no temperature"]),
        (as_json(thresholds=[0.5, 0.5]), ["here.json", "thresholds are for multi-label", "single_label"]),
        *(
            (
                as_json(problem_type=MULTI, thresholds=value),
                ["here.json", "thresholds are not usable", "2 numbers"],
            )
            for value in (
                [],
                [0.5],
                [0.5] * 3,
                [0.5, 0],
                [0.5, 1],
                [0.5, True],
                [0.5, "0.5"],
                [0.5, None],
                0.5,
            )
        ),
        (as_json(problem_type=MULTI, thresholds=[0.5, float("nan")]), ["here.json", "thresholds", "nan"]),
        (
            as_json(problem_type=MULTI, thresholds={"0": 0.5, "1": 0.5}),
            ["here.json", "thresholds are not usable"],
        ),
    ],
)
def test_bad_file_is_one_clear_error(text: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        AdapterInfo.from_json(text, "here.json")
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)
