"""Runs as `hf-lora train` makes them, small trainers on tiny texts, and scikit-learn's plain regression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import LABELS, write_texts
from helpers_tasks import scaled
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from hf_lora import (
    LoRAConfig,
    LoRATrainer,
    LoRATrainingArguments,
    load_classifier,
)
from hf_lora.cli.train import parse_settings
from hf_lora.data import ClassificationData, DataConfig, prepare_data
from hf_lora.recipe.finetune import Finetuning
from hf_lora.recipe.progress import Lines
from hf_lora.recipe.settings import Recipe


def prepared(
    folder: Path, base: Path, pooling: str = "mean", config: LoRAConfig | None = None, **settings: Any
) -> tuple[LoRATrainer, Any]:
    write_texts(folder / "texts.csv", 60)
    torch.manual_seed(0)
    model, tokenizer = load_classifier(str(base), LABELS, config or LoRAConfig(rank=2), pooling=pooling)
    data = prepare_data(DataConfig(train_file=str(folder / "texts.csv"), max_length=32), tokenizer)
    args = LoRATrainingArguments(
        str(folder / "out"), use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", **settings
    )
    trainer = LoRATrainer(
        model=model,
        args=args,
        train_dataset=data.splits["train"],
        eval_dataset=data.splits["validation"],
        processing_class=tokenizer,
    )
    return trainer, data


def regressions_loss(x: np.ndarray, y: np.ndarray, strength: float) -> float:
    """The loss of a logistic regression on its training set, fitted plainly and to the end by scikit-learn."""
    x = scaled(x, x)
    regression = LogisticRegression(C=strength, max_iter=10_000, tol=1e-10).fit(x, y)
    return float(log_loss(y, regression.predict_proba(x)))


def recipe_of(argv: list[str]) -> Recipe:
    """The recipe that a command line gives."""
    settings = parse_settings(argv)
    del settings["quiet"], settings["dry_run"]
    return Recipe.from_settings(settings)


def run_training(argv: list[str], *, data: ClassificationData | None = None) -> dict[str, Any]:
    """Train as a command line says, with lines that are printed; returns what was written to `metrics.json`."""
    return dict(Finetuning(recipe_of(argv), data=data, progress=Lines()).run().metrics)


def command(base: Path, output: Path, *flags: object) -> list[str]:
    """The flags of a quick run on a tiny encoder, in one precision on every machine."""
    argv = ["--model_name_or_path", base, "--output_dir", output, "--max_seq_length", 32, "--use_cpu", "True"]
    # The probe of these toy texts leaves LoRA nothing to learn; tests/recipe/test_head_start.py is about it.
    argv += ["--precision", "fp32", "--head_init", "random"]
    argv += ["--per_device_train_batch_size", 8, "--num_train_epochs", 1, "--disable_tqdm", "True", *flags]
    return [str(part) for part in argv]
