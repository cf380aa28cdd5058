"""What is kept in the end: the probe or LoRA, the first training or one on all examples.

Of a few examples a fifth is much: when the held-out part has judged a run, the model is retrained on all of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback, set_seed

from hf_lora.data import ClassificationData
from hf_lora.recipe.head_start import HeadStart, WarmStart, frozen_features, install
from hf_lora.recipe.progress import Progress, attach
from hf_lora.recipe.results import Baselines
from hf_lora.tasks.metrics import BASELINES, first_output
from hf_lora.training.arguments import silent
from hf_lora.training.checkpoints import ending_on_sigterm
from hf_lora.training.distributed import on_first
from hf_lora.training.gradient_init import choose_start
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


def baseline_logits(trainer: LoRATrainer, data: ClassificationData, warm: WarmStart | None) -> Baselines:
    """The outputs of the baselines on the validation and test splits; without `warm` there is no probe.

    To be called before training, while the features are those that the probe was fitted on.
    """
    constant = data.task.constant(np.asarray(data.splits["train"]["labels"]), len(data.labels))
    splits = {name: data.splits[name] for name in ("validation", "test") if name in data.splits}
    found = {name: {MAJORITY: np.tile(constant, (len(split), 1))} for name, split in splits.items()}
    for name, split in splits.items() if warm is not None else ():
        assert warm is not None
        known = warm.validation if name == "validation" else None
        found[name][PROBE] = warm.best.logits(frozen_features(trainer, split)) if known is None else known
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
    """`Task.quality` of each prediction for the validation split; logits: None: of the model. For every process."""
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
        self._trainer, self._measure = trainer, trainer.compute_metrics
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


@dataclass(frozen=True)
class Refit:
    """Result of the retraining."""

    examples: int
    seconds: float
    kept: bool = True

    def metrics(self) -> dict[str, float]:
        """What `metrics.json` says of it."""
        examples = {"refit_examples": self.examples} if self.kept else {}
        return {**examples, "refit_runtime": self.seconds}

    def __str__(self) -> str:
        outcome = "not kept: it does worse on the validation split, though it was trained on it"
        if self.kept:
            outcome = "validation scores were measured before it"
        return f"on all {self.examples:,} examples, {self.seconds:.1f} s; {outcome}"


def refit_probe(trainer: LoRATrainer, data: ClassificationData, start: HeadStart) -> Refit:
    """Let the adapter's head be the probe of all examples. `start`: of `start_head(..., on_all=True)`."""
    assert start.warm is not None
    install(trainer.accelerator.unwrap_model(trainer.model), start.warm.best)
    return Refit(sum(len(data.splits[split]) for split in ("train", "validation")), 0.0)


def refit(
    trainer: LoRATrainer,
    data: ClassificationData,
    start: HeadStart,
    fresh: Snapshot,
    lora_init: str,
    outputs: np.ndarray | None = None,
    progress: Progress | None = None,
) -> Refit:
    """Train the model of a trainer again, from the start, on its evaluation set too. Every process has to call it.

    start: of `start_head(..., on_all=True)`. fresh: the trained parameters before any start. lora_init: as for
    `choose_start`. outputs: the model's as it is, `(examples, labels)`, for the evaluation set, where they are known.
    Seed, epochs and rates are those of before; `trainer` keeps its history and its callbacks.
    Where that did clearly worse on the evaluation set, though it has seen it, training has failed, and what was there
    before is kept.
    """
    began = time.perf_counter()
    args = silent(trainer.args)
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    before, judged = Snapshot.of(model), validation_quality(trainer, data, outputs)
    fresh.restore(model)
    if start.kind == "probe" and start.warm is not None:
        assert start.warm.on_all is not None
        install(model, start.warm.on_all[1])
    examples = concatenate_datasets([data.splits["train"], data.splits["validation"]])
    again = LoRATrainer(
        model=model, args=args, train_dataset=examples, processing_class=trainer.processing_class
    )
    attach(again, progress or Progress(), f"retraining on all {len(examples):,} examples")
    choose_start(again, lora_init, start.kind)
    set_seed(args.seed)
    with ending_on_sigterm(trainer.state.global_step):
        again.train()
    kept = not clearly_better(judged, validation_quality(trainer, data))
    if not kept:
        before.restore(model)
    return Refit(len(examples), time.perf_counter() - began, kept)
