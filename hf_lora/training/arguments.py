"""LoRATrainingArguments, the check of every argument, and what follows: parameter groups, silent trainings."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub import get_token
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import ParallelMode, trainer_log_levels
from transformers.utils import is_liger_kernel_available

from hf_lora._choices import nearest, unknown
from hf_lora.lora.inject import head_parameters, injection
from hf_lora.tasks import TASKS, Task, task_of
from hf_lora.tasks.metrics import CLASS_F1
from hf_lora.training import _trainer_hooks as hooks
from hf_lora.training.distributed import meets_over_cpus
from hf_lora.training.options import CACHE_MODES, LoRATrainingOptions
from hf_lora.training.resuming import parse_allowed


def class_weights(
    text: str | None,
    labels: Callable[[], Any],
    count: int,
    problem_type: str | None,
) -> Tensor | None:
    """The weights `(count,)` that `text` asks for: "balanced", or one number for each label; None: none.

    labels: reads those of all examples.

    The training loss is the mean over the examples of weight times loss, as with scikit-learn's class weights.
    Raises ValueError for a regression and for unusable numbers.
    """
    if text is None:
        return None
    if not task_of(problem_type).has_classes:
        raise ValueError("class_weights cannot be used for regression, which has no classes")
    if text == "balanced":
        return balanced_weights(labels(), count, task_of(problem_type))
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    usable = all(weight >= 0 and math.isfinite(weight) for weight in weights) and any(weights)
    if len(weights) != count or not usable:
        raise ValueError(
            f"class_weights is not usable; got {text!r}; expected 'balanced' or {count} numbers from 0 up, not all 0"
        )
    return torch.tensor(weights)


def balanced_weights(labels: Any, count: int, task: Task) -> Tensor:
    """Inverse class frequencies, `(count,)`: n / (classes * n_class), where n_class examples carry the label."""
    counts = task.count(labels[:], count)
    absent = [index for index in range(count) if counts[index] == 0]
    if absent:
        raise ValueError(
            f"class_weights='balanced' needs examples of every label; got none of label {absent[0]}"
        )
    return torch.tensor([len(labels) / (count * counts[index]) for index in range(count)])


# The sampling strategies; the first two are those that a budget of tokens can replace.
_STRATEGIES = ("random", "group_by_length", "sequential", "batch_rebalance")
_WITH_BUDGET = _STRATEGIES[:2]
_FOR_FULL_WEIGHTS = ("galore_", "apollo_", "lomo", "adalomo")
# Without what a training does besides changing the model.
_QUIET: dict[str, Any] = {
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "logging_strategy": "no",
    "report_to": [],
    "push_to_hub": False,
}


@dataclass
class LoRATrainingArguments(LoRATrainingOptions, TrainingArguments):
    """TrainingArguments with what only LoRA classifiers need, see `LoRATrainingOptions`."""

    def __post_init__(self) -> None:
        if meets_over_cpus():
            self.use_cpu = True
        hooks.check_types(self)
        self.report_to = getattr(self, "report_to", None) or []
        with hooks.one_line("the training arguments are not usable"):
            super().__post_init__()
        parse_allowed(self.allow_changed)
        above, budget = "a number above 0", self.max_tokens_per_batch
        for name in ("head_learning_rate", "lora_plus_ratio", "frozen_prefix_cache_gb"):
            value = getattr(self, name)
            self._check(name, value is None or (value > 0 and math.isfinite(value)), above)
        if self.cache_frozen_prefix not in CACHE_MODES:
            raise unknown("cache_frozen_prefix", self.cache_frozen_prefix, CACHE_MODES)
        if budget is None:
            return
        self._check("max_tokens_per_batch", isinstance(budget, int) and budget > 0, "a whole number above 0")
        if self.train_sampling_strategy not in _WITH_BUDGET:
            raise ValueError(
                "max_tokens_per_batch puts examples of similar length together; got train_sampling_strategy="
                f"{str(self.train_sampling_strategy)!r}; expected {' or '.join(_WITH_BUDGET)}; leave out one of the two"
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "max_tokens_per_batch leaves auto_find_batch_size nothing to try; got both; expected one of the two"
            )

    def _check(self, name: str, usable: bool, expected: str) -> None:
        if not usable:
            raise ValueError(f"{name} is not usable; got {getattr(self, name)!r}; expected {expected}")

    def to_dict(self) -> dict[str, Any]:
        """The arguments as trackers log them: with the LoRA settings, where a LoRATrainer has taken them."""
        lora = getattr(self, "lora_settings", None)
        return super().to_dict() | ({"lora": dict(lora)} if lora else {})


# From where an argument may be, and up to where it may not.
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (1, math.inf)),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps"), (1, math.inf)),
    **dict.fromkeys(("learning_rate", "weight_decay", "neftune_noise_alpha"), (0, math.inf)),
    "num_train_epochs": (-math.inf, math.inf),
    "label_smoothing_factor": (0, 1),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32)),
}
_CHOICES: dict[str, Iterable[str]] = {
    **dict.fromkeys(("log_level", "log_level_replica"), trainer_log_levels),
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "train_sampling_strategy": _STRATEGIES,
}
# Arguments of no use here but for these values, and why.
_NO_USE: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_names": ((None, ["labels"]), "what classification heads read"),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), ((False,), "it would cast LoRA and head for good")),
    "optim_target_modules": ((None,), "it is for the gradients of full weights"),
    "parallelism_config": ((None,), "use DDP, FSDP or DeepSpeed"),
    "debug": (([],), "underflow_overflow cannot read the masks, and there is no TPU"),
}
# What a run needs that is measured as `finetune` does.
_MEASURED = {"prediction_loss_only": False, "batch_eval_metrics": False, "eval_do_concat_batches": True}
_WAITS = "eval_strategy epoch or steps"
# What every evaluation gives.
_ALWAYS = ("loss", "runtime", "samples_per_second", "steps_per_second")


def check_arguments(args: TrainingArguments, metrics: Iterable[str] | None = None) -> None:
    """Raise ValueError, in one line, for an argument that a training could not follow; nothing is loaded for it.

    metrics: the names of the results of an evaluation, for runs that are measured; None: they are not known.
    """
    hooks.check_types(args)
    for name, (low, high) in _RANGES.items():
        value = getattr(args, name)
        _refuse_unless(value is None or low <= value < high, name, value, f"at least {low} and below {high}")
    for name, choices in _CHOICES.items():
        value = getattr(args, name)
        _refuse_unless(value in choices, name, value, f"one of {', '.join(choices)}{nearest(value, choices)}")
    for name, (values, why) in _NO_USE.items():
        _refuse_unless(getattr(args, name) in values, name, getattr(args, name), f"{values[-1]}: {why}")
    for name, contradiction, expected in _contradictions(args):
        _refuse_unless(not contradiction, name, getattr(args, name), expected)
    installed = get_available_reporting_integrations()
    for name in args.report_to or ():
        expected = (
            f"one whose package is installed: {', '.join(installed) or 'none is'}{nearest(name, installed)}"
        )
        _refuse_unless(name in installed, "report_to", name, expected)
    if metrics is not None:
        token = not args.push_to_hub or args.hub_token or get_token()
        _refuse_unless(bool(token), "push_to_hub", True, "an access token: `hf auth login`, or HF_TOKEN")
        for name, value in _MEASURED.items():
            _refuse_unless(getattr(args, name) == value, name, not value, f"{value}: results are measured")
        check_metric(args, metrics)
    hooks.try_arguments(args)


def _contradictions(args: TrainingArguments) -> Iterator[tuple[str, bool, str]]:
    """Arguments that do not go with others or with what is installed: name, whether it is so, what is expected."""
    never = args.eval_strategy == IntervalStrategy.NO
    for name, waits in (("save_strategy", "best"), ("load_best_model_at_end", True)):
        yield name, getattr(args, name) == waits and never, f"{_WAITS} beside it"
    unknown = set(args.include_for_metrics) - {"inputs", "loss"}
    yield "include_for_metrics", bool(unknown), "inputs, loss or both"
    full = str(getattr(args.optim, "value", args.optim)).startswith(_FOR_FULL_WEIGHTS)
    yield "optim", full, "an optimizer of small matrices: this one is for the gradients of full weights"
    alone = bool(args.fsdp) and args.parallel_mode != ParallelMode.DISTRIBUTED
    yield "fsdp", alone, "several processes, as `accelerate launch` starts them"
    missing = args.use_liger_kernel and not is_liger_kernel_available()
    yield "use_liger_kernel", missing, "the package liger-kernel, which is not installed"
    cached = getattr(args, "cache_frozen_prefix", "no") != "no" and args.neftune_noise_alpha is not None
    yield (
        "neftune_noise_alpha",
        cached,
        "no cache_frozen_prefix beside it, which keeps what the noise is added to",
    )


def measured(args: TrainingArguments, patience: int | None = None) -> Any:
    """The arguments of a run that is measured as `finetune` does, with what early stopping after `patience` needs.

    Raises ValueError, in one line, for what such a run could not follow, before anything is loaded.
    """
    if patience is not None:
        _refuse_unless(patience > 0, "early_stopping_patience", patience, "a whole number above 0")
        best = args.metric_for_best_model or "loss"
        _refuse_unless(args.eval_strategy != "no", "early_stopping_patience", patience, f"{_WAITS} beside it")
        args = replace(args, load_best_model_at_end=True, metric_for_best_model=best)
    classes = [args.metric_for_best_model or ""] if args.report_to else []
    names = [name for name in classes if name.removeprefix("eval_").startswith(CLASS_F1)]
    check_arguments(args, [*names, *(name for _, task in TASKS.items() for name in result_names(task))])
    return args


def result_names(task: Task, labels: Iterable[str] = ()) -> list[str]:
    """The names of an evaluation's results; labels: those whose F1 is among them."""
    rmse = ["rmse"] * ("mse" in task.metric_names)
    return [*task.metric_names, *rmse, *(f"{CLASS_F1}{label}" for label in labels)]


