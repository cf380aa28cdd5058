"""The trained parameters of a model at one moment: to go back to, and to know whether they have changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback

from hf_lora.data import ClassificationData
from hf_lora.recipe.head_start import WarmStart, frozen_features, install
from hf_lora.tasks.metrics import BASELINES, first_output
from hf_lora.training.distributed import on_first
from hf_lora.training.trainer import LoRATrainer


@dataclass(frozen=True)
class Snapshot:
    """The trained parameters of a model at one moment, on the CPU."""

    values: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """The parameters as they are now."""
        trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        return cls({name: p.detach().to("cpu", copy=True) for name, p in trained})

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Give the model these parameters again."""
        parameters = dict(model.named_parameters())
        for name, value in self.values.items():
            parameters[name].copy_(value)

    def is_of(self, model: nn.Module) -> bool:
        """Whether the model has these parameters and no others, bit for bit."""
        now = Snapshot.of(model).values
        return now.keys() == self.values.keys() and all(
            torch.equal(now[name], value) for name, value in self.values.items()
        )


MAJORITY, PROBE = BASELINES

# By split and name the outputs `(examples, labels)`.
Baselines = Mapping[str, Mapping[str, np.ndarray]]


def baseline_logits(trainer: LoRATrainer, data: ClassificationData, warm: WarmStart | None) -> Baselines:
    """The outputs of the baselines on the validation and test splits; without `warm` there is no probe.

    To be called before training, while the features are those that the probe was fitted on.
    """
    constant = data.task.constant(np.asarray(data.splits["train"]["labels"]), len(data.labels))
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
    """`Task.quality` of each prediction for the validation split; logits: None: of the model as it is now.

    Every process has to call it.
    """
    split = data.splits["validation"]
    if logits is None:
        logits = first_output(trainer.predict(split).predictions)
    weights = None if trainer.class_weights is None else trainer.class_weights.cpu().numpy()
    return data.task.quality(np.asarray(logits, np.float64), np.asarray(split["labels"]), weights)


def clearly_better(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether `one` is better in the mean by more than `SURE` standard errors of the paired difference."""
    difference = one - other
    if len(difference) < 2:
        return False
    return bool(difference.mean() > SURE * difference.std(ddof=1) / np.sqrt(len(difference)))


class Evaluations(TrainerCallback):
    """The seconds of a training's evaluations, and the outputs of the last one while they are the model's."""

    def __init__(self, trainer: LoRATrainer) -> None:
        self.seconds = 0.0
        self._trainer = trainer
        self._measure = trainer.compute_metrics
        self._outputs: np.ndarray | None = None
        self._parameters: Snapshot | None = None

    def outputs(self) -> np.ndarray | None:
        """The model's outputs `(n, labels)` for the evaluation set, in its order; None where no evaluation gave them.

        They are the last evaluation's, if the trained parameters are still those of that moment: training may have
        gone on, or gone back to an earlier checkpoint. Every process has to call it.
        """
        same = on_first(lambda: self._parameters is not None and self._parameters.is_of(self._model()))
        return self._outputs if same else None

    def measure(self, prediction: EvalPrediction) -> dict[str, Any]:
        """The trainer's `compute_metrics`; keeps the outputs."""
        self._outputs = first_output(prediction.predictions)
        return self._measure(prediction)

    def on_evaluate(self, *_: Any, metrics: dict[str, float], **__: Any) -> None:
        """Called by the Trainer after each evaluation."""
        self.seconds += metrics.get("eval_runtime", 0.0)
        sharded = self._trainer.is_fsdp_enabled or self._trainer.is_deepspeed_enabled
        self._parameters = None if sharded else Snapshot.of(self._model())

    def _model(self) -> nn.Module:
        return self._trainer.accelerator.unwrap_model(self._trainer.model)


@contextmanager
def watched(trainer: LoRATrainer) -> Iterator[Evaluations]:
    """Inside, the evaluations of a trainer with `compute_metrics` are noted."""
    evaluations = Evaluations(trainer)
    own, trainer.compute_metrics = trainer.compute_metrics, evaluations.measure
    trainer.add_callback(evaluations)
    try:
        yield evaluations
    finally:
        trainer.remove_callback(evaluations)
        trainer.compute_metrics = own
