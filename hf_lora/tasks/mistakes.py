"""What labelled data say of a classifier beyond its metrics: errors by class, confusion, its worst mistakes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import EvalPrediction

from hf_lora.tasks.calibration import Calibration
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


def findings(
    task: Task,
    labels: Sequence[str],
    calibration: Calibration,
    texts: Sequence[str],
    references: np.ndarray,
    logits: np.ndarray,
    disabled: np.ndarray,
    *,
    mistakes: int,
) -> dict[str, Any]:
    """Errors by class, confusion, reliability and the worst mistakes; what a task has not is empty.

    logits, disabled: `(examples, labels)` with the adapter and with it disabled. mistakes: how many to keep,
    the largest losses first. `wrong` is how many there are in all; `points` of a regression are (truth, given).
    """
    truth = task.truth(references)
    given, without = task.decide(logits, calibration), task.decide(disabled, calibration)
    scaled = logits / calibration.scale
    losses, confidence = task.losses(scaled, references), task.confidence(scaled)
    wrong = different(given, truth) if task.has_classes else np.ones(len(truth), bool)
    worst = [row for row in np.argsort(-losses, kind="stable") if wrong[row]][:mistakes]
    return {
        "classes": errors_beside(given, without, truth, labels) if task.has_classes else {},
        "confusion": task.confusion(truth, given, len(labels)),
        "confusion_disabled": task.confusion(truth, without, len(labels)),
        "calibration": task.reliability(logits, references, calibration),
        "calibration_disabled": task.reliability(disabled, references, calibration),
        "points": () if task.has_classes else list(zip(truth.tolist(), given.tolist(), strict=True)),
        "wrong": int(wrong.sum()),
        "mistakes": [
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
    }