def check_callbacks(args: TrainingArguments, callbacks: Iterable[Any]) -> None:
    """Raise ValueError for early stopping that waits for results that never come."""
    waits = any(isinstance(each, EarlyStoppingCallback) for each in callbacks)
    if waits and (args.eval_strategy == IntervalStrategy.NO or args.metric_for_best_model is None):
        raise ValueError(
            f"early stopping needs evaluations; got eval_strategy={args.eval_strategy.value!r} and "
            f"metric_for_best_model={args.metric_for_best_model!r}; expected epoch or steps, and a result such as loss"
        )


def check_metric(args: TrainingArguments, known: Iterable[str]) -> None:
    """Raise ValueError where `metric_for_best_model` is neither the loss nor among the names that are known."""
    name, names = args.metric_for_best_model, dict.fromkeys([*_ALWAYS, *known])
    usable = name is None or name.removeprefix("eval_") in names
    _refuse_unless(usable, "metric_for_best_model", name, f"one of {', '.join(names)}{nearest(name, names)}")


def _refuse_unless(usable: bool, name: str, value: Any, expected: str) -> None:
    if not usable:
        got = " ".join(repr(getattr(value, "value", value)).split())
        raise ValueError(f"{name} is not usable; got {got}; expected {expected}")


def silent(args: TrainingArguments, **changes: Any) -> TrainingArguments:
    """The arguments of a training that changes the model and does nothing else; `changes` are made after that."""
    args = copy.copy(args)
    for name, value in (_QUIET | changes).items():
        # Strategies are enums in the arguments, compared with strings by value.
        kind = type(getattr(args, name))
        setattr(args, name, kind(value) if issubclass(kind, str) else value)
    return args


def has_own_rates(args: TrainingArguments) -> bool:
    """Whether the arguments give some parameters another learning rate."""
    return any(getattr(args, name, None) is not None for name in ("head_learning_rate", "lora_plus_ratio"))


def parameter_groups(
    model: nn.Module, plain: nn.Module, args: TrainingArguments, decayed: Iterable[str]
) -> list[dict[str, Any]]:
    """One group for each (learning rate, weight decay); decayed: the names of the parameters with weight decay.

    model: the model as it is trained, wrapped or not. plain: the same without wrappers.
    """
    usual, decayed = float(args.learning_rate), set(decayed)
    ratio = getattr(args, "lora_plus_ratio", None) or 1.0
    rates = dict.fromkeys(head_parameters(plain), getattr(args, "head_learning_rate", None) or usual)
    rates |= {f"{placement.layer}.lora_B": usual * ratio for placement in injection(plain).placements}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Without the prefixes of torch.compile and DDP.
            rate = rates.get(name.replace("_orig_mod.", "").replace("module.", ""), usual)
            decay = args.weight_decay if name in decayed else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]
