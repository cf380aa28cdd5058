"""Whole training runs: hf_lora, peft with Trainer (stock, and with its best public settings), full fine-tuning, bound.

    python scripts/benchmarks/training.py --json training.json            # a sample of the data, two rounds
    python scripts/benchmarks/training.py --full --rounds 3 --json all.json   # all of it, three seeds, accuracy

Every run is a process of its own, and the sides take turns: A B C A B C. The same examples, optimizer steps and
hyperparameters everywhere (but the learning rate of full fine-tuning); each round has another seed.
Then five epochs of the top two blocks, with and without the frozen prefix kept.
Seconds are those of the training alone, without loading and evaluation. Short texts are Amazon reviews where
HF_LORA_DATA names their folder, else sentences of BBC News.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from data_sets import BASE, DataSet, data_sets
from harness import (
    add_output_arguments,
    in_process,
    machine,
    peak_mb,
    report,
    resident_mb,
    summary,
    write_json,
)
from sides import accuracy_on, stock_model, stock_peft
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from hf_lora import LoRAConfig, LoRATrainer, LoRATrainingArguments, load_classifier
from hf_lora.data import ClassificationData
from hf_lora.models.loading import choose_precision, load_tokenizer

RANK, ALPHA, DROPOUT, RATE, FULL_RATE = 8, 16, 0.1, 2e-3, 1e-4
GROUPED = {"train_sampling_strategy": "group_by_length"}
Made = tuple[Any, type[Trainer], type[TrainingArguments], dict[str, Any]]


def hf_lora_side(labels: tuple[str, ...]) -> Made:
    """As `hf-lora train` does by default: bf16 where the hardware is good at it, batches of similar length."""
    config = LoRAConfig(rank=RANK, alpha=ALPHA, dropout=DROPOUT)
    model, _ = load_classifier(BASE, labels, config, dtype=choose_precision().dtype)
    return model, LoRATrainer, LoRATrainingArguments, GROUPED


def hf_lora_fp32_side(labels: tuple[str, ...]) -> Made:
    """hf_lora in fp32 and with random batches: the kernels alone."""
    model, _ = load_classifier(BASE, labels, LoRAConfig(rank=RANK, alpha=ALPHA, dropout=DROPOUT))
    return model, LoRATrainer, LoRATrainingArguments, {}


def _top_blocks(labels: tuple[str, ...], **settings: Any) -> Made:
    config = LoRAConfig(rank=RANK, alpha=ALPHA, dropout=DROPOUT, layers=(-2, -1))
    model, _ = load_classifier(BASE, labels, config, dtype=choose_precision().dtype)
    return model, LoRATrainer, LoRATrainingArguments, {**GROUPED, **settings}


def top_blocks_side(labels: tuple[str, ...]) -> Made:
    """hf_lora on the top two blocks."""
    return _top_blocks(labels)


def top_blocks_cached_side(labels: tuple[str, ...]) -> Made:
    """The same with the output of the blocks below kept in memory."""
    return _top_blocks(labels, cache_frozen_prefix="memory")


def _peft(labels: tuple[str, ...]) -> Any:
    return stock_peft(labels, rank=RANK, alpha=ALPHA, dropout=DROPOUT)


def peft_side(labels: tuple[str, ...]) -> Made:
    """peft with Trainer as they come."""
    return _peft(labels), Trainer, TrainingArguments, {}


def peft_best_side(labels: tuple[str, ...]) -> Made:
    """peft with Trainer's best public settings."""
    return _peft(labels), Trainer, TrainingArguments, {"bf16": True, **GROUPED}


def full_side(labels: tuple[str, ...]) -> Made:
    """Full fine-tuning with Trainer as it comes."""
    return stock_model(labels), Trainer, TrainingArguments, {"learning_rate": FULL_RATE}


def bound_side(labels: tuple[str, ...]) -> Made:
    """The frozen network in fp32 with activation gradients and a trained head: no adapters."""
    model = stock_model(labels)
    model.base_model.requires_grad_(False)
    model.base_model.embeddings.register_forward_hook(lambda *given: given[-1].detach().requires_grad_())
    return model, Trainer, TrainingArguments, {}


SIDES: dict[str, Callable[[tuple[str, ...]], Made]] = {
    "hf_lora": hf_lora_side,
    "peft": peft_side,
    "peft_best": peft_best_side,
    "hf_lora_fp32": hf_lora_fp32_side,
    "full": full_side,
    "bound": bound_side,
    "top_2": top_blocks_side,
    "top_2_cached": top_blocks_cached_side,
}
DEFAULT_SIDES = ["hf_lora", "peft", "peft_best", "full", "bound"]
PREFIX_SIDES, PREFIX_EPOCHS = ["top_2", "top_2_cached"], 5


