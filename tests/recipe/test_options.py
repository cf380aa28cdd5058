"""The one definition of every option."""

from __future__ import annotations

from dataclasses import fields

import pytest
from transformers import TrainingArguments

from hf_lora.recipe.options import (
    COMMON,
    TOPICS,
    TrainingOptions,
    all_options,
    check_names,
    training_defaults,
    transformers_options,
)

ALL = [entry for group in all_options().values() for entry in group]


def test_the_names_read_from_the_source_are_those_of_transformers() -> None:
    assert transformers_options() == {entry.name for entry in fields(TrainingArguments)}


def test_every_option_has_one_definition() -> None:
    names = [entry.name for entry in ALL]
    assert len(names) == len(set(names))
    assert set(names) >= set(COMMON)
    own = {
        entry.name
        for title, owner, _ in TOPICS
        for entry in all_options()[title]
        if owner is not TrainingOptions
    }
    assert not own & transformers_options()


def test_training_options_are_arguments_of_the_trainer_with_another_default() -> None:
    theirs = {entry.name: entry.default for entry in fields(TrainingArguments)}
    assert {entry.name for entry in fields(TrainingOptions)} <= set(theirs)
    assert [name for name, value in training_defaults().items() if theirs[name] == value] == []
    for entry in fields(TrainingOptions):
        described = entry.name not in training_defaults()
        assert not described or entry.name == "output_dir" or entry.default in (theirs[entry.name], None)


@pytest.mark.parametrize("entry", ALL, ids=[entry.name for entry in ALL])
def test_every_option_has_words(entry) -> None:
    assert len(entry.help) > 8 and (entry.help.endswith(".") or ";" in entry.help)


@pytest.mark.parametrize(
    ("name", "near"), [("lora_rnk", "lora_rank"), ("lr", "learning_rate"), ("weight_deca", "weight_decay")]
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"^unknown option {name}; did you mean '{near}'\\?$"):
        check_names([name])
