"""A run's settings as one value, and what is chosen from the data where they leave it open."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_lora.adapters.directory import CONFIG
from hf_lora.data import ClassificationData
from hf_lora.data.config import DataConfig
from hf_lora.data.splits import FEW_EXAMPLES
from hf_lora.lora.config import LoRAConfig
from hf_lora.models.loading import choose_precision
from hf_lora.models.pooling import AUTO, check_pooling
from hf_lora.recipe.options import FinetuneOptions, ModelOptions, all_options, check_names, training_defaults
from hf_lora.tasks import Task
from hf_lora.training import resuming
from hf_lora.training.arguments import LoRATrainingArguments, measured
from hf_lora.training.checkpoints import checkpoints, clear_leftovers, delete, newest_complete

logger = logging.getLogger(__name__)

LAST = "last"
"""The value of `resume_from_checkpoint` that means the newest complete checkpoint."""
# A linear probe is the smallest adapter there is, whose B stays zero: PEFT's files have no rank 0.
PROBE_CONFIG = LoRAConfig(rank=1, alpha=1.0, projections="q", layers=(-1,))
# Where the examples are few, each step is led by what only these have, and there are as many steps all the same.
RATE, ENOUGH_EXAMPLES = 2e-3, 500
# Two epochs where they make so many steps, else three, and more where those make hardly any.
ENOUGH_STEPS, FEWEST_STEPS, MOST_EPOCHS = 200, 60, 30
_REQUIRED = {"model_name_or_path": "sentence-transformers/all-MiniLM-L6-v2", "output_dir": "runs/mine"}


@dataclass(frozen=True)
class Recipe:
    """Everything one run is told.

    lora: None for a linear probe, which adapts nothing. tables: data in memory, by split.
    """

    model: ModelOptions
    data: DataConfig
    lora: LoRAConfig | None
    options: FinetuneOptions
    args: LoRATrainingArguments
    tables: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError for a word of the options that has no meaning: before data are read."""
        choose_precision(self.options.precision)
        if self.options.pooling != AUTO:
            check_pooling(self.options.pooling)
        _ = self.lora_config  # its initialization is checked

    @classmethod
    def from_settings(
        cls,
        settings: Mapping[str, Any],
        *,
        tables: Mapping[str, Any] | None = None,
        objects: Mapping[str, Any] | None = None,
    ) -> Recipe:
        """From options by their names; what is left out has its default.

        tables: data in memory, by split. objects: `lora`, `data`, `options` or `args`, each in the place of the options
        of its topic. Raises ValueError, in one line, for an unknown name and for a value that is not usable.
        """
        check_names(settings)
        objects, tables, values = objects or {}, dict(tables or {}), dict(settings)
        for name, example in _REQUIRED.items():
            if not values.get(name):
                raise ValueError(f"{name} is missing; expected such as {example!r}")
        _check_objects(objects, settings)
        model = ModelOptions(**_take(values, "model"))
        data, lora, options = (_take(values, title) for title in ("data", "LoRA", "run"))
        if "args" in objects:
            args = copy.copy(objects["args"])
            args.output_dir = values["output_dir"]
        else:
            args = LoRATrainingArguments(**{**training_defaults(), **values})
        data |= {"cache_dir": model.cache_dir, "token": model.token}
        if "data" in objects:
            data_config = replace(objects["data"], **data)
        else:
            seed = args.seed if data.get("seed") is None else data["seed"]
            data_config = DataConfig(**{**data, "seed": seed})
        if not tables and not any((data_config.dataset_name, data_config.train_file, data_config.test_file)):
            raise ValueError("no data given; expected a train_file or a dataset_name")
        run_options = objects.get("options") or FinetuneOptions(**options)
        return cls(
            model=model,
            data=data_config,
            lora=objects["lora"] if "lora" in objects else lora_config(lora),
            options=run_options,
            args=measured(args, run_options.early_stopping_patience),
            tables=tables,
        )

    @property
    def lora_config(self) -> LoRAConfig:
        """What is injected: of a linear probe the smallest adapter. `init` is what `lora_init` asks for."""
        if self.lora is None:
            return PROBE_CONFIG
        return replace(self.lora, init="gradient" if self.lora_init == "auto" else self.lora_init)

    @property
    def lora_init(self) -> str:
        """`options.lora_init`; where that is auto, another initialization that the LoRAConfig names."""
        init = self.options.lora_init
        if init == "auto" and self.lora is not None and self.lora.init != "kaiming":
            return self.lora.init
        return init

    @property
    def start_options(self) -> dict[str, Any]:
        """The options of how the run starts, which a run that goes on from a checkpoint cannot take back."""
        found = {name: getattr(self.options, name) for name in ("head_init", "head_penalty")}
        return {"lora_init": self.lora_init, **found}


