"""One run of `quality.py` in a process of its own: peft or full fine-tuning with Trainer as they come."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from data_sets import BASE, QualitySet
from sides import accuracy_on, stock_model, stock_peft
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from hf_lora.data import DataConfig, prepare_data
from hf_lora.models.loading import load_tokenizer

EPOCHS, BATCH_SIZE, MAX_LENGTH = 3, 32, 128


# The stock sides: how the model is made, and the learning rate.
STOCK: dict[str, tuple[Callable[[tuple[str, ...]], Any], float]] = {
    "peft": (partial(stock_peft, rank=8, alpha=16, dropout=0.1), 2e-3),
    "full 1e-4": (stock_model, 1e-4),
    "full 5e-5": (stock_model, 5e-5),
}


def run(side: str, data_set: QualitySet, seed: int) -> dict[str, float]:
    """Train on all of the training file and measure on the test file."""
    make, rate = STOCK[side]
    # Stock recipes hold nothing out; the validation split is not looked at.
    files: dict[str, Any] = {**data_set.files(), "validation_file": data_set.test_file}
    tokenizer = load_tokenizer(BASE)
    data = prepare_data(DataConfig(**files, max_length=MAX_LENGTH), tokenizer)
    set_seed(seed)
    model = make(data.labels)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=64,
            learning_rate=rate,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=seed,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=data.splits["train"],
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        accuracy = accuracy_on(trainer, data.splits["test"])
    return {
        "accuracy": accuracy,
        "seconds": seconds,
        "trained": parameters,
        "steps": trainer.state.global_step,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("order", help="JSON: side, data_set, seed")
    order = json.loads(parser.parse_args().order)
    print(json.dumps(run(order["side"], QualitySet(**order["data_set"]), order["seed"])))
