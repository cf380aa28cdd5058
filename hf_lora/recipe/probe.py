"""A linear probe: the last layer of a classification head, fitted on the features of the frozen network.

A head that starts there lets LoRA begin with useful gradients and does not first distort the features (linear
probing, then fine-tuning: Kumar et al. 2022, arXiv:2202.10054).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from threadpoolctl import threadpool_limits

from hf_lora.tasks.labels import MULTI, REGRESSION, SINGLE
from hf_lora.tasks.losses import example_losses

# Inverse strengths of the L2 penalty that are tried, for features of mean squared norm 1.
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
# After so many strengths in a row that are worse than the best one, stronger ones are not tried.
_PATIENCE = 2
_ITERATIONS = 1000
_TOLERANCE = 1e-5
# By how much a label without examples is less likely, in log odds, than the least likely one with some.
_ABSENT = 5.0


@dataclass(frozen=True)
class Probe:
    """A fitted linear layer: logits are `features @ weight.T + bias`.

    weight: `(labels, width)`. bias: `(labels,)`. strength: the C that was chosen. loss: the mean loss on the
    part it was chosen on, None where that is empty. examples: how many were fitted.
    """

    weight: np.ndarray
    bias: np.ndarray
    strength: float
    loss: float | None
    examples: int

    def logits(self, features: np.ndarray) -> np.ndarray:
        """The outputs `(n, labels)` for features `(n, width)`, in fp64."""
        return np.asarray(features, np.float64) @ self.weight.T + self.bias


Layer = tuple[np.ndarray, np.ndarray]
# From a strength to a fitted (weight, bias).
Fit = Callable[[float], Layer]


@dataclass(frozen=True)
class _Problem:
    """What is fitted: features `(n, width)`, targets, weights of the examples `(n,)`."""

    features: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    labels: int
    intercept: bool

    def regression(self) -> LogisticRegression:
        return LogisticRegression(
            max_iter=_ITERATIONS, tol=_TOLERANCE, warm_start=True, fit_intercept=self.intercept
        )


def fit_probe(
    features: np.ndarray,
    targets: np.ndarray,
    held_out: tuple[np.ndarray, np.ndarray] | None,
    *,
    problem_type: str,
    labels: int,
    class_weights: Sequence[float] | None = None,
    intercept: bool = True,
    strength: float = 10.0,
) -> Probe:
    """Fit logistic regression, one for each label of multi-label data, or ridge regression; choose its penalty.

    features: `(n, width)`. targets: ids `(n,)`, zeros and ones `(n, labels)`, or numbers `(n,)` or `(n, labels)`.
    held_out: other features and targets, on which the strength with the least loss is chosen; None: `strength`.
    class_weights: `(labels,)`, as in the training loss; of single labels only.
    intercept: whether the layer has a bias; without one it is zero.
    """
    features = np.asarray(features, np.float64)
    center = features.mean(0) if intercept else np.zeros(features.shape[1])
    scale = float(np.sqrt(((features - center) ** 2).sum(1).mean())) or 1.0
    weights = np.ones(len(features))
    if class_weights is not None and problem_type == SINGLE:
        weights = np.asarray(class_weights, np.float64)[np.asarray(targets, int)]
    problem = _Problem((features - center) / scale, np.asarray(targets), weights, labels, intercept)
    fit = _FITTERS[problem_type](problem)

    def at(strength: float) -> Probe:
        # The products are small: several threads wait for each other, and for torch's, longer than they compute.
        with threadpool_limits(1, "blas"):
            weight, bias = fit(strength)
        weight = weight / scale
        return Probe(weight, bias - weight @ center, strength, None, len(features))

    if held_out is None or len(held_out[0]) == 0:
        return at(strength)
    best, lowest, worse = None, math.inf, 0
    for strength in STRENGTHS:
        probe = at(strength)
        loss = mean_loss(probe.logits(held_out[0]), held_out[1], problem_type)
        if best is None or loss < lowest:
            best, lowest, worse = replace(probe, loss=loss), loss, 0
        elif (worse := worse + 1) == _PATIENCE:
            break
    assert best is not None
    return best


def mean_loss(logits: np.ndarray, targets: np.ndarray, problem_type: str) -> float:
    """What training minimizes: cross-entropy, binary cross-entropy over all labels, or the squared error."""
    return float(example_losses(logits, targets, problem_type).mean())


def _single(given: _Problem) -> Fit:
    present = np.unique(given.targets)
    if len(present) == 1:
        # Nothing to tell apart: certain, as far as the examples go.
        nothing = np.zeros((1, given.features.shape[1])), np.zeros(1)
        return lambda strength: _of_present(*nothing, present, given.labels)
    model = given.regression()

    def fit(strength: float) -> Layer:
        weight, bias = _fitted(model, strength, given, given.targets)
        if len(present) == 2:
            # One row for the second class against the first: half for the one and half against the other.
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        return _of_present(weight, bias, present, given.labels)

    return fit


def _multi(given: _Problem) -> Fit:
    columns = [given.targets[:, label] > 0.5 for label in range(given.labels)]
    models = [given.regression() for _ in columns]

    def fit(strength: float) -> Layer:
        weight, bias = np.zeros((given.labels, given.features.shape[1])), np.zeros(given.labels)
        for label, (model, column) in enumerate(zip(models, columns, strict=True)):
            if not column.all() and column.any():
                row, constant = _fitted(model, strength, given, column)
                weight[label], bias[label] = row[0], constant[0]
            elif given.intercept:
                # The log odds with one example of either kind more, so that they are finite.
                bias[label] = np.log((column.sum() + 1) / ((~column).sum() + 1))
        return weight, bias

    return fit


def _regression(given: _Problem) -> Fit:
    values = np.asarray(given.targets, np.float64).reshape(len(given.targets), given.labels)

    def fit(strength: float) -> Layer:
        model = Ridge(alpha=1.0 / strength, fit_intercept=given.intercept)
        model.fit(given.features, values, sample_weight=given.weights)
        return np.reshape(model.coef_, (given.labels, -1)), np.broadcast_to(model.intercept_, given.labels)

    return fit


def _fitted(model: LogisticRegression, strength: float, given: _Problem, targets: np.ndarray) -> Layer:
    model.set_params(C=strength)
    with warnings.catch_warnings():
        # What is not quite at the optimum is still a better start than a random layer.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(given.features, targets, sample_weight=given.weights)
    return model.coef_.copy(), np.array(model.intercept_, np.float64).reshape(len(model.coef_))


def _of_present(weight: np.ndarray, bias: np.ndarray, present: np.ndarray, labels: int) -> Layer:
    """The layer for all labels; one of which there is no example is less likely than all that there are."""
    full = np.zeros((labels, weight.shape[1])), np.full(labels, bias.min() - _ABSENT)
    full[0][present], full[1][present] = weight, bias
    return full


_FITTERS: dict[str, Callable[[_Problem], Fit]] = {SINGLE: _single, MULTI: _multi, REGRESSION: _regression}
