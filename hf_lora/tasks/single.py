"""One label for each example."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from numpy import ndarray
from scipy.special import log_softmax, softmax
from torch import Tensor

from hf_lora.tasks.calibration import Calibration
from hf_lora.tasks.labels import in_order, is_missing, label_id, label_name, require_labels
from hf_lora.tasks.probe import Fit, Layer, Problem
from hf_lora.tasks.task import SINGLE, Task

# A label without examples gets a bias this far below the lowest one, in log odds.
_ABSENT = 5.0


class SingleLabel(Task):
    """Cross-entropy over the labels; the answer is the label with the largest logit."""

    name = SINGLE
    baseline = "majority class"
    probe = "logistic regression"
    metric_names = (
        *("accuracy", "f1_macro", "f1_weighted", "precision_macro", "recall_macro"),
        *("matthews_correlation", "roc_auc"),
    )
    feature = datasets.Value("int64")
    dtype = int
    activation = staticmethod(partial(torch.softmax, dim=-1))
    one_label = True

    def learn(self, values: Sequence[Any], column: str, declared: tuple[str, ...]) -> tuple[str, ...]:
        require_labels(values, "train", is_missing)
        seen = {label_name(value, "train", row) for row, value in enumerate(values, 1)}
        names = declared or in_order(seen)
        if len(seen) < 2 or len(names) < 2:
            raise ValueError(
                f"the train split has one label only in {column!r}: {min(seen)!r}; expected two or more"
            )
        return names

    def encode(self, values: Sequence[Any], names: Sequence[str], split: str) -> list[int]:
        require_labels(values, split, is_missing)
        ids = {name: index for index, name in enumerate(names)}
        numbered = enumerate(values, 1)
        return [label_id(ids, label_name(value, split, row), split, row) for row, value in numbered]

    def labels_of(self, encoded: Sequence[int], labels: int) -> list[tuple[int, ...]]:
        return [(label,) for label in encoded]

    def sample_labels(self, labels: int) -> Tensor:
        return torch.arange(2) % labels

    def losses(self, logits: ndarray, references: ndarray) -> ndarray:
        return -_of_truth(log_softmax(np.asarray(logits, np.float64), 1), references)[:, 0]

    def quality(self, logits: ndarray, references: ndarray, class_weights: ndarray | None = None) -> ndarray:
        right = (logits.argmax(1) == references).astype(float)
        if class_weights is None:
            return right
        weights = class_weights[references]
        return right * weights / weights.mean()

    def decide(self, logits: ndarray, calibration: Calibration) -> ndarray:
        # Not by the scores: two logits that differ by little may round to one probability.
        return logits.argmax(1)

    def shown(self, decision: int, labels: Sequence[str]) -> str:
        return labels[decision]

    def answer(self, labels: Sequence[str], scores: list[float], decision: int) -> dict[str, Any]:
        return {"label": labels[decision], "score": scores[decision]}

    def ranking(self, logits: ndarray) -> ndarray:
        """The log odds of each class against the rest: they rank as probabilities do, and do not round to 0 and 1."""
        logits = np.asarray(logits, np.float64)
        rows, best = np.arange(len(logits)), logits.argmax(1)
        others = logits.copy()
        others[rows, best] = -np.inf
        with np.errstate(divide="ignore"):  # a class alone has no others
            against_best = np.logaddexp.reduce(others, axis=1)
            whole = np.logaddexp(logits[rows, best], against_best)[:, None]
            # Of the others no probability is above one half, so that 1 - p is computed without cancellation.
            margins = others - whole - np.log1p(-np.exp(others - whole))
        margins[rows, best] = logits[rows, best] - against_best
        return margins

    def constant(self, references: ndarray, labels: int) -> ndarray:
        counts = np.bincount(references.astype(int), minlength=labels)
        return np.log(np.maximum(counts, 0.5) / max(1, counts.sum()))

    def example_weights(self, references: ndarray, class_weights: Sequence[float] | None) -> ndarray:
        if class_weights is None:
            return np.ones(len(references))
        return np.asarray(class_weights, np.float64)[np.asarray(references, int)]

    def probe_fit(self, problem: Problem) -> Fit:
        present = np.unique(problem.targets)
        logistic = problem.logistic()

        def fit(strength: float) -> Layer:
            if len(present) == 1:
                # Nothing to tell apart: certain, as far as the examples go.
                weight, bias = np.zeros((1, problem.features.shape[1])), np.zeros(1)
            else:
                weight, bias = logistic(strength, problem.targets)
            if len(present) == 2:
                # scikit-learn has one row, of the second class: half goes to it, minus half to the first.
                weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
            full = np.zeros((problem.labels, weight.shape[1])), np.full(problem.labels, bias.min() - _ABSENT)
            full[0][present], full[1][present] = weight, bias
            return full

        return fit

    def excess(self, logits: ndarray, references: ndarray) -> ndarray:
        return logits - _of_truth(logits, references)

    def confidences(self, scaled: ndarray, references: ndarray) -> tuple[ndarray, ndarray]:
        return softmax(scaled, 1).max(1), scaled.argmax(1) == references


def _of_truth(values: ndarray, references: ndarray) -> ndarray:
    """The value `(examples, 1)` of each example's true class."""
    return np.take_along_axis(values, np.asarray(references).astype(int)[:, None], 1)
