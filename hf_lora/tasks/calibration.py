"""Calibration: a temperature for probabilities and thresholds for labels, fitted on examples not trained on.

Guo et al. 2017, On Calibration of Modern Neural Networks (arXiv:1706.04599), section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logsumexp, softmax

from hf_lora.adapters.info import PROBLEM_TYPES, AdapterInfo

SINGLE, MULTI, REGRESSION = PROBLEM_TYPES
LOWEST, HIGHEST = 0.05, 20.0
"""The range of fitted temperatures."""
MIN_EXAMPLES = 20
"""Fewer tell too little of how sure a classifier may be."""
MIN_OF_EACH = 5
"""Examples with a label, and without it, that a threshold of its own needs."""
PRIOR = 40.0
"""So many examples with a label, and what was seen counts as much for its threshold as what its scores expect."""
# Scores that differ by rounding are equal: a threshold between them would decide by it.
_DIGITS = 6


def scale_of(info: AdapterInfo) -> float:
    """The temperature that `predict` divides logits by: 1 where none was fitted."""
    return 1.0 if info.temperature is None else info.temperature


def uncalibrated(info: AdapterInfo) -> AdapterInfo:
    """The same without temperature and thresholds."""
    return replace(info, temperature=None, thresholds=None)


def decision_outputs(logits: np.ndarray, info: AdapterInfo) -> np.ndarray:
    """Outputs `(examples, labels)` that decide as `predict` does: by their maximum; for multi-label, by their sign.

    These are the logits less temperature * logit(threshold), which is 0 for a threshold of one half. Without
    thresholds they are the logits themselves, since a temperature changes no decision.
    """
    if info.thresholds is None:
        return logits
    offsets = [math.log(threshold) - math.log1p(-threshold) for threshold in info.thresholds]
    return logits - np.array([scale_of(info) * offset for offset in offsets], logits.dtype)


def fitted(info: AdapterInfo, logits: np.ndarray, references: np.ndarray) -> AdapterInfo:
    """The same with a temperature and, for multi-label, thresholds fitted on outputs `(examples, labels)`.

    Of a regression, or of fewer than 20 examples, it has neither.
    """
    enough = len(logits) >= MIN_EXAMPLES
    temperature = fit_temperature(logits, references, info.problem_type) if enough else None
    info = replace(uncalibrated(info), temperature=temperature)
    if temperature is None or info.problem_type != MULTI:
        return info
    scores = expit(np.asarray(logits, np.float64) / temperature)
    return replace(info, thresholds=fit_thresholds(scores, references))


def fit_temperature(logits: np.ndarray, references: np.ndarray, problem_type: str) -> float | None:
    """The temperature T at which softmax(logits / T), for multi-label the sigmoid, makes the references likeliest.

    logits: `(examples, labels)`; references: class ids `(examples,)` or rows of 0 and 1.
    T is in [0.05, 20], and not so low that the mean confidence passes (n + 1) / (n + 2), which n right ones of n
    allow by the rule of succession: where all are right the likelihood alone would make them certain.
    1 for fewer than 20 examples, and where nothing else is better; None for a regression.
    """
    if problem_type == REGRESSION:
        return None
    if len(logits) < MIN_EXAMPLES:
        return 1.0
    above = _above_the_truth(np.asarray(logits, np.float64), np.asarray(references), problem_type)

    # Functions of 1 / T: the first is convex, the second its derivative, the third grows where T falls.
    def loss(inverse: float) -> float:
        return float(logsumexp(inverse * above, axis=1).mean())

    def slope(inverse: float) -> float:
        return float((softmax(inverse * above, axis=1) * above).sum(1).mean())

    def excess(inverse: float) -> float:
        confidence = softmax(inverse * above, axis=1).max(1).mean()
        return float(confidence) - (len(above) + 1) / (len(above) + 2)

    inverse = _root(slope, 1 / HIGHEST, _root(excess, 1 / HIGHEST, 1 / LOWEST))
    return 1 / inverse if loss(inverse) < loss(1.0) else 1.0


def fit_thresholds(
    probabilities: np.ndarray, references: np.ndarray, prior: float = PRIOR
) -> tuple[float, ...]:
    """For each label the threshold above which it is best given, by its expected F1 on examples like these.

    The best cut of a few examples is a matter of chance, and worse than one half on others (Lipton et al. 2014,
    arXiv:1402.1892). So an example has a label in part as it was seen, and in part by its probability.

    probabilities: calibrated, `(examples, labels)`; references: rows of 0 and 1. prior: with so many examples of
    the label both parts are equal; with 0 only what was seen counts. Thresholds lie in the middle between
    neighbouring scores. One half stays where none is better, and for labels that fewer than 5 examples
    have, or have not; of equally good ones the nearest to one half is taken.
    """
    columns = zip(np.asarray(probabilities, np.float64).T, np.asarray(references).T > 0, strict=True)
    return tuple(_threshold(scores, truth, prior) for scores, truth in columns)


def _above_the_truth(logits: np.ndarray, references: np.ndarray, problem_type: str) -> np.ndarray:
    """How far the logit of each answer is above that of the true one: a row for each decision.

    Of n examples `(n, labels)`; for multi-label `(n * labels, 2)`, the answers being right and wrong.
    """
    if problem_type == MULTI:
        wrong = np.where(references > 0, -logits, logits).ravel()
        return np.stack([np.zeros_like(wrong), wrong], 1)
    return logits - np.take_along_axis(logits, references.astype(int)[:, None], 1)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a growing function is 0 between two bounds, else the bound that is nearer to it."""
    if function(high) <= 0:
        return high
    return low if function(low) >= 0 else float(brentq(function, low, high))


def _threshold(scores: np.ndarray, truth: np.ndarray, prior: float) -> float:
    positives = int(truth.sum())
    if min(positives, len(truth) - positives) < MIN_OF_EACH:
        return 0.5
    scores = scores.round(_DIGITS)
    order = np.argsort(-scores)
    scores, truth = scores[order], truth[order]
    seen = positives / (positives + prior)
    with_label = seen * truth + (1 - seen) * scores
    # Cut i is below the i highest scores, the last one between the lowest and 0; then the one at one half.
    given = np.append(np.arange(1, len(scores) + 1), (scores > 0.5).sum())
    hits = np.append(0.0, with_label.cumsum())[given]
    below = np.append(scores[1:], 0.0)
    cuts = np.append((scores + below) / 2, 0.5)
    f1 = np.where(np.append(scores > below, True), 2 * hits / (given + with_label.sum()), -1)
    best = cuts[f1 == f1.max()]
    return float(best[np.abs(best - 0.5).argmin()])
