"""`--find_lr`: a learning-rate range test with a trainer's own steps, which leaves everything as it was.

The loop is the one that trains (`LoRATrainer.train`), with its batches, accumulation, clipping and parameter groups; a
callback sets the rate of each step and reads its loss. So the test measures what training would do, and what it
changes is put back by `restoring`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from hf_lora.atomic import replacing
from hf_lora.cli.tables import print_table
from hf_lora.lora.inject import injection
from hf_lora.recipe.lr_range_plot import range_picture
from hf_lora.recipe.lr_rule import LearningRateRange, Suggestion, diverged, schedule, smooth, suggest
from hf_lora.recipe.restoring import restored
from hf_lora.training.preemption import EXIT_CODE, handling_sigterm
from hf_lora.training.processes import process_count
from hf_lora.training.trainer import LoRATrainer
from hf_lora.training.training_arguments import silent
from hf_lora.version import __version__

RESULT, PICTURE = "lr_range.json", "lr_range.png"

# What the test does not do: (what, whether a trainer has it, what to do instead).
_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("FSDP", lambda trainer: trainer.is_fsdp_enabled, "run it in one process without FSDP"),
    ("DeepSpeed", lambda trainer: trainer.is_deepspeed_enabled, "run it in one process without DeepSpeed"),
    (
        "several processes",
        lambda trainer: max(trainer.args.world_size, process_count()) > 1,
        "run it in one, with as many accumulated batches as there would be processes",
    ),
    (
        "an optimizer that steps inside the backward pass",
        lambda trainer: any(word in str(trainer.args.optim).lower() for word in ("lomo", "layerwise")),
        "use another, such as --optim adamw_torch",
    ),
    ("a learning_rate of 0", lambda trainer: not trainer.args.learning_rate > 0, "give one above 0"),
)
# Of the arguments, what the picture is to be read with.
_SHOWN = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_tokens_per_batch",
    "max_grad_norm",
    "weight_decay",
    "label_smoothing_factor",
    "class_weights",
    "learning_rate",
    "head_learning_rate",
    "lora_plus_ratio",
    "train_sampling_strategy",
    "seed",
    "bf16",
    "fp16",
)


def find_learning_rate(
    trainer: LoRATrainer, *, low: float = 1e-5, high: float = 1.0, steps: int = 100
) -> LearningRateRange:
    """Train `steps` steps while the learning rate grows exponentially from low to high (Smith 2017, 1506.01186).

    A step is an optimizer step with its accumulated batches; a short data set is gone through again. All parameter
    groups keep their ratio to `args.learning_rate`. Ends early where the loss diverges (`lr_rule.diverged`)
    or is not finite. Afterwards the model, the trainer and all random states are as they were, and the trainer trains
    as if nothing had been. Callbacks and trackers hear nothing of it, nothing is evaluated or saved.
    Raises ValueError for a bad range, and where the test cannot run (FSDP, DeepSpeed, several processes).
    """
    rates = schedule(low, high, steps)
    for what, present, instead in _REFUSED:
        if present(trainer):
            raise ValueError(f"the learning-rate range test does not work with {what}; {instead}")
    sweep = _Sweep(rates.tolist(), own_optimizer=trainer.optimizer is None)
    # There is no training yet of which a checkpoint could be saved.
    with restored(trainer), handling_sigterm(lambda *_: sys.exit(EXIT_CODE)):
        trainer.args = _arguments(trainer.args, steps)
        trainer.lr_scheduler = None
        trainer.control = TrainerControl()
        trainer.callback_handler = CallbackHandler(
            [DefaultFlowCallback(), sweep], trainer.model, trainer.processing_class, None, None
        )
        trainer.train()
    if not sweep.losses:
        raise ValueError(
            f"the loss is not finite at the first step, before any update; got {sweep.stopped}; "
            "look at the data and the model"
        )
    done = len(sweep.losses)
    return LearningRateRange(
        tuple(sweep.rates[:done]),
        tuple(sweep.losses),
        tuple(smooth(sweep.losses)),
        sweep.stopped,
        (low, high, steps),
    )


def run_find_lr(
    trainer: LoRATrainer, output_dir: str | Path, *, low: float = 1e-5, high: float = 1.0, steps: int = 100
) -> dict[str, Any]:
    """The test, its files `lr_range.json` and, with matplotlib, `lr_range.png`, and a table; returns the former.

    The files are also written where no rate can be suggested, which is then raised as a ValueError in one line.
    """
    output = Path(output_dir)
    print(f"learning-rate range test: {steps} steps from {low:g} to {high:g}", flush=True)
    found = find_learning_rate(trainer, low=low, high=high, steps=steps)
    suggestion, refusal = None, None
    try:
        suggestion = suggest(found)
    except ValueError as error:
        refusal = str(error)
    result = {
        "low": low,
        "high": high,
        "steps": steps,
        "stopped": found.stopped,
        "rates": list(found.rates),
        "losses": list(found.losses),
        "smoothed": list(found.smoothed),
        "suggestion": None
        if suggestion is None
        else asdict(suggestion) | _own_rates(trainer.args, suggestion),
        "refusal": refusal,
        "settings": _settings(trainer),
    }
    marked = None if suggestion is None else suggestion.learning_rate
    picture = range_picture(found.rates, found.losses, found.smoothed, marked)
    with replacing(output) as folder:
        (folder / RESULT).write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        if picture is not None:
            (folder / PICTURE).write_bytes(picture)
    written = [name for name in (RESULT, PICTURE) if name == RESULT or picture is not None]
    if refusal is not None:
        raise ValueError(f"{refusal}; what was measured is in {output / written[-1]}")
    assert suggestion is not None
    _show(found, suggestion, trainer.args)
    print(f"written to {output}: {', '.join(written)}")
    if picture is None:
        print("no picture, since matplotlib is not installed; try `pip install 'hf-lora[plots]'`")
    return result


def _show(found: LearningRateRange, suggestion: Suggestion, args: TrainingArguments) -> None:
    figures = (
        ("where the loss falls steepest", suggestion.steepest),
        ("a tenth of where it is lowest", suggestion.lowest / 10),
        ("a decade below where it rises", suggestion.below_rise),
    )
    rows = [(name, "none" if rate is None else f"{rate:.2g}") for name, rate in figures]
    print_table("learning-rate range test", ("figure", "learning rate"), rows)
    if len(found.losses) < found.asked[2]:
        print(f"ended after {len(found.losses)} of {found.asked[2]} steps: {found.stopped}")
    print(f"suggestion: {suggestion.learning_rate:g}, {suggestion.rule}")
    flags = {"learning_rate": suggestion.learning_rate} | _own_rates(args, suggestion)
    print(
        "next: the same command without --find_lr, with",
        *(f"--{name} {rate:g}" for name, rate in flags.items()),
    )


def _own_rates(args: TrainingArguments, suggestion: Suggestion) -> dict[str, float]:
    """The head's learning rate, where it has one, in the ratio that was tested."""
    own = getattr(args, "head_learning_rate", None)
    if own is None:
        return {}
    return {"head_learning_rate": float(f"{suggestion.learning_rate * own / args.learning_rate:.2g}")}


