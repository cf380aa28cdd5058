"""Helpers for tests of commands: run one, and read what it printed."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import sklearn.metrics
import torch
from transformers import AutoModelForSequenceClassification

from hf_lora.cli import main as cli

Captured = pytest.CaptureFixture[str]
# Oracles compute in fp32, whatever this machine is good at.
FP32 = ("--precision", "fp32")


def call(*argv: object) -> int | str | None:
    """The exit code of `hf-lora argv...`, run in this process."""
    try:
        return cli.main([str(part) for part in argv])
    except SystemExit as exit:
        return exit.code


def run(capsys: Captured, *argv: object) -> str:
    """Standard output of a command that succeeds."""
    assert call(*argv) == 0
    return capsys.readouterr().out


def mistake(capsys: Captured, *argv: object) -> str:
    """The last line on standard error of a command that the user called wrongly."""
    assert call(*argv) == 2
    return capsys.readouterr().err.splitlines()[-1]


def cells(line: str) -> list[str]:
    """The cells of a printed row."""
    return [cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")]


def rows(out: str, title: str = "") -> list[list[str]]:
    """The rows of the printed table that starts with a title; without one, of all tables."""
    part = out[out.index(title) :].split("└")[0] if title else out
    return [cells(line) for line in part.splitlines() if line.startswith("│")]


def table(out: str) -> dict[str, list[str]]:
    """The rows of printed tables: the first cell, and those after it."""
    return {row[0]: row[1:] for row in rows(out)}


def read_texts(path: Path) -> tuple[list[str], list[str]]:
    """The texts and labels of a csv file."""
    with path.open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    return [line["text"] for line in lines], [line["label"] for line in lines]


def head_on_base(base: Path, adapter: Path) -> torch.nn.Module:
    """Plain transformers: the pretrained encoder with the adapter's trained head and no LoRA."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).eval()
    tensors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    model.classifier.weight.data = tensors["base_model.model.classifier.weight"]
    model.classifier.bias.data = tensors["base_model.model.classifier.bias"]
    return model


def scored(logits: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The metrics of a single-label classification into two, from scikit-learn."""
    given = logits.argmax(-1)
    averaged = {"average": "macro", "zero_division": 0}
    return {
        "accuracy": float((given == truth).mean()),
        "f1_macro": sklearn.metrics.f1_score(truth, given, **averaged),
        "f1_weighted": sklearn.metrics.f1_score(truth, given, average="weighted", zero_division=0),
        "precision_macro": sklearn.metrics.precision_score(truth, given, **averaged),
        "recall_macro": sklearn.metrics.recall_score(truth, given, **averaged),
        "matthews_correlation": sklearn.metrics.matthews_corrcoef(truth, given),
        "roc_auc": sklearn.metrics.roc_auc_score(truth, logits[:, 1] - logits[:, 0]),
    }
