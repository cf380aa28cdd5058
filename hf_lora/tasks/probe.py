"""A linear probe: the last layer of a classification head, fitted on the features of the frozen network.

A head that starts there lets LoRA begin with useful gradients and does not first distort the features (linear
probing, then fine-tuning: Kumar et al. 2022, arXiv:2202.10054).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray
from threadpoolctl import threadpool_limits

if TYPE_CHECKING:
    from hf_lora.tasks.task import Task

# scikit-learn is imported where it is used: predictions do without it.

STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Inverse strengths of the L2 penalty that are tried, for features of mean squared norm 1."""
# After so many strengths in a row that are worse than the best one, stronger ones are not tried.
_PATIENCE = 2
_ITERATIONS = 1000
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Probe:
    """A fitted linear layer: logits are `features @ weight.T + bias`.

    weight: `(labels, width)`. bias: `(labels,)`. strength: the C that was chosen. loss: the mean loss on the
    part it was chosen on, None where that is empty. examples: how many were fitted.
    """

    weight: ndarray
    bias: ndarray
    strength: float
    loss: float | None
    examples: int

    def logits(self, features: ndarray) -> ndarray:
        """The outputs `(n, labels)` for features `(n, width)`, in fp64."""
        return np.asarray(features, np.float64) @ self.weight.T + self.bias


Layer = tuple[ndarray, ndarray]
Fit = Callable[[float], Layer]
"""From a strength to a fitted (weight, bias)."""


@dataclass(frozen=True)
class Problem:
    """What is fitted: features `(n, width)`, targets, weights of the examples `(n,)`."""

    features: ndarray
    targets: ndarray
    weights: ndarray
    labels: int
    intercept: bool

    def logistic(self) -> Callable[[float, ndarray], Layer]:
        """The fit of a logistic regression of targets at a strength; it continues from its last fit."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(
            max_iter=_ITERATIONS, tol=_TOLERANCE, warm_start=True, fit_intercept=self.intercept
        )

        def fit(strength: float, targets: ndarray) -> Layer:
            with warnings.catch_warnings():
                # What is not quite at the optimum is still a better start than a random layer.
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.set_params(C=strength).fit(self.features, targets, sample_weight=self.weights)
            return model.coef_.copy(), np.array(model.intercept_, np.float64).reshape(len(model.coef_))

        return fit


def fit_probe(
    features: ndarray,
    targets: ndarray,
    held_out: tuple[ndarray, ndarray] | None,
    *,
    task: Task,
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
    targets, weights = np.asarray(targets), task.example_weights(targets, class_weights)
    fit = task.probe_fit(Problem((features - center) / scale, targets, weights, labels, intercept))

    def at(strength: float) -> Probe:
        # The products are small: several threads wait for each other, and for torch's, longer than they compute.
        with threadpool_limits(1, "blas"):
            weight, bias = fit(strength)
        weight = weight / scale
        return Probe(weight, bias - weight @ center, strength, None, len(features))

    if held_out is None or len(held_out[0]) == 0:
        return at(strength)
    probes: list[Probe] = []
    losses: list[float] = []
    for strength in STRENGTHS:
        probes.append(at(strength))
        losses.append(float(task.losses(probes[-1].logits(held_out[0]), held_out[1]).mean()))
        best = losses.index(min(losses))
        if len(losses) - best > _PATIENCE:
            break
    return replace(probes[best], loss=losses[best])