def _settings(trainer: LoRATrainer) -> dict[str, Any]:
    """What was on: the numbers hold for it and for nothing else."""
    args = trainer.args
    model: Any = trainer.model
    shown = {name: getattr(args, name, None) for name in _SHOWN}
    return {
        "hf_lora": __version__,
        "base_model": getattr(model.config, "_name_or_path", ""),
        "examples": len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "training": {name: getattr(value, "value", value) for name, value in shown.items()},
        "lora": injection(model).config.to_dict(),
    }


class _Sweep(TrainerCallback):
    """Sets the rate of each step before it, reads its loss after it, and ends the test where that diverges."""

    def __init__(self, rates: list[float], *, own_optimizer: bool) -> None:
        self.rates = rates
        self.losses: list[float] = []
        self.stopped: str | None = None
        self._own_optimizer = own_optimizer
        self._ratios: list[float] = []

    def on_train_begin(self, args: TrainingArguments, *_: Any, optimizer: Any, **__: Any) -> None:
        """Called again where auto_find_batch_size tries another size."""
        self.losses, self.stopped = [], None
        rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        # An optimizer that was passed to the trainer need not know the arguments' rate: its first is meant.
        known = self._own_optimizer or args.learning_rate in rates
        reference = args.learning_rate if known else rates[0]
        self._ratios = [rate / reference for rate in rates]

    def on_step_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
        """Called before the first batch of a step."""
        for group, ratio in zip(optimizer.param_groups, self._ratios, strict=True):
            group["lr"] = self.rates[len(self.losses)] * ratio

    def on_log(
        self, args: Any, state: Any, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        """Called after each step, and once more at the end without a loss."""
        if "loss" not in logs:
            return
        loss, rate = float(logs["loss"]), self.rates[len(self.losses)]
        if not np.isfinite(loss):
            self.stopped = f"a loss of {loss} at {rate:.2g}"
        else:
            self.losses.append(loss)
            if diverged(self.losses, smooth(self.losses)):
                self.stopped = f"a diverging loss at {rate:.2g}"
        control.should_training_stop = control.should_training_stop or self.stopped is not None


def _arguments(args: TrainingArguments, steps: int) -> TrainingArguments:
    """The arguments with a constant rate and every loss logged as it is, and nothing else done."""
    return silent(
        args,
        max_steps=steps,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        lr_scheduler_type="constant",
        lr_scheduler_kwargs={},
        warmup_steps=0,
    )
