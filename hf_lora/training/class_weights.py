"""Weights of the classes in the loss, from what the user asked for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def class_weights(text: str | None, dataset: Any, count: int, problem_type: str | None) -> Tensor | None:
    """The weights `(count,)` that `text` asks for: "balanced", or one number for each label.

    The training loss is the mean over the examples of weight times loss, as with scikit-learn's class weights.
    None where none were asked for. Raises ValueError for a regression and for unusable numbers.
    """
    if text is None:
        return None
    if problem_type == "regression":
        raise ValueError("class_weights cannot be used for regression, which has no classes")
    if text == "balanced":
        return balanced_weights(dataset, count)
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    usable = all(weight >= 0 and math.isfinite(weight) for weight in weights) and any(weights)
    if len(weights) != count or not usable:
        raise ValueError(
            f"class_weights is not usable; got {text!r}; expected 'balanced' or {count} numbers from 0 up, not all 0"
        )
    return torch.tensor(weights)


def balanced_weights(dataset: Any, count: int) -> Tensor:
    """Inverse class frequencies with mean 1 over the examples: n / (classes * n_class), shape `(count,)`.

    For multi-label data a class's examples are those that carry the label.
    """
    labels = dataset["labels"]
    counts: Mapping[int, int] = Counter(
        index
        for label in labels
        for index in ([i for i, on in enumerate(label) if on] if isinstance(label, list) else [int(label)])
    )
    absent = [index for index in range(count) if counts[index] == 0]
    if absent:
        raise ValueError(
            f"class_weights='balanced' needs examples of every label; got none of label {absent[0]}"
        )
    return torch.tensor([len(labels) / (count * counts[index]) for index in range(count)])
