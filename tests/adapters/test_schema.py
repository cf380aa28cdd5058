"""docs/reference/hf_lora.schema.json against the sidecars that are written, and against the dataclasses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import randomize
from torch import nn

from hf_lora import LoRAConfig, load_classifier, save_adapter
from hf_lora.adapters.info import FILE, AdapterInfo, BaseModel
from hf_lora.lora.inject import injection
from hf_lora.tasks import TASKS
from hf_lora.tasks.calibration import TEMPERATURES

jsonschema = pytest.importorskip("jsonschema")
REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
SCHEMA = json.loads((REFERENCE / "hf_lora.schema.json").read_text(encoding="utf-8"))
KEYS = SCHEMA["properties"]
MULTI = "multi_label_classification"
# What differs from a single-label classifier: arguments of `load_classifier`, and changes of the AdapterInfo.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "single label": ({"text_columns": ("premise", "hypothesis"), "max_length": 32}, {"temperature": 1.5}),
    "multi-label": ({"problem_type": MULTI}, {"temperature": 0.5, "thresholds": (0.25, 0.75)}),
    "regression": ({"problem_type": "regression", "labels": ("stars",)}, {"metrics": {"eval_mse": 0.5}}),
    "pooled": ({"pooling": "mean"}, {}),
    # A linear probe: the smallest adapter that PEFT's format allows, with B = 0.
    "rank 0": (
        {"config": LoRAConfig(rank=1, alpha=1.0, projections="q", layers=(-1,))},
        {"metrics": {"test_accuracy": 0.5}},
    ),
    "by name": ({"config": LoRAConfig(target_modules=("query",), rank_pattern={"0.*query": 2})}, {}),
}


def problems(values: dict[str, Any]) -> list[str]:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    return [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(values)]


@pytest.fixture
def build(tiny_bert_dir: Path) -> Callable[..., nn.Module]:
    def classifier(kind: str) -> nn.Module:
        options, changes = KINDS[kind]
        options = {"labels": ("bad", "good"), "config": LoRAConfig(rank=2), **options}
        model, _ = load_classifier(str(tiny_bert_dir), **options)
        if kind != "rank 0":
            randomize(model)
        info = injection(model).info
        assert isinstance(info, AdapterInfo)
        injection(model).info = replace(info, **changes)
        return model

    return classifier


@pytest.mark.parametrize("kind", KINDS)
def test_written_sidecars_fit_the_schema(kind: str, build: Callable[..., nn.Module], tmp_path: Path):
    values = json.loads((save_adapter(build(kind), tmp_path / "a") / FILE).read_text(encoding="utf-8"))
    assert problems(values) == [] and set(values) == set(KEYS)


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 2},
        {"labels": None},
        {"labels": ["a", 1]},
        {"problem_type": "ranking"},
        {"problem_type": "regression", "temperature": 1.5},
        {"temperature": 0},
        {"temperature": 1e4},
        {"thresholds": [0.5, 0.5]},
        {"problem_type": MULTI, "thresholds": [0.5, 1]},
        {"base_model": {"name": "x"}},
        {"max_length": "77"},
        {"colour": "red"},
        {"lora": {"rank": 0}},
    ],
    ids=str,
)
def test_what_the_reader_refuses_does_not_fit(changes: dict[str, Any]):
    values = {"format_version": 1, "labels": ["a", "b"], **changes}
    assert problems({"format_version": 1, "labels": ["a", "b"]}) == [] and problems(values)
    with pytest.raises(ValueError, match=r"."):
        LoRAConfig.from_dict(AdapterInfo.from_json(json.dumps(values)).lora or {})


def test_the_schema_has_the_keys_of_the_dataclasses():
    for described, kind in (
        (KEYS, AdapterInfo),
        (KEYS["base_model"]["properties"], BaseModel),
        (KEYS["lora"]["properties"], LoRAConfig),
    ):
        assert set(described) == {entry.name for entry in fields(kind)}
        assert all(entry["description"] for entry in described.values())
    assert set(KEYS["problem_type"]["enum"]) == set(TASKS)
    assert (KEYS["temperature"]["minimum"], KEYS["temperature"]["maximum"]) == TEMPERATURES


def test_the_page_has_a_row_for_each_key():
    page = (REFERENCE / "hf_lora_json.md").read_text(encoding="utf-8")
    for described in (KEYS, KEYS["base_model"]["properties"], KEYS["lora"]["properties"]):
        for name, entry in described.items():
            assert any(
                line.startswith(f"| `{name}` |") and line.endswith(f"| {entry['description']} |")
                for line in page.splitlines()
            ), name
