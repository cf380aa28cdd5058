from __future__ import annotations

import re
from dataclasses import MISSING, fields

import pytest

from hf_lora.data import DataConfig
from hf_lora.recipe.arguments import GROUPS, TRAINING_DEFAULTS, help_text
from hf_lora.training.arguments import LoRATrainingArguments

ALL = [(group, entry) for group in GROUPS for entry in fields(group)]


def block(name: str) -> str:
    """What `train --help` says of one argument."""
    found = re.search(rf"^  --{name}\n((?: {{8}}.*\n?)+)", help_text() + "\n", flags=re.MULTILINE)
    assert found, name
    return " ".join(found.group(1).split())


@pytest.mark.parametrize(("group", "entry"), ALL, ids=[entry.name for _, entry in ALL])
def test_help_has_every_argument_with_text_and_default(group: type, entry) -> None:
    shown = block(entry.name)
    assert shown.startswith(" ".join(entry.metadata["help"].split()))
    if entry.default is MISSING:
        assert shown.endswith("(required)")
    elif entry.default is not None:
        assert shown.endswith(f"(default: {entry.default})")


@pytest.mark.parametrize(
    "name",
    [
        "head_learning_rate",
        "lora_plus_ratio",
        "class_weights",
        "max_tokens_per_batch",
        "cache_frozen_prefix",
        "frozen_prefix_cache_gb",
    ],
)
def test_help_has_our_own_training_arguments(name: str) -> None:
    assert name in {entry.name for entry in fields(LoRATrainingArguments)}
    assert len(block(name)) > 20


def test_help_tells_output_dir_and_resuming() -> None:
    assert block("output_dir").endswith("(required)")
    assert "last one" in block("resume_from_checkpoint")


def test_help_shows_our_defaults_of_training_arguments() -> None:
    known = {entry.name for entry in fields(LoRATrainingArguments)}
    lines = help_text().splitlines()
    for name, value in TRAINING_DEFAULTS.items():
        # Rate and epochs are chosen from the data, and the help says how.
        assert name in ("learning_rate", "num_train_epochs") or f"  --{name} (default: {value})" in lines
        assert name in known
    assert any("2 if they make 200 steps" in line for line in lines)
    assert any("the root of their number" in line for line in lines)


def test_no_name_is_taken_twice() -> None:
    names = [entry.name for _, entry in ALL] + [entry.name for entry in fields(LoRATrainingArguments)]
    assert [name for name in names if names.count(name) > 1] == []


def test_data_arguments_are_fields_of_data_config() -> None:
    [data] = [group for group in GROUPS if group.__name__ == "DataArguments"]
    names = {entry.name for entry in fields(data)} - {"max_seq_length", "split_seed"} | {"max_length"}
    assert names | {"seed", "cache_dir", "token"} == {entry.name for entry in fields(DataConfig)}


def test_data_defaults_are_those_of_data_config() -> None:
    [data] = [group for group in GROUPS if group.__name__ == "DataArguments"]
    library = {entry.name: entry.default for entry in fields(DataConfig)}
    library["split_seed"] = None  # the run's own seed
    for entry in fields(data):
        assert entry.default == library[entry.name.replace("max_seq_length", "max_length")], entry.name
