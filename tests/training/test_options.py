from __future__ import annotations

from dataclasses import fields

from transformers import TrainingArguments

from hf_lora.training import options
from hf_lora.training.arguments import LoRATrainingArguments


def test_the_arguments_are_those_of_transformers_and_the_options() -> None:
    own = [entry.name for entry in fields(options.LoRATrainingOptions)]
    theirs = [entry.name for entry in fields(TrainingArguments)]
    assert [entry.name for entry in fields(LoRATrainingArguments)] == [*theirs, *own]
    assert all(entry.metadata["help"].endswith(".") for entry in fields(options.LoRATrainingOptions))
