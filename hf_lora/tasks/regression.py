"""A number for each example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from hf_lora.tasks.calibration import Calibration
from hf_lora.tasks.labels import NUMBER, bad_label, is_integer, is_missing, require_labels
from hf_lora.tasks.probe import Fit, Layer, Problem
from hf_lora.tasks.task import REGRESSION, Task


class Regression(Task):
    """The squared error; the answer is the output. Its one label name is that of the label column."""

    name = REGRESSION
    baseline = "mean predictor"
    probe = "ridge regression"
    metric_names = ("pearson", "spearman", "mse")
    default_metric = "pearson"
    feature = datasets.Value("float32")
    has_classes = False
    mistakes = "errors"
    wrong_texts = "texts"

    def suits(self, values: Sequence[Any]) -> bool:
        """Floats are numbers. So are strings that are all numbers, not all whole, as a CSV file has them."""
        if any(isinstance(value, float) for value in values):
            return True
        texts = [value for value in values if isinstance(value, str)]
        return (
            bool(texts)
            and all(map(NUMBER.fullmatch, map(str.strip, texts)))
            and not all(map(is_integer, texts))
        )

    def learn(self, values: Sequence[Any], column: str, declared: tuple[str, ...]) -> tuple[str, ...]:
        return (column,)

    def encode(self, values: Sequence[Any], names: Sequence[str], split: str) -> list[float]:
        require_labels(values, split, is_missing)
        return [_number(value, split, row) for row, value in enumerate(values, 1)]

    def sample_labels(self, labels: int) -> Tensor:
        return torch.linspace(0.0, 1.0, 2 * labels).reshape(2, labels).squeeze(-1)

    def losses(self, logits: np.ndarray, references: np.ndarray) -> np.ndarray:
        logits = np.asarray(logits, np.float64)
        return ((logits - np.reshape(references, logits.shape)) ** 2).mean(1)

    def quality(
        self, logits: np.ndarray, references: np.ndarray, class_weights: np.ndarray | None = None
    ) -> np.ndarray:
        return -self.losses(logits, references)

    def decide(self, logits: np.ndarray, calibration: Calibration) -> np.ndarray:
        return logits[:, 0]

    def scores(self, scaled: Tensor) -> Tensor:
        return scaled

    def answer(self, labels: Sequence[str], scores: list[float], decision: float) -> dict[str, Any]:
        one = len(scores) == 1
        return {"label": labels[0] if one else list(labels), "score": scores[0] if one else scores}

    def metric_inputs(self, logits: np.ndarray, references: np.ndarray) -> dict[str, np.ndarray]:
        return {"predictions": logits[:, 0], "references": self.truth(references)}

    def constant(self, references: np.ndarray, labels: int) -> np.ndarray:
        return references.reshape(len(references), labels).astype(float).mean(0)

    def probe_fit(self, problem: Problem) -> Fit:
        from sklearn.linear_model import Ridge

        values = np.asarray(problem.targets, np.float64).reshape(len(problem.targets), problem.labels)

        def fit(strength: float) -> Layer:
            model = Ridge(alpha=1.0 / strength, fit_intercept=problem.intercept)
            model.fit(problem.features, values, sample_weight=problem.weights)
            weight = np.reshape(model.coef_, (problem.labels, -1))
            return weight, np.broadcast_to(model.intercept_, problem.labels)

        return fit

    def truth(self, references: np.ndarray) -> np.ndarray:
        return references.astype(np.float64).reshape(-1)

    def shown(self, decision: float, labels: Sequence[str]) -> str:
        return f"{decision:.4g}"


def _number(value: Any, split: str, row: int) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(bad_label(value, split, row, "expected a finite number for a regression"))
    return number
