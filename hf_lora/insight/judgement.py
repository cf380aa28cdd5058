"""What labelled data say of a classifier beyond its metrics: confusion, calibration, its worst mistakes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import softmax
from transformers import EvalPrediction

from hf_lora.adapters.info import AdapterInfo
from hf_lora.tasks.calibration import decision_outputs, scale_of
from hf_lora.tasks.labels import MULTI, REGRESSION, SINGLE
from hf_lora.tasks.losses import example_losses
from hf_lora.tasks.metrics import class_errors_beside, compute_metrics, errors_beside

BINS = 15
"""Bins of the expected calibration error, as in Guo et al. 2017."""


@dataclass(frozen=True)
class Bin:
    """The predictions whose confidence is in (low, high]: how many, their mean confidence, their accuracy."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """How well confidence tells accuracy; `bins` has those that are not empty."""

    bins: tuple[Bin, ...]
    error: float
    """The expected calibration error: the mean of |accuracy - confidence| of the bins, weighted by their counts."""
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Mistake:
    """An example that is wrong. `confidence`: of what was given; `disabled`: what is given without the adapter."""

    text: str
    truth: str
    given: str
    disabled: str
    loss: float
    confidence: float | None = None


@dataclass(frozen=True)
class Judgement:
    """Results on labelled data with the adapter, and with it disabled. What a problem type has not is empty.

    classes: by label, `support`, `wrong` and `wrong_disabled`. confusion: `[truth][given]`.
    mistakes: the worst first, `wrong` how many there are in all. points: of a regression, (truth, given).
    """

    examples: int
    metrics: Mapping[str, float]
    metrics_disabled: Mapping[str, float]
    classes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    confusion: Sequence[Sequence[int]] = ()
    confusion_disabled: Sequence[Sequence[int]] = ()
    calibration: Calibration | None = None
    calibration_disabled: Calibration | None = None
    mistakes: Sequence[Mistake] = ()
    wrong: int = 0
    points: Sequence[tuple[float, float]] = ()


def judge(
    info: AdapterInfo,
    texts: Sequence[str],
    references: np.ndarray,
    logits: np.ndarray,
    disabled: np.ndarray,
    *,
    mistakes: int = 12,
) -> Judgement:
    """Compare outputs `(examples, labels)`, with the adapter and with it disabled, with the references.

    info: labels, problem type and calibration, with which `predict` makes answers of the outputs.
    references: class ids, rows of 0 and 1, or numbers. mistakes: how many of the worst to keep.
    """
    measure = measurer(info)
    both = [np.asarray(outputs, np.float64) for outputs in (logits, disabled)]
    return Judgement(
        examples=len(texts),
        metrics=measure(both[0], references),
        metrics_disabled=measure(both[1], references),
        **_JUDGES[info.problem_type](info, texts, np.asarray(references), *both, mistakes),
    )


def measurer(info: AdapterInfo) -> Callable[[np.ndarray, np.ndarray], dict[str, float]]:
    """The function from outputs `(examples, labels)` and references to the metrics of what `predict` decides by them.

    For classification they have the `calibration_error` too.
    """
    compute = compute_metrics(info.problem_type, info.labels)

    def measure(logits: np.ndarray, references: np.ndarray) -> dict[str, float]:
        metrics = compute(EvalPrediction(decision_outputs(logits, info), references))
        found = calibration_of(info, logits, references)
        return metrics if found is None else {**metrics, "calibration_error": found.error}

    return measure


def calibration_of(info: AdapterInfo, logits: np.ndarray, references: np.ndarray) -> Calibration | None:
    """How well the probabilities that `predict` gives tell what is right; None for a regression.

    For multi-label every label of every text is a prediction, of the likelier of having it and not having it:
    thresholds decide otherwise at times, and leave the probabilities as they are.
    """
    scaled, references = np.asarray(logits, np.float64) / scale_of(info), np.asarray(references)
    if info.problem_type == SINGLE:
        return calibration(softmax(scaled, 1).max(1), scaled.argmax(1) == references)
    if info.problem_type == MULTI:
        likelier = 1 / (1 + np.exp(-np.abs(scaled.ravel())))
        return calibration(likelier, ((scaled > 0) == (references > 0)).ravel())
    return None


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Calibration:
    """Compare confidences `(predictions,)` in [0, 1] with whether the predictions are right, in bins of equal width."""
    # Bin b holds ((b - 1) / bins, b / bins], the first one 0 too.
    index = np.clip(np.ceil(confidence * bins).astype(int), 1, bins) - 1
    found = []
    for number in range(bins):
        inside = index == number
        if inside.any():
            means = float(confidence[inside].mean()), float(correct[inside].mean())
            found.append(Bin(number / bins, (number + 1) / bins, int(inside.sum()), *means))
    error = sum(entry.count * abs(entry.accuracy - entry.confidence) for entry in found) / max(
        1, len(confidence)
    )
    return Calibration(tuple(found), error, float(confidence.mean()), float(correct.mean()))


def confusion_matrix(references: np.ndarray, given: np.ndarray, classes: int) -> list[list[int]]:
    """How often each class `[truth]` was taken for each `[given]`."""
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (references, given), 1)
    return counts.tolist()


def _single(
    info: AdapterInfo,
    texts: Sequence[str],
    references: np.ndarray,
    logits: np.ndarray,
    disabled: np.ndarray,
    mistakes: int,
) -> dict[str, Any]:
    references = references.astype(int)
    labels, scaled = info.labels, logits / scale_of(info)
    given, without = logits.argmax(1), disabled.argmax(1)
    losses = example_losses(scaled, references, SINGLE)
    confidence = softmax(scaled, 1).max(1)
    wrong = given != references
    return {
        "classes": class_errors_beside(logits, disabled, references, labels),
        "confusion": confusion_matrix(references, given, len(labels)),
        "confusion_disabled": confusion_matrix(references, without, len(labels)),
        "calibration": calibration_of(info, logits, references),
        "calibration_disabled": calibration_of(info, disabled, references),
        "wrong": int(wrong.sum()),
        "mistakes": [
            Mistake(
                texts[row],
                labels[references[row]],
                labels[given[row]],
                labels[without[row]],
                float(losses[row]),
                float(confidence[row]),
            )
            for row in _worst(losses, wrong, mistakes)
        ],
    }


def _multi(
    info: AdapterInfo,
    texts: Sequence[str],
    references: np.ndarray,
    logits: np.ndarray,
    disabled: np.ndarray,
    mistakes: int,
) -> dict[str, Any]:
    truth = references.astype(bool)
    given, without = decision_outputs(logits, info) > 0, decision_outputs(disabled, info) > 0
    losses = example_losses(logits / scale_of(info), truth, MULTI)
    wrong = (given != truth).any(1)

    def names(row: np.ndarray) -> str:
        return ", ".join(label for label, has in zip(info.labels, row, strict=True) if has) or "(none)"

    return {
        "classes": errors_beside(given, without, truth, info.labels),
        "calibration": calibration_of(info, logits, references),
        "calibration_disabled": calibration_of(info, disabled, references),
        "wrong": int(wrong.sum()),
        "mistakes": [
            Mistake(texts[row], names(truth[row]), names(given[row]), names(without[row]), float(losses[row]))
            for row in _worst(losses, wrong, mistakes)
        ],
    }


def _regression(
    info: AdapterInfo,
    texts: Sequence[str],
    references: np.ndarray,
    logits: np.ndarray,
    disabled: np.ndarray,
    mistakes: int,
) -> dict[str, Any]:
    truth, given = references.astype(float).reshape(-1), logits[:, 0]
    losses = example_losses(logits[:, :1], truth, REGRESSION)
    return {
        "points": list(zip(truth.tolist(), given.tolist(), strict=True)),
        "wrong": len(truth),
        "mistakes": [
            Mistake(
                texts[row],
                f"{truth[row]:.4g}",
                f"{given[row]:.4g}",
                f"{disabled[row, 0]:.4g}",
                float(losses[row]),
            )
            for row in _worst(losses, np.ones(len(truth), bool), mistakes)
        ],
    }


_JUDGES: dict[str, Callable[..., dict[str, Any]]] = {SINGLE: _single, MULTI: _multi, REGRESSION: _regression}


def _worst(losses: np.ndarray, among: np.ndarray, count: int) -> list[int]:
    """The rows `among` with the largest losses, the largest first; equal ones in order of the texts."""
    return [int(row) for row in np.argsort(-losses, kind="stable") if among[row]][:count]
