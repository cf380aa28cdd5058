"""Evaluation with the longest examples first, and its results in the order of the data set.

Batches of similar length hold little padding, and no one sees another order: not the metrics, not `predict`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler
from transformers import EvalPrediction


class LongestFirst(Sampler[int]):
    """A sampler of all examples by falling length; `order` holds their indices."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.order = np.argsort(-lengths, kind="stable")

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order.tolist())


def order_of(loader: DataLoader[Any]) -> np.ndarray | None:
    """The order in which a loader prepared by accelerate reads its data set, if a `LongestFirst` gives it."""
    batches = getattr(loader, "batch_sampler", None)
    # With several processes, accelerate puts its own sampler around.
    sampler = getattr(getattr(batches, "batch_sampler", batches), "sampler", None)
    return sampler.order if isinstance(sampler, LongestFirst) else None


def restored(values: Any, order: np.ndarray) -> Any:
    """Arrays (or nested tuples, lists and dicts of them) whose rows come in `order`, in the data set's order.

    A data loader that drops its last batch leaves fewer rows than `order` has; the missing ones stay out.
    """
    if values is None:
        return None
    if isinstance(values, Mapping):
        return type(values)({key: restored(value, order) for key, value in values.items()})  # type: ignore[call-arg]
    if isinstance(values, list | tuple):
        return type(values)(restored(value, order) for value in values)
    return values[np.argsort(order[: len(values)])]


def metrics_in_order(
    compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None, order: np.ndarray
) -> Callable[[EvalPrediction], dict[str, Any]] | None:
    """`compute_metrics` on rows in the data set's order: it may look up what else it knows of a row."""
    if compute_metrics is None:
        return None

    def computed(prediction: EvalPrediction) -> dict[str, Any]:
        names = ("predictions", "label_ids", "inputs", "losses")
        return compute_metrics(
            EvalPrediction(**{name: restored(getattr(prediction, name), order) for name in names})
        )

    return computed
