"""What training minimizes, example by example, in numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import log_softmax

from hf_lora.tasks.labels import MULTI, REGRESSION, SINGLE


def example_losses(logits: np.ndarray, references: np.ndarray, problem_type: str) -> np.ndarray:
    """The loss `(examples,)` of outputs `(examples, labels)`.

    Cross-entropy, binary cross-entropy over all labels, or the squared error. references: class ids, rows of 0 and 1,
    or numbers.
    """
    return _LOSSES[problem_type](np.asarray(logits, np.float64), np.asarray(references))


def _cross_entropy(logits: np.ndarray, references: np.ndarray) -> np.ndarray:
    return -np.take_along_axis(log_softmax(logits, 1), references.astype(int)[:, None], 1)[:, 0]


def _binary_cross_entropy(logits: np.ndarray, references: np.ndarray) -> np.ndarray:
    # In a form that does not overflow.
    return (np.logaddexp(0, logits) - logits * references).mean(1)


def _squared_error(logits: np.ndarray, references: np.ndarray) -> np.ndarray:
    return ((logits - np.reshape(references, logits.shape)) ** 2).mean(1)


_LOSSES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    SINGLE: _cross_entropy,
    MULTI: _binary_cross_entropy,
    REGRESSION: _squared_error,
}
