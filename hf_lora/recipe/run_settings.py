"""From the command line's arguments to the settings of a run: LoRAConfig, DataConfig, what the Hub needs."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from typing import Any

from hf_lora.data import DataConfig
from hf_lora.data.splits import FEW_EXAMPLES
from hf_lora.lora.config import LoRAConfig
from hf_lora.recipe.arguments import REFITS, DataArguments, LoRAArguments, ModelArguments
from hf_lora.tasks import task_of
from hf_lora.training.arguments import LoRATrainingArguments
from hf_lora.training.gradient_init import AUTO, INIT

# PEFT's files have no rank 0: a linear probe is the smallest adapter there is, whose B stays zero.
PROBE_CONFIG = LoRAConfig(rank=1, alpha=1.0, projections="q", layers=(-1,))

# Where the examples are few, each step is led by what only these have, and there are as many steps all the same.
RATE, ENOUGH_EXAMPLES = 2e-3, 500

# Two epochs where they make so many steps, else three, and more where those make hardly any.
ENOUGH_STEPS, FEWEST_STEPS, MOST_EPOCHS = 200, 60, 30


def lora_config(arguments: LoRAArguments) -> LoRAConfig:
    """The LoRAConfig that the command line's arguments ask for."""
    if arguments.lora_rank == 0:
        return PROBE_CONFIG
    targets = arguments.lora_target_modules
    single = (
        targets is not None
        and len(targets) == 1
        and not targets[0].replace(".", "").replace("_", "").isalnum()
    )
    expression = targets is not None and (single or targets == ["all-linear"])
    return LoRAConfig(
        rank=arguments.lora_rank,
        alpha=arguments.lora_alpha,
        dropout=arguments.lora_dropout,
        projections=arguments.lora_projections,
        target_modules=None if targets is None else targets[0] if expression else tuple(targets),
        layers=None if arguments.lora_layers is None else tuple(arguments.lora_layers),
        rank_pattern=_json_object("lora_rank_pattern", arguments.lora_rank_pattern),
        alpha_pattern=_json_object("lora_alpha_pattern", arguments.lora_alpha_pattern),
        bias=arguments.lora_bias,
        train_head=arguments.train_head,
        init=INIT if arguments.lora_init == AUTO else arguments.lora_init,
        variant=arguments.lora_variant,
        scaling=arguments.lora_scaling,
        form=arguments.lora_form,
    )


def choose_rate(args: LoRATrainingArguments, examples: int) -> str | None:
    """Set `learning_rate` where it was left open: 2e-3, less by the root of the number of examples if they are few.

    README, "Quality", says how that was measured. Returns what was chosen and why, in one line; None where there was
    nothing to choose.
    """
    if args.learning_rate != 0:
        return None
    args.learning_rate = float(f"{RATE * math.sqrt(min(1.0, examples / ENOUGH_EXAMPLES)):.2g}")
    rule = (
        f"{RATE:g} from {ENOUGH_EXAMPLES} training examples on, with fewer less by the root of their number"
    )
    return f"learning rate: {args.learning_rate:g} ({rule})"


def choose_epochs(args: LoRATrainingArguments, examples: int) -> str | None:
    """Set `num_train_epochs` where it was left open: three, two if they make 200 steps, more to make at least 60.

    A few examples need many passes until the adapter has moved; README, "Quality", says how that was measured.
    Returns what was chosen and why, in one line; None where there was nothing to choose.
    """
    if args.num_train_epochs > 0 or args.max_steps > 0:
        return None
    step = args.train_batch_size * args.gradient_accumulation_steps * max(1, args.world_size)
    steps = max(1, math.ceil(examples / step))
    usual = 2 if 2 * steps >= ENOUGH_STEPS else 3
    args.num_train_epochs = min(max(usual, math.ceil(FEWEST_STEPS / steps)), MOST_EPOCHS)
    rule = f"3, 2 if they make {ENOUGH_STEPS} steps, up to {MOST_EPOCHS} to make {FEWEST_STEPS}"
    return f"epochs: {args.num_train_epochs} of {steps} steps ({rule})"


def choose_smoothing(args: LoRATrainingArguments, problem_type: str) -> str | None:
    """Switch label smoothing off where there is no single label to smooth; returns so, in one line, or None."""
    if task_of(problem_type).smooths_labels or not args.label_smoothing_factor:
        return None
    args.label_smoothing_factor = 0.0
    return f"label smoothing: off ({task_of(problem_type).words})"


def choose_refit(
    refit: str, args: LoRATrainingArguments, *, held_out: bool, examples: int, stopping: bool = False
) -> bool:
    """Whether a run trains again on all examples in the end; README, "Quality", says how that was measured.

    held_out: whether the validation split was taken from the training data. examples: of both. stopping: whether
    training ends where the validation split says so. Raises ValueError for an unknown word, and where it cannot be.
    """
    if refit not in REFITS:
        raise ValueError(f"unknown refit; got {refit!r}; expected one of {', '.join(REFITS)}")
    problems = {
        "early stopping or load_best_model_at_end, for which something has to be held out": stopping
        or args.load_best_model_at_end,
        "FSDP or DeepSpeed, whose weights are sharded": is_sharded(args),
    }
    problem = next((name for name, present in problems.items() if present), None)
    if refit == "always" and problem is not None:
        raise ValueError(f"refit=always cannot be done; got {problem}; use refit=never")
    return refit == "always" or (
        refit == "auto" and problem is None and held_out and examples <= FEW_EXAMPLES
    )


def data_config(arguments: DataArguments, model: ModelArguments, args: LoRATrainingArguments) -> DataConfig:
    """The DataConfig that the command line's arguments ask for."""
    values = asdict(arguments)
    values["max_length"] = values.pop("max_seq_length")
    split_seed = values.pop("split_seed")
    seed = args.seed if split_seed is None else split_seed
    return DataConfig(**values, seed=seed, cache_dir=model.cache_dir, token=model.token)


def hub_options(arguments: ModelArguments) -> dict[str, Any]:
    """What transformers' `from_pretrained` takes of the model arguments."""
    return {
        "cache_dir": arguments.cache_dir,
        "token": arguments.token,
        "trust_remote_code": arguments.trust_remote_code,
    }


def is_sharded(args: LoRATrainingArguments) -> bool:
    """Whether parameters are to be sharded over the processes, by the flags or by `accelerate launch`."""
    by_launcher = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return bool(args.fsdp or args.deepspeed) or any(os.environ.get(name) == "true" for name in by_launcher)


def last_layer_only(args: LoRATrainingArguments, rank: int) -> str | None:
    """Why the head of a run should not read several layers, in words; None where it should.

    README, "Quality", says how that was measured: a linear probe gains three points by them, LoRA nothing.
    """
    if rank > 0:
        return "LoRA makes as much of it"
    return None if args.cache_frozen_prefix == "no" else "the states of frozen layers are cached"


def _json_object(name: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not valid JSON; got {text!r} ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f'{name} is not a JSON object; got {text!r}; expected such as {{"query": 16}}')
    return value