def with_data(
    settings: Mapping[str, Any], model: str, output_dir: str | Path | None, **splits: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings with model, output directory and the splits that are paths; and the splits in memory."""
    values = {**settings, "model_name_or_path": model, "output_dir": output_dir and str(output_dir)}
    paths = {split: table for split, table in splits.items() if isinstance(table, str | Path)}
    values |= {f"{split}_file": str(table) for split, table in paths.items()}
    return values, {name: table for name, table in splits.items() if table is not None and name not in paths}


# What may be given as an object, and the topics of options that it stands for; "": the training arguments.
_OBJECTS = {
    "lora": (LoRAConfig, "LoRA"),
    "options": (FinetuneOptions, "run"),
    "data": (DataConfig, "data"),
    "args": (TrainingArguments, ""),
}


def _check_objects(objects: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise ValueError for an object of another type, and for an option that is given beside its object."""
    of = {title: {entry.name for entry in entries} for title, entries in all_options().items()}
    of[""] = settings.keys() - of["model"] - of["data"] - of["LoRA"] - of["run"]
    for name, value in objects.items():
        kind, title = _OBJECTS[name]
        if not isinstance(value, kind):
            raise ValueError(f"{name} is no {kind.__name__}; got {type(value).__name__}")
        twice = (settings.keys() & of[title]) - {"train_file", "validation_file", "test_file", "output_dir"}
        if twice:
            raise ValueError(f"{name}= and {min(twice)} are both given; expected one of the two")


def _take(values: dict[str, Any], title: str) -> dict[str, Any]:
    """The values of a topic's options by field, removed from `values`."""
    return {entry.field: values.pop(entry.name) for entry in all_options()[title] if entry.name in values}


def lora_config(values: Mapping[str, Any]) -> LoRAConfig | None:
    """A LoRAConfig from fields as flags and YAML give them: lists, JSON texts, rank 0 for None."""
    values = dict(values)
    if values.get("rank") == 0:
        return None
    targets = values.get("target_modules")
    if isinstance(targets, Sequence) and not isinstance(targets, str) and len(targets) == 1:
        # One word may be a regular expression, or all-linear.
        plain = targets[0].replace(".", "").replace("_", "").isalnum()
        values["target_modules"] = tuple(targets) if plain else targets[0]
    for name in ("rank_pattern", "alpha_pattern"):
        values[name] = _mapping(f"lora_{name}", values.get(name))
    for name in ("target_modules", "layers"):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    return LoRAConfig(**values)


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, str):
        return value or {}
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not valid JSON; got {value!r} ({error})") from None
    if not isinstance(parsed, dict):
        raise ValueError(f'{name} is not a JSON object; got {value!r}; expected such as {{"query": 16}}')
    return parsed


def choose_rate(args: LoRATrainingArguments, examples: int) -> str:
    """Set `learning_rate` where it was left open: 2e-3, less by the root of the number of examples if they are few.

    docs/benchmarks says how that was measured. Returns the rate in words.
    """
    if args.learning_rate == 0:
        args.learning_rate = float(f"{RATE * math.sqrt(min(1.0, examples / ENOUGH_EXAMPLES)):.2g}")
    return f"learning rate {args.learning_rate:g}"


