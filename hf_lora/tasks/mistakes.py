"""Results on labelled data: metrics, errors by class, confusion, calibration, and the worst mistakes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import EvalPrediction

from hf_lora.tasks.calibration import Calibration, Reliability
from hf_lora.tasks.metrics import compute_metrics, errors_beside
from hf_lora.tasks.task import Task, different


@dataclass(frozen=True)
class Mistake:
    """An example that is wrong. `confidence`: of what was given; `disabled`: what is given without the adapter."""

    text: str
    truth: str
    given: str
    disabled: str
    loss: float
    confidence: float | None = None


def measurer(
    task: Task, labels: Sequence[str], calibration: Calibration
) -> Callable[[np.ndarray, np.ndarray], dict[str, float]]:
    """The function from outputs `(examples, labels)` and references to the metrics of the calibrated decisions.

    For classification they have the `calibration_error` too.
    """
    compute = compute_metrics(task.name, labels)

    def measure(logits: np.ndarray, references: np.ndarray) -> dict[str, float]:
        metrics = compute(EvalPrediction(calibration.decision_outputs(logits), references))
        found = task.reliability(logits, references, calibration)
        return metrics if found is None else {**metrics, "calibration_error": found.error}

    return measure


@dataclass(frozen=True)
class Evaluation:
    """Results on labelled data with the adapter, and with it disabled. What a task has not is empty.

    classes: by label, `support`, `wrong` and `wrong_disabled`. confusion: `[truth][given]`.
    mistakes: the worst first, `wrong` how many there are in all. points: of a regression, (truth, given).
    """

    task: Task
    labels: Sequence[str]
    examples: int
    metrics: Mapping[str, float]
    metrics_disabled: Mapping[str, float]
    classes: Mapping[str, Mapping[str, int]]
    confusion: Sequence[Sequence[int]]
    confusion_disabled: Sequence[Sequence[int]]
    calibration: Reliability | None
    calibration_disabled: Reliability | None
    points: Sequence[tuple[float, float]]
    wrong: int
    mistakes: Sequence[Mistake]


def evaluate(
    task: Task,
    labels: Sequence[str],
    calibration: Calibration,
    texts: Sequence[str],
    references: np.ndarray,
    logits: np.ndarray,
    disabled: np.ndarray,
    *,
    mistakes: int = 12,
) -> Evaluation:
    """Compare outputs `(examples, labels)`, with the adapter and with it disabled, with the references.

    references: class ids, rows of 0 and 1, or numbers. mistakes: how many to keep, the largest losses first.
    """
    logits, disabled = np.asarray(logits, np.float64), np.asarray(disabled, np.float64)
    references = np.asarray(references)
    measure = measurer(task, labels, calibration)
    truth = task.truth(references)
    given, without = task.decide(logits, calibration), task.decide(disabled, calibration)
    scaled = logits / calibration.scale
    losses, confidence = task.losses(scaled, references), task.confidence(scaled)
    wrong = different(given, truth) if task.has_classes else np.ones(len(truth), bool)
    worst = [row for row in np.argsort(-losses, kind="stable") if wrong[row]][:mistakes]
    return Evaluation(
        task=task,
        labels=labels,
        examples=len(texts),
        metrics=measure(logits, references),
        metrics_disabled=measure(disabled, references),
        classes=errors_beside(given, without, truth, labels) if task.has_classes else {},
        confusion=task.confusion(truth, given, len(labels)),
        confusion_disabled=task.confusion(truth, without, len(labels)),
        calibration=task.reliability(logits, references, calibration),
        calibration_disabled=task.reliability(disabled, references, calibration),
        points=() if task.has_classes else list(zip(truth.tolist(), given.tolist(), strict=True)),
        wrong=int(wrong.sum()),
        mistakes=[
            Mistake(
                texts[row],
                task.shown(truth[row], labels),
                task.shown(given[row], labels),
                task.shown(without[row], labels),
                float(losses[row]),
                None if confidence is None else float(confidence[row]),
            )
            for row in worst
        ],
    )
