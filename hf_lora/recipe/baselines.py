"""What a classifier has to beat on the same split: the majority class, and the linear probe."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hf_lora.data import ClassificationData
from hf_lora.recipe.warm_start import WarmStart, frozen_features
from hf_lora.tasks.labels import MULTI, REGRESSION, SINGLE
from hf_lora.tasks.metric_classes import BASELINES
from hf_lora.training.trainer import LoRATrainer

MAJORITY, PROBE = BASELINES

# By split and name the outputs `(examples, labels)`.
Baselines = Mapping[str, Mapping[str, np.ndarray]]


def baseline_logits(trainer: LoRATrainer, data: ClassificationData, warm: WarmStart | None) -> Baselines:
    """The outputs of the baselines on the validation and test splits; without `warm` there is no probe.

    To be called before training, while the features are those that the probe was fitted on.
    """
    constant = constant_logits(
        np.asarray(data.splits["train"]["labels"]), len(data.labels), data.problem_type
    )
    found: dict[str, dict[str, np.ndarray]] = {}
    for split in ("validation", "test"):
        if split in data.splits:
            found[split] = {MAJORITY: np.tile(constant, (len(data.splits[split]), 1))}
    if warm is not None:
        for split, others in found.items():
            known = warm.validation if split == "validation" else None
            others[PROBE] = (
                warm.best.logits(frozen_features(trainer, data.splits[split])) if known is None else known
            )
    return found


def constant_logits(references: np.ndarray, labels: int, problem_type: str) -> np.ndarray:
    """The best outputs `(labels,)` that do not look at the text: log frequencies, log odds, or the mean."""
    return _CONSTANTS[problem_type](references, labels)


def _log_frequencies(references: np.ndarray, labels: int) -> np.ndarray:
    counts = np.bincount(references.astype(int), minlength=labels)
    return np.log(np.maximum(counts, 0.5) / max(1, counts.sum()))


def _log_odds(references: np.ndarray, labels: int) -> np.ndarray:
    with_label = (references > 0.5).sum(0)
    return np.log((with_label + 0.5) / (len(references) - with_label + 0.5))


def _mean(references: np.ndarray, labels: int) -> np.ndarray:
    return references.reshape(len(references), labels).astype(float).mean(0)


_CONSTANTS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    SINGLE: _log_frequencies,
    MULTI: _log_odds,
    REGRESSION: _mean,
}
