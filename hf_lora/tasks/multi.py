"""Any number of labels for each example."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import datasets
import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from hf_lora.tasks.calibration import Calibration
from hf_lora.tasks.labels import bad_label, in_order, label_id, label_name, require_labels
from hf_lora.tasks.layouts import split_names
from hf_lora.tasks.probe import Fit, Layer, Problem
from hf_lora.tasks.task import MULTI, Task


class MultiLabel(Task):
    """Binary cross-entropy for each label; a label is given where its probability is above its threshold."""

    name = MULTI
    baseline = "majority class"
    probe = "a logistic regression for each label"
    metric_names = ("accuracy", "f1_macro", "f1_micro", "precision_micro", "recall_micro", "roc_auc")
    feature = datasets.List(datasets.Value("float32"))
    dtype = bool
    activation = staticmethod(torch.sigmoid)
    has_thresholds = True
    missed = "Texts that have the label and were not given it"
    confidence_of = (
        "the probability of what was given (for every label of every text, of the likelier of having it and "
        "not)"
    )

    def suits(self, values: Sequence[Any]) -> bool:
        return any(isinstance(value, list | tuple) for value in values)

    def learn(self, values: Sequence[Any], column: str, declared: tuple[str, ...]) -> tuple[str, ...]:
        rows = _name_lists(values, "train")
        names = declared or in_order({name for row in rows for name in row})
        if len(names) < 2:
            raise ValueError(f"the train split has {len(names)} labels in {column!r}; expected two or more")
        if all(len(row) == len(names) for row in rows):
            raise ValueError(
                f"every example of the train split has all {len(names)} labels of {column!r}, so that there is nothing "
                "to learn; expected lists of the labels that an example has"
            )
        return names

    def encode(self, values: Sequence[Any], names: Sequence[str], split: str) -> list[list[float]]:
        ids = {name: index for index, name in enumerate(names)}
        vectors = []
        for row, labels in enumerate(_name_lists(values, split), 1):
            given = {label_id(ids, label, split, row) for label in labels}
            vectors.append([float(index in given) for index in range(len(names))])
        return vectors

    def labels_of(self, encoded: Sequence[Sequence[float]], labels: int) -> list[tuple[int, ...]]:
        return [tuple(np.flatnonzero(vector).tolist()) or (labels,) for vector in encoded]

    def sample_labels(self, labels: int) -> Tensor:
        return torch.eye(labels)[torch.arange(2) % labels]

    def losses(self, logits: ndarray, references: ndarray) -> ndarray:
        logits = np.asarray(logits, np.float64)
        # In a form that does not overflow.
        return (np.logaddexp(0, logits) - logits * references).mean(1)

    def quality(self, logits: ndarray, references: ndarray, class_weights: ndarray | None = None) -> ndarray:
        return np.average((logits > 0) == (references > 0.5), axis=1, weights=class_weights)

    def decide(self, logits: ndarray, calibration: Calibration) -> ndarray:
        return calibration.decision_outputs(logits) > 0

    def shown(self, decision: ndarray, labels: Sequence[str]) -> str:
        return ", ".join(label for label, has in zip(labels, decision, strict=True) if has) or "(none)"

    def answer(self, labels: Sequence[str], scores: list[float], decision: list[bool]) -> dict[str, Any]:
        columns = {"label": labels, "score": scores}
        return {name: list(compress(values, decision)) for name, values in columns.items()}

    def constant(self, references: ndarray, labels: int) -> ndarray:
        with_label = (references > 0.5).sum(0)
        return np.log((with_label + 0.5) / (len(references) - with_label + 0.5))

    def probe_fit(self, problem: Problem) -> Fit:
        columns = [problem.targets[:, label] > 0.5 for label in range(problem.labels)]
        models = [problem.logistic() for _ in columns]

        def fit(strength: float) -> Layer:
            weight, bias = np.zeros((problem.labels, problem.features.shape[1])), np.zeros(problem.labels)
            for label, (logistic, column) in enumerate(zip(models, columns, strict=True)):
                if not column.all() and column.any():
                    weight[[label]], bias[[label]] = logistic(strength, column)
                elif problem.intercept:
                    # The log odds with one example of either kind more, so that they are finite.
                    bias[label] = np.log((column.sum() + 1) / ((~column).sum() + 1))
            return weight, bias

        return fit

    def excess(self, logits: ndarray, references: ndarray) -> ndarray:
        """Of each label of each example `(examples * labels, 2)`: the right answer, and the wrong one."""
        wrong = np.where(references > 0, -logits, logits).ravel()
        return np.stack([np.zeros_like(wrong), wrong], 1)

    def confidences(self, scaled: ndarray, references: ndarray) -> tuple[ndarray, ndarray]:
        """Of the likelier of having a label and not; thresholds do not change probabilities."""
        return 1 / (1 + np.exp(-np.abs(scaled.ravel()))), ((scaled > 0) == (references > 0)).ravel()


def _name_lists(values: Sequence[Any], split: str) -> list[list[str]]:
    """The label names of each row; texts are understood by `split_names`."""
    require_labels(values, split, lambda value: value is None)
    rows = []
    for row, (value, parts) in enumerate(zip(values, split_names(values, split)[0], strict=True), 1):
        if not isinstance(parts, list | tuple):
            raise bad_label(value, split, row, "expected a list of labels for a multi-label problem")
        names = [label_name(part, split, row) for part in parts if part != ""]
        if len(set(names)) < len(names):
            hint = "it has a label twice; expected names or ids of labels, not a vector of 0 and 1"
            raise bad_label(value, split, row, hint)
        rows.append(names)
    return rows
