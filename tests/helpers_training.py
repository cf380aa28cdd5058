"""A tiny run of LoRATrainer, for every test that trains one."""

from __future__ import annotations

import os
import signal

import torch
from conftest import tiny_batch, tiny_classifier
from datasets import Dataset
from transformers import (
    TrainerCallback,
)

from hf_lora import (
    LoRAConfig,
    LoRATrainer,
    LoRATrainingArguments,
    inject_lora,
)


def dataset(size=24, num_labels=3, labels=None):
    batch = tiny_batch(size, num_labels=num_labels)
    # The first token tells the label, so that there is something to learn.
    batch["input_ids"][:, 0] = 10 + batch["labels"]
    return Dataset.from_dict(
        {
            "input_ids": batch["input_ids"].tolist(),
            "attention_mask": batch["attention_mask"].tolist(),
            "labels": batch["labels"].tolist() if labels is None else labels,
        }
    )


def arguments(directory, cls=LoRATrainingArguments, **options):
    defaults = {
        "output_dir": str(directory),
        "use_cpu": True,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    return cls(**{**defaults, **options})


def injected(**options):
    model = tiny_classifier("bert", hidden_dropout_prob=0.1)
    torch.manual_seed(1)
    inject_lora(model, LoRAConfig(**{"rank": 4, "dropout": 0.1, **options}))
    return model


def trainer(directory, model=None, train=None, **options):
    data = dataset() if train is None else train
    return LoRATrainer(
        model=model or injected(), args=arguments(directory, **options), train_dataset=data, eval_dataset=data
    )


def assert_same_tensors(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


class Terminate(TrainerCallback):
    """Sends SIGTERM to this process in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
