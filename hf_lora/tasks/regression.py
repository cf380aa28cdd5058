"""A number for each example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from numpy import ndarray
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
    feature = datasets.Value("float32")
    dtype = np.float64
    activation = torch.nn.Identity()
    has_classes = False
    mistakes = "errors"
    wrong_texts = "texts"

    def suits(self, values: Sequence[Any]) -> bool:
        """Floats are numbers. So are strings that are all numbers, not all whole, as a CSV file has them."""
        if any(isinstance(value, float) for value in values):
            return True
        texts = [value for value in values if isinstance(value, str)]
        return all(NUMBER.fullmatch(text.strip()) for text in texts) and not all(map(is_integer, texts))

    def learn(self, values: Sequence[Any], column: str, declared: tuple[str, ...]) -> tuple[str, ...]:
        return (column,)

    def encode(self, values: Sequence[Any], names: Sequence[str], split: str) -> list[float]:
        require_labels(values, split, is_missing)
        return [_number(value, split, row) for row, value in enumerate(values, 1)]

    def sample_labels(self, labels: int) -> Tensor:
        return torch.linspace(0.0, 1.0, 2 * labels).reshape(2, labels).squeeze(-1)

    def losses(self, logits: ndarray, references: ndarray) -> ndarray:
        logits = np.asarray(logits, np.float64)
        return ((logits - np.reshape(references, logits.shape)) ** 2).mean(1)

    def quality(self, logits: ndarray, references: ndarray, class_weights: ndarray | None = None) -> ndarray:
        return -self.losses(logits, references)

    def decide(self, logits: ndarray, calibration: Calibration) -> ndarray:
        return logits[:, 0]

    def truth(self, references: ndarray) -> ndarray:
        return super().truth(references).reshape(-1)

    def shown(self, decision: float, labels: Sequence[str]) -> str:
        return f"{decision:.4g}"

    def answer(self, labels: Sequence[str], scores: list[float], decision: float) -> dict[str, Any]:
        columns = {"label": labels, "score": scores}
        return {name: values[0] if len(scores) == 1 else list(values) for name, values in columns.items()}

    def constant(self, references: ndarray, labels: int) -> ndarray:
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


def _number(value: Any, split: str, row: int) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise bad_label(value, split, row, "expected a finite number for a regression")
    return number
