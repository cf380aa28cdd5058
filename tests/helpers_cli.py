"""What commands read and print, computed without hf_lora."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import safetensors.torch
import sklearn.metrics
import torch
from transformers import AutoModelForSequenceClassification


def read_texts(path: Path) -> tuple[list[str], list[str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [row["text"] for row in rows], [row["label"] for row in rows]


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
