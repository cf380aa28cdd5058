"""What the evaluations during training took and gave: nobody predicts a split again with the same parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn
from transformers import EvalPrediction, TrainerCallback

from hf_lora.recipe.snapshot import Snapshot
from hf_lora.tasks.metrics import first_output
from hf_lora.training.processes import on_first
from hf_lora.training.trainer import LoRATrainer


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
