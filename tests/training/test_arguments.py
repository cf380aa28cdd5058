from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from hf_lora.tasks import MULTI, SINGLE, task_of
from hf_lora.training.arguments import LoRATrainingArguments, balanced_weights, silent


def test_silent_arguments_train_the_same_and_do_nothing_else(tmp_path: Path) -> None:
    args = LoRATrainingArguments(
        str(tmp_path),
        use_cpu=True,
        eval_strategy="epoch",
        eval_on_start=True,
        save_strategy="epoch",
        load_best_model_at_end=True,
        push_to_hub=True,
        report_to=["tensorboard"],
        learning_rate=3e-3,
    )
    before = args.to_dict()
    quiet = silent(args, lr_scheduler_type="constant", max_steps=7)
    assert args.to_dict() == before
    changed = {name: value for name, value in quiet.to_dict().items() if value != before[name]}
    assert changed == {
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "logging_strategy": "no",
        "push_to_hub": False,
        "report_to": [],
        "lr_scheduler_type": "constant",
        "max_steps": 7,
    }
    # As Trainer compares them.
    assert (quiet.eval_strategy, quiet.save_strategy) == (IntervalStrategy.NO, SaveStrategy.NO)
    assert quiet.logging_strategy is IntervalStrategy.NO
    assert quiet.lr_scheduler_type is SchedulerType.CONSTANT


def test_balanced_weights_are_inverse_frequencies():
    data = Dataset.from_dict({"labels": [0, 0, 0, 1]})
    torch.testing.assert_close(
        balanced_weights(data["labels"], 2, task_of(SINGLE)), torch.tensor([4 / 6, 4 / 2])
    )
    several = Dataset.from_dict({"labels": [[1.0, 0.0], [1.0, 1.0]]})
    torch.testing.assert_close(
        balanced_weights(several["labels"], 2, task_of(MULTI)), torch.tensor([2 / 4, 2 / 2])
    )
    with pytest.raises(ValueError, match="got none of label 2"):
        balanced_weights(data["labels"], 3, task_of(SINGLE))
