"""Calibration: a temperature for probabilities and thresholds for labels, and how well confidence matches accuracy.

Guo et al. 2017, On Calibration of Modern Neural Networks (arXiv:1706.04599), section 4.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy import ndarray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

TEMPERATURES = (1e-3, 1e3)
"""The temperatures that an adapter may have: those outside make certainties or nothing of any logits."""
LOWEST, HIGHEST = 0.05, 20.0
"""The range of fitted temperatures."""
FLATTER, SHARPER = 0.5, 0.1
"""How far log T is expected to be from 0, above and below: chosen on four data sets at 100 and 400 examples."""
MIN_EXAMPLES = 20
"""Fewer examples do not tell how sure a classifier may be."""
MIN_OF_EACH = 5
"""Examples with a label, and without it, that a threshold of its own needs."""
PRIOR = 40.0
"""With so many examples of a label, its threshold depends as much on what was seen as on the probabilities."""
# Scores that differ by rounding are equal: a threshold between them would decide by it.
_DIGITS = 6


@dataclass(frozen=True)
class Calibration:
    """What was fitted on validation data.

    temperature: logits are divided by it before the softmax or sigmoid; None, as of a regression: 1.
    thresholds: of a multi-label classifier, the probability above which each label is given; None: 0.5.
    """

    temperature: float | None = None
    thresholds: tuple[float, ...] | None = None

    @property
    def scale(self) -> float:
        """The temperature; 1 where none was fitted."""
        return 1.0 if self.temperature is None else self.temperature

    def decision_outputs(self, logits: ndarray) -> ndarray:
        """Outputs `(examples, labels)` whose maximum, or for multi-label whose sign, is the calibrated decision.

        These are logits - temperature * logit(threshold); a temperature alone changes no decision.
        """
        if self.thresholds is None:
            return logits
        offsets = [self.scale * (math.log(each) - math.log1p(-each)) for each in self.thresholds]
        return logits - np.array(offsets, logits.dtype)


@dataclass(frozen=True)
class Bin:
    """The decisions whose confidence is in (low, high]: how many, their mean confidence, their accuracy."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Reliability:
    """How well confidence matches accuracy; `bins` has those that are not empty."""

    bins: tuple[Bin, ...]
    error: float
    """The expected calibration error: the mean of |accuracy - confidence| of the bins, weighted by their counts."""
    confidence: float
    accuracy: float


def reliability(confidence: ndarray, correct: ndarray, bins: int = 15) -> Reliability:
    """Compare confidences `(decisions,)` in [0, 1] with whether the decisions are right, in bins of equal width."""
    # Bin b holds ((b - 1) / bins, b / bins], the first one 0 too.
    index = np.clip(np.ceil(confidence * bins).astype(int), 1, bins) - 1
    found = []
    for number in np.unique(index).tolist():
        inside = index == number
        means = float(confidence[inside].mean()), float(correct[inside].mean())
        found.append(Bin(number / bins, (number + 1) / bins, int(inside.sum()), *means))
    distance = sum(entry.count * abs(entry.accuracy - entry.confidence) for entry in found)
    totals = float(confidence.mean()), float(correct.mean())
    return Reliability(tuple(found), distance / max(1, len(confidence)), *totals)


def fit_temperature(excess: ndarray) -> float:
    """The temperature T in [0.05, 20] that is likeliest after the decisions of validation examples.

    excess: how far each answer's logit is above the true one's, a row for each decision.
    Likeliest: by softmax(logits / T), for multi-label the sigmoid, and by Student's distribution of log T, with 3
    degrees of freedom around T = 1. The few examples of a small validation split tell little: their own best T made
    other texts' loss up to 0.17 higher than T = 1. Probabilities that are too sharp cost more than those that are too
    flat, so the distribution is narrower below 1. 1 where nothing else is likelier.
    """

    def cost(log_temperature: float) -> float:
        spread = FLATTER if log_temperature > 0 else SHARPER
        unlikely = 2 * math.log1p((log_temperature / spread) ** 2 / 3)
        return float(logsumexp(math.exp(-log_temperature) * excess, axis=1).sum()) + unlikely

    low, high = math.log(LOWEST), math.log(HIGHEST)
    grid = np.linspace(low, high, 41)
    best, step = float(min(grid, key=cost)), float(grid[1] - grid[0])
    bounds = (max(low, best - step), min(high, best + step))
    found = minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    return math.exp(found.x) if found.fun < cost(0.0) else 1.0


def fit_thresholds(probabilities: ndarray, references: ndarray, prior: float = PRIOR) -> tuple[float, ...]:
    """For each label the threshold with the best expected F1 on examples like these.

    The best cut of a few examples is a matter of chance, and worse than one half on others (Lipton et al. 2014,
    arXiv:1402.1892). So an example counts as having a label in part as it was seen, in part by its probability.

    probabilities: calibrated, `(examples, labels)`; references: rows of 0 and 1. prior: with so many examples of
    the label both parts are equal; with 0 only what was seen counts. Thresholds are midpoints of neighbouring
    scores. One half stays where none is better, and for labels that fewer than 5 examples have, or have not; of
    equally good ones the nearest to one half is taken.
    """
    columns = zip(np.asarray(probabilities, np.float64).T, np.asarray(references).T > 0, strict=True)
    return tuple(_threshold(scores, truth, prior) for scores, truth in columns)


def _threshold(scores: ndarray, truth: ndarray, prior: float) -> float:
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
