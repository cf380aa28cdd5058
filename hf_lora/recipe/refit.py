"""Training once more on all examples: the held-out part has said how good a run is, and is not wasted after that.

Of a few examples a fifth is much. What was measured and calibrated on the held-out part is of the first training.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import concatenate_datasets
from transformers import set_seed

from hf_lora.data import ClassificationData
from hf_lora.recipe.compare import Snapshot, clearly_better, validation_quality
from hf_lora.recipe.head_start import HeadStart, install
from hf_lora.recipe.progress import Progress, attach
from hf_lora.training.arguments import silent
from hf_lora.training.checkpoints import ending_on_sigterm
from hf_lora.training.gradient_init import choose_start
from hf_lora.training.trainer import LoRATrainer


@dataclass(frozen=True)
class Refit:
    """On how many examples the adapter was trained in the end, in so many seconds, or that it was not kept."""

    examples: int
    seconds: float
    kept: bool = True

    def metrics(self) -> dict[str, float]:
        """What `metrics.json` says of it."""
        examples = {"refit_examples": self.examples} if self.kept else {}
        return {**examples, "refit_runtime": self.seconds}

    def __str__(self) -> str:
        outcome = (
            "validation scores were measured before it"
            if self.kept
            else "not kept: it does worse on the validation split, though it was trained on it"
        )
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
    """Train the model of a trainer that has trained again, from the start, on its evaluation set too.

    start: of `start_head(..., on_all=True)`. fresh: the trained parameters before any start. lora_init: as for
    `choose_start`. outputs: the model's as it is, `(examples, labels)`, for the evaluation set, where they are known.
    Seed, epochs and rates are those of before; `trainer` keeps its history and its callbacks.
    Where that did clearly worse on the evaluation set, though it has seen it, training has failed, and what was there
    before is kept. Every process has to call it.
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