def choose_epochs(args: LoRATrainingArguments, examples: int) -> str:
    """Set `num_train_epochs` where it was left open: three, two if they make 200 steps, more to make at least 60.

    A few examples need many passes until the adapter has moved; docs/benchmarks says how that was measured.
    Returns the length of the training in words.
    """
    if args.max_steps > 0:
        return f"{args.max_steps:,} steps"
    step = args.train_batch_size * args.gradient_accumulation_steps * max(1, args.world_size)
    steps = max(1, math.ceil(examples / step))
    if args.num_train_epochs <= 0:
        usual = 2 if 2 * steps >= ENOUGH_STEPS else 3
        args.num_train_epochs = min(max(usual, math.ceil(FEWEST_STEPS / steps)), MOST_EPOCHS)
    epochs = "1 epoch" if args.num_train_epochs == 1 else f"{args.num_train_epochs:g} epochs"
    return f"{epochs} of {steps:,} steps"


def choose_smoothing(args: LoRATrainingArguments, task: Task) -> None:
    """Switch label smoothing off where there is no single label to smooth."""
    if not task.one_label:
        args.label_smoothing_factor = 0.0


def choose_refit(options: FinetuneOptions, args: LoRATrainingArguments, data: ClassificationData) -> bool:
    """Whether a run trains again on all examples in the end; docs/benchmarks says how that was measured.

    Raises ValueError where it cannot be.
    """
    refit = options.refit
    problem = "FSDP or DeepSpeed, whose weights are sharded" if is_sharded(args) else None
    if options.early_stopping_patience is not None or args.load_best_model_at_end:
        problem = "early stopping or load_best_model_at_end, for which something has to be held out"
    if refit == "always" and problem is not None:
        raise ValueError(f"refit=always cannot be done; got {problem}; use refit=never")
    few = len(data.splits["train"]) + len(data.splits["validation"]) <= FEW_EXAMPLES
    return refit == "always" or (refit == "auto" and problem is None and data.held_out and few)


def is_sharded(args: LoRATrainingArguments) -> bool:
    """Whether parameters are to be sharded over the processes, by the flags or by `accelerate launch`."""
    by_launcher = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return bool(args.fsdp or args.deepspeed) or any(os.environ.get(name) == "true" for name in by_launcher)


def last_layer_only(args: LoRATrainingArguments, is_probe: bool) -> str | None:
    """Why the head of a run should not read several layers, in words; None where it should.

    docs/benchmarks says how that was measured: a linear probe gains three points by them, LoRA nothing.
    """
    if not is_probe:
        return "LoRA makes as much of it"
    return None if args.cache_frozen_prefix == "no" else "the states of frozen layers are cached"


def check_resumed(
    checkpoint: str | None, recipe: Recipe, args: LoRATrainingArguments, data: ClassificationData
) -> None:
    """Refuse to go on from a checkpoint of another run, before the weights are loaded: the base is compared later."""
    if checkpoint is None:
        return
    now = {
        "data": resuming.data_of(data.splits["train"], data.splits["validation"]),
        "labels": list(data.labels),
        **recipe.start_options,
        **resuming.settings_of(args),
    }
    allowed = resuming.parse_allowed(getattr(args, "allow_changed", None))
    resuming.changes(Path(checkpoint), now, allowed)


def prepare_output(args: LoRATrainingArguments, *, overwrite: bool = False) -> str | None:
    """The checkpoint to resume from, if any. Raises ValueError rather than mix two runs in one directory."""
    output = Path(args.output_dir)
    clear_leftovers(output)
    resume = args.resume_from_checkpoint
    if resume == LAST:
        last, broken = newest_complete(output)
        resuming.tell_broken(last, broken)
        if last is None:
            logger.warning("no checkpoint in %s to resume from; starting from the beginning", output)
            return None
        return str(last)
    if resume is not None:
        return str(resume)
    found = checkpoints(output)
    if overwrite:
        for checkpoint in found:
            delete(checkpoint)
    elif found or (output / CONFIG).is_file():
        raise ValueError(
            f"output_dir is in use; got {str(output)!r} with {'checkpoints' if found else 'an adapter'} of an earlier "
            "run; pass --resume_from_checkpoint to go on, --overwrite_output_dir to replace it, or another directory"
        )
    return None
