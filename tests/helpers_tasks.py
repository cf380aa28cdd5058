"""Helpers for tests of tasks."""

from __future__ import annotations

import numpy as np


def scaled(x: np.ndarray, like: np.ndarray, center: bool = True) -> np.ndarray:
    """Moved and scaled as `like` to mean squared norm 1, in fp64."""
    like = like.astype(np.float64)
    middle = like.mean(0) if center else 0.0
    return (x.astype(np.float64) - middle) / np.sqrt(((like - middle) ** 2).sum(1).mean())
