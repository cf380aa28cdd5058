"""What the probes of a model share: evaluation mode for a while, and how far two results are apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; after, each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what is expected; 0 where both are zero."""
    got, expected = got.cpu().double(), expected.cpu().double()
    distance = float((got - expected).norm())
    return distance if distance == 0 else distance / max(float(expected.norm()), 1e-30)
