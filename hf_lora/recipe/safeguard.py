"""An adapter that does clearly worse on the held-out part than the probe it started from is not kept."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hf_lora.data import ClassificationData
from hf_lora.recipe.snapshot import Snapshot
from hf_lora.recipe.warm_start import WarmStart, install
from hf_lora.tasks.labels import MULTI, REGRESSION, SINGLE
from hf_lora.tasks.losses import example_losses
from hf_lora.tasks.metrics import first_output
from hf_lora.training.trainer import LoRATrainer

# LoRA is nearly always better than its probe: a small validation part has to say very clearly that it is not.
SURE = 2.0


def keep_the_better(
    trainer: LoRATrainer,
    data: ClassificationData,
    start: Snapshot,
    warm: WarmStart,
    outputs: np.ndarray | None = None,
) -> str | None:
    """Go back to the probe if training made the validation split clearly worse; returns what was done, in one line.

    outputs: `(examples, labels)` of the model for that split, where they are known; None: it is predicted.
    Clearly: by more than `SURE` standard errors of the difference, example by example. Every process has to call it.
    """
    assert warm.validation is not None  # a run of the command line has a validation split
    after, before = (validation_quality(trainer, data, given) for given in (outputs, warm.validation))
    if not clearly_better(before, after):
        return None
    model = trainer.accelerator.unwrap_model(trainer.model)
    start.restore(model)
    install(model, warm.probe)
    return (
        f"LoRA did worse than the linear probe on the {len(after)} validation examples "
        f"({after.mean():.4g} against {before.mean():.4g}); the adapter is the probe; try a lower --learning_rate"
    )


def validation_quality(
    trainer: LoRATrainer, data: ClassificationData, logits: np.ndarray | None = None
) -> np.ndarray:
    """How good each prediction for the validation split is, as `quality` says; logits: None: of the model as it is now.

    Every process has to call it.
    """
    split = data.splits["validation"]
    if logits is None:
        logits = first_output(trainer.predict(split).predictions)
    weights = None if trainer.class_weights is None else trainer.class_weights.cpu().numpy()
    return quality(logits, np.asarray(split["labels"]), data.problem_type, weights)


def quality(
    logits: np.ndarray, references: np.ndarray, problem_type: str, class_weights: np.ndarray | None = None
) -> np.ndarray:
    """How good each prediction is, `(examples,)`: right or not, share of right labels, minus the squared error.

    class_weights: `(labels,)`, of the training loss, so that what it aims at is what counts; the mean over the
    examples is then the weighted accuracy.
    """
    return _QUALITIES[problem_type](np.asarray(logits, np.float64), references, class_weights)


def clearly_better(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether `one` is better in the mean by more than `SURE` standard errors of the paired difference."""
    difference = one - other
    if len(difference) < 2:
        return False
    return bool(difference.mean() > SURE * difference.std(ddof=1) / np.sqrt(len(difference)))


def _single(logits: np.ndarray, references: np.ndarray, class_weights: np.ndarray | None) -> np.ndarray:
    right = (logits.argmax(1) == references).astype(float)
    if class_weights is None:
        return right
    weights = class_weights[references]
    return right * weights / weights.mean()


_QUALITIES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray]] = {
    SINGLE: _single,
    MULTI: lambda logits, references, weights: np.average(
        (logits > 0) == (references > 0.5), axis=1, weights=weights
    ),
    REGRESSION: lambda logits, references, _: -example_losses(logits, references, REGRESSION),
}
