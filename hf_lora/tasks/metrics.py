"""What is measured for each problem type, and the function that the Trainer calls for it.

The metrics themselves are in `metric_classes` and need no network.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import EvalPrediction

from hf_lora._choices import Registry
from hf_lora.tasks.labels import MULTI, REGRESSION, SINGLE
from hf_lora.tasks.metric_classes import (
    CLASS_F1,
    F1,
    METRICS,
    Accuracy,
    ClassErrors,
    LocalMetric,
    MatthewsCorrelation,
    MeanSquaredError,
    Pearson,
    Precision,
    Recall,
    RocAuc,
    Spearman,
    UndefinedMetricError,
    class_errors,
    class_f1,
)

__all__ = [
    "EVALUATIONS",
    "F1",
    "METRICS",
    "Accuracy",
    "ClassErrors",
    "Evaluation",
    "LocalMetric",
    "MatthewsCorrelation",
    "MeanSquaredError",
    "Pearson",
    "Precision",
    "Recall",
    "RocAuc",
    "Spearman",
    "UndefinedMetricError",
    "class_errors",
    "class_errors_beside",
    "class_f1",
    "class_margins",
    "compute_metrics",
    "errors_beside",
    "first_output",
]

logger = logging.getLogger(__name__)


def class_margins(logits: np.ndarray) -> np.ndarray:
    """The log odds `(n, classes)` of each class against the rest, of logits of that shape.

    They rank as the probabilities do, which for large logits are all rounded to 0 and 1.
    """
    logits = np.asarray(logits, np.float64)
    rows, best = np.arange(len(logits)), logits.argmax(1)
    others = logits.copy()
    others[rows, best] = -np.inf
    with np.errstate(divide="ignore"):  # a class alone has no others
        against_best = np.logaddexp.reduce(others, axis=1)
    whole = np.logaddexp(logits[rows, best], against_best)[:, None]
    # Of the others no probability is above one half, so that what is left can be computed from it.
    with np.errstate(divide="ignore"):
        margins = others - whole - np.log1p(-np.exp(others - whole))
    margins[rows, best] = logits[rows, best] - against_best
    return margins


def _single_inputs(logits: np.ndarray, references: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "predictions": logits.argmax(axis=1),
        "prediction_scores": class_margins(logits),
        "references": references.astype(np.int64),
    }


def _multi_inputs(logits: np.ndarray, references: np.ndarray) -> dict[str, np.ndarray]:
    given = logits > 0  # a probability above one half
    return {
        "predictions": given.astype(np.int64),
        "prediction_scores": logits,
        "references": references.astype(np.int64),
    }


def _regression_inputs(logits: np.ndarray, references: np.ndarray) -> dict[str, np.ndarray]:
    return {"predictions": logits[:, 0], "references": references.astype(np.float64).reshape(-1)}


@dataclass(frozen=True)
class Evaluation:
    """What is measured for a problem type, and how logits become the inputs of the metrics."""

    metrics: tuple[str, ...]
    inputs: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]


EVALUATIONS: Registry[str, Evaluation] = Registry("problem type")
EVALUATIONS.register(
    SINGLE,
    Evaluation(
        (
            "accuracy",
            "f1_macro",
            "f1_weighted",
            "precision_macro",
            "recall_macro",
            "matthews_correlation",
            "roc_auc",
        ),
        _single_inputs,
    ),
)
EVALUATIONS.register(
    MULTI,
    Evaluation(
        ("accuracy", "f1_macro", "f1_micro", "precision_micro", "recall_micro", "roc_auc"), _multi_inputs
    ),
)
EVALUATIONS.register(REGRESSION, Evaluation(("pearson", "spearman", "mse"), _regression_inputs))


def compute_metrics(
    problem_type: str, labels: Sequence[str], *, by_class: bool = False
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the function that the Trainer calls with logits `(examples, len(labels))` and label ids.

    by_class: the F1 of every label too, under "class_f1_<label>", as trackers plot them.

    A metric that is undefined for some predictions, such as ROC AUC where a class is absent, is left out of
    their results; the reason is logged once.

    Raises:
        ValueError: the problem type is unknown. The function raises it for logits that are not finite or
            that have another number of columns.
    """
    evaluation = EVALUATIONS.get(problem_type)
    metrics = {name: METRICS.get(name)() for name in evaluation.metrics}
    explained: set[str] = set()

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        references = np.asarray(prediction.label_ids)
        inputs = evaluation.inputs(_logits(prediction.predictions, len(references), len(labels)), references)
        results: dict[str, float] = {}
        for name, metric in metrics.items():
            try:
                results.update(metric.compute(**{key: inputs[key] for key in metric.input_names}))
            except UndefinedMetricError as error:
                if name not in explained:
                    explained.add(name)
                    logger.warning("%s is left out of the results: %s", name, error)
        if by_class and "prediction_scores" in inputs:
            errors = class_errors(inputs["predictions"], inputs["references"], labels)
            results |= {f"{CLASS_F1}{label}": class_f1(counts) for label, counts in errors.items()}
        return results

    return compute


def first_output(predictions: Any) -> Any:
    """Of what a model gives, hidden states or attentions besides, the logits alone."""
    return predictions[0] if isinstance(predictions, (tuple, list)) else predictions


def _logits(predictions: Any, examples: int, outputs: int) -> np.ndarray:
    """Return the logits as float64 `(examples, outputs)`: the first output, where a model has several."""
    logits = np.asarray(first_output(predictions), dtype=np.float64).reshape(examples, -1)
    if logits.shape[1] != outputs:
        raise ValueError(f"the logits have {logits.shape[1]} columns; expected {outputs}, one for each label")
    bad = int((~np.isfinite(logits)).sum())
    if bad:
        raise ValueError(
            f"{bad:,} of {logits.size:,} logits are NaN or infinite; the training diverged; "
            "try a lower learning rate"
        )
    return logits


def class_errors_beside(
    logits: np.ndarray, disabled: np.ndarray, references: np.ndarray, labels: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Errors by class of a classifier and, as "wrong_disabled", of the same one with its adapter disabled.

    logits, disabled: outputs `(examples, len(labels))`; references: class ids `(examples,)`.
    """
    return errors_beside(logits.argmax(-1), disabled.argmax(-1), references, labels)


def errors_beside(
    given: np.ndarray, given_disabled: np.ndarray, references: np.ndarray, labels: Sequence[str]
) -> dict[str, dict[str, int]]:
    """The same of what was decided: class ids, or for multi-label rows of 0 and 1, as `class_errors` takes them."""
    enabled = class_errors(given, references, labels)
    without = class_errors(given_disabled, references, labels)
    return {label: {**enabled[label], "wrong_disabled": without[label]["wrong"]} for label in labels}