def run(side: str, data_set: DataSet, seed: int, examples: int | None, epochs: float) -> dict[str, float]:
    """Train one side in this process; its seconds, memory, and the accuracy on the texts held out."""
    tokenizer = load_tokenizer(BASE)
    data = data_set.prepare(tokenizer, seed=seed, examples=examples)
    set_seed(seed)
    model, trainer_type, arguments_type, settings = SIDES[side](data.labels)
    with tempfile.TemporaryDirectory() as folder:
        arguments = arguments_type(
            **{
                "output_dir": folder,
                "per_device_train_batch_size": data_set.batch_size,
                "per_device_eval_batch_size": 64,
                "num_train_epochs": epochs,
                "learning_rate": RATE,
                "warmup_steps": 0.06,
                "logging_steps": 20,
                "save_strategy": "no",
                "disable_tqdm": True,
                "use_cpu": True,
                "dataloader_pin_memory": False,
                "seed": seed,
                **settings,
            }
        )
        trainer = trainer_type(
            model=model,
            args=arguments,
            train_dataset=data.splits["train"],
            processing_class=tokenizer,
            data_collator=None if trainer_type is LoRATrainer else DataCollatorWithPadding(tokenizer),
        )
        gc.collect()
        before = resident_mb()
        metrics = trainer.train().metrics
        peak = peak_mb()
        accuracy = None if examples else _accuracy(trainer, data)
    return {
        "seconds": metrics["train_runtime"],
        "steps": trainer.state.global_step,
        "peak_mb": peak,
        "training_mb": peak - before,
        "loss": metrics["train_loss"],
        "accuracy": accuracy,
    }


def _accuracy(trainer: Trainer, data: ClassificationData) -> float:
    return accuracy_on(trainer, data.splits["test" if "test" in data.splits else "validation"])


def main() -> None:
    """Run the sides in turns, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_output_arguments(parser)
    parser.add_argument(
        "--rounds", type=int, default=2, help="runs of each side, each with its seed (default: 2)"
    )
    parser.add_argument(
        "--sides", nargs="+", default=DEFAULT_SIDES, choices=SIDES, help=f"default: {' '.join(DEFAULT_SIDES)}"
    )
    parser.add_argument(
        "--examples", type=int, default=320, help="training examples of a sample (default: 320)"
    )
    parser.add_argument("--full", action="store_true", help="all examples, and the accuracy on the test")
    parser.add_argument("--epochs", type=float, default=1.0, help="default: 1")
    parser.add_argument("--no_prefix", action="store_true", help="leave the frozen prefix out")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        order = json.loads(options.run)
        data_set = DataSet(**order.pop("data_set"))
        print(json.dumps(run(data_set=data_set, **order)))
        return
    table = report(options)
    result: dict[str, Any] = {
        "machine": machine(),
        "settings": {
            "rank": RANK,
            "alpha": ALPHA,
            "dropout": DROPOUT,
            "learning_rate": RATE,
            "full": options.full,
        },
        "sets": {},
    }
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        sets = data_sets(Path(folder))
        for data_set in sets:
            measured = compare(data_set, options, options.sides, options.epochs)
            result["sets"][data_set.name] = measured
            table(f"{data_set.name}: one run", HEADER, rows(measured))
        if not options.no_prefix:
            result["prefix"] = compare(sets[0], options, PREFIX_SIDES, PREFIX_EPOCHS)
            ratios = [
                cached["seconds"] / plain["seconds"]
                for plain, cached in zip(*result["prefix"]["runs"].values(), strict=True)
            ]
            result["prefix"]["cached_to_plain"] = median(ratios)
            table(
                f"{sets[0].name}: top 2 blocks, {PREFIX_EPOCHS} epochs",
                ("side", "seconds", "cached to plain"),
                [
                    (side, f"{result['prefix']['seconds'][side]['median']:.1f}", ratio)
                    for side, ratio in zip(PREFIX_SIDES, (None, f"{median(ratios):.2f}"), strict=True)
                ],
            )
    write_json(options.json, result)


def compare(
    data_set: DataSet, options: argparse.Namespace, sides: Sequence[str], epochs: float
) -> dict[str, Any]:
    """All rounds of the sides on one data set, with medians and ratios to stock peft."""
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for seed in range(options.rounds):
        for side in sides:
            order = {
                "side": side,
                "data_set": vars(data_set),
                "seed": seed,
                "examples": None if options.full else options.examples,
                "epochs": epochs,
            }
            runs[side].append(in_process([sys.executable, __file__, "--run", json.dumps(order)]))
            print(f"{data_set.name}, seed {seed}, {side}: {runs[side][-1]}", file=sys.stderr, flush=True)
    measured: dict[str, Any] = {"runs": runs}
    for figure in ("seconds", "peak_mb", "training_mb"):
        values = {side: [one[figure] for one in runs[side]] for side in runs}
        measured[figure] = summary(values, reference="peft" if "peft" in runs else None)
        if "peft_best" in runs:
            best = summary(values, reference="peft_best")
            measured[f"{figure}_to_peft_best"] = {side: best[side]["ratio"] for side in runs}
    if options.full:
        measured["accuracy"] = {
            side: float(np.mean([one["accuracy"] for one in runs[side]])) for side in runs
        }
    return measured


HEADER = (
    "side",
    "seconds",
    "to peft",
    "to peft_best",
    "peak MB",
    "to peft",
    "training MB",
    "to peft",
    "accuracy",
)


def rows(measured: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The table's lines."""
    best = measured.get("seconds_to_peft_best", {})
    return [
        (
            side,
            *_cells(measured["seconds"][side], ".1f"),
            f"{best[side]:.2f}" if best else None,
            *_cells(measured["peak_mb"][side], ".0f"),
            *_cells(measured["training_mb"][side], ".0f"),
            f"{measured['accuracy'][side]:.4f}" if "accuracy" in measured else None,
        )
        for side in measured["runs"]
    ]


def _cells(entry: dict[str, float], form: str) -> tuple[str, str | None]:
    ratio = entry.get("ratio")
    return format(entry["median"], form), None if ratio is None else f"{ratio:.2f}"


if __name__ == "__main__":
    main()
