"""Everything a run is told, defined once: flags, YAML keys, keywords of `finetune` and the reference derive from here.

An option is a dataclass field with type, default and help. Light: neither torch nor transformers is imported, so that
`--help` and the answer to an unknown flag are quick.
"""

from __future__ import annotations

import ast
import importlib.util
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from hf_lora._choices import Keywords, nearest, option, unknown
from hf_lora.data.config import DataConfig
from hf_lora.lora.config import OTHER_NAMES, LoRAConfig
from hf_lora.training.options import LoRATrainingOptions

# How many times the probe's penalty the head that LoRA starts from is fitted with. Measured: docs/benchmarks.
HEAD_PENALTY = 30.0
HEAD_INITS = ("auto", "probe", "random")
REFITS = ("auto", "always", "never")
# Training arguments that are chosen from the data where they are 0, see `recipe.settings`.
FROM_DATA = {"learning_rate": "rate", "num_train_epochs": "epochs"}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The pretrained model."""

    model_name_or_path: str = option(help="Base model: a Hub id or a local directory.")
    model_revision: str | None = option(None, help="Branch, tag or commit of the base model.")
    cache_dir: str | None = option(None, help="Where downloads are kept; default: the Hub's own cache.")
    token: str | None = field(
        default=None, repr=False, metadata={"help": "Hub token; default: the one `hf auth login` stored."}
    )
    trust_remote_code: bool = option(False, help="Run code that the base model's repository brings.")

    @property
    def place(self) -> dict[str, Any]:
        """What transformers' `from_pretrained` takes of these besides the name."""
        hub = {name: getattr(self, name) for name in ("cache_dir", "token", "trust_remote_code")}
        return {"revision": self.model_revision, **hub}


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(Keywords):
    """How a run starts, ends and is described."""

    lora_init: str = option(
        "auto",
        help="How A and B start: gradient (A along the gradient of the training loss), kaiming, gaussian, normal, "
        "orthogonal, pissa, olora, or auto: gradient, unless the head starts at random.",
    )
    pooling: str = option(
        "auto",
        help="What the head reads: native (the architecture's own head), cls or mean (a linear layer on the first "
        "token or on the mean of the tokens), mean_layers (on the means in three layers), or auto: the pooling that a "
        "sentence encoder's files name, else native. With lora_rank 0 auto also tries three layers.",
    )
    head_init: str = option(
        "auto",
        help="How the head starts: probe (logistic or ridge regression on the frozen features), random, or auto: the "
        "probe, unless the checkpoint has a trained head for these labels.",
    )
    head_penalty: float = option(
        HEAD_PENALTY,
        help="LoRA starts from a probe with so many times the best probe's penalty, which is less confident; 1: from "
        "the best one.",
    )
    precision: str = option(
        "auto",
        help="Precision of the frozen weights: fp32, bf16, or auto (bf16 where the hardware multiplies it natively). "
        "LoRA and head are fp32.",
    )
    refit: str = option(
        "auto",
        help="Whether to retrain on all examples, the held-out ones included, after the run was measured: always, "
        "never, or auto: where the validation part was held out of up to 1,000 examples.",
    )
    early_stopping_patience: int | None = option(
        None, help="Stop after this many evaluations without a better result; the best is kept."
    )
    overwrite_output_dir: bool = option(False, help="Replace what an earlier run left in output_dir.")
    model_card_license: str | None = option(None, help="Licence of the adapter, for its model card.")
    language: str | None = option(None, help="Language of the texts, for the model card.")

    def __post_init__(self) -> None:
        for name, known in (("head_init", HEAD_INITS), ("refit", REFITS)):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Training: arguments of transformers' Trainer that have other defaults here, or that people set most."""

    output_dir: str = option(help="Where the adapter, metrics.json and checkpoints go.")
    learning_rate: float = option(
        0.0,
        help="Learning rate; 0: 2e-3, with fewer than 500 training examples less, by the root of their number.",
    )
    num_train_epochs: float = option(
        0.0, help="Epochs; 0: 3, 2 if they make 200 steps, up to 30 to make 60 steps."
    )
    per_device_train_batch_size: int = option(32, help="Training examples in a batch, on each device.")
    per_device_eval_batch_size: int = option(64, help="Examples in a batch of evaluation, on each device.")
    warmup_steps: float = option(0.06, help="Steps of warm-up; below 1: this share of all steps.")
    label_smoothing_factor: float = option(0.1, help="Label smoothing, of single labels only.")
    eval_strategy: str = option("epoch", help="When to evaluate: epoch, steps or no.")
    save_strategy: str = option("epoch", help="When to save a checkpoint: epoch, steps, best or no.")
    save_total_limit: int | None = option(2, help="How many checkpoints are kept.")
    logging_steps: float = option(20, help="Log the training loss every so many steps.")
    train_sampling_strategy: str = option(
        "group_by_length", help="Batches of similar length (group_by_length), random or sequential."
    )
    seed: int = option(42, help="Seed of everything that is drawn.")
    resume_from_checkpoint: str | None = option(
        None, help="Go on from this checkpoint; without a value from the newest one in output_dir."
    )
    push_to_hub: bool = option(False, help="Push the adapter to the Hub at the end.")
    hub_model_id: str | None = option(None, help="Where it is pushed; default: the name of output_dir.")
    report_to: list[str] | None = option(None, help="Trackers, such as tensorboard, wandb or mlflow.")


# Fields above that only describe an option of transformers, whose own default stays.
_DESCRIBED = ("output_dir", "seed", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "report_to")


@dataclass(frozen=True)
class Option:
    """One option: its name on the command line, in YAML and as a keyword; `field`: its name in `owner`."""

    name: str
    field: str
    owner: type
    type: Any
    default: Any
    help: str

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is MISSING


# Title, the dataclass that defines the options, and what stands before the names of its fields in flags.
TOPICS: tuple[tuple[str, type, str], ...] = (
    ("model", ModelOptions, ""),
    ("data", DataConfig, ""),
    ("LoRA", LoRAConfig, "lora_"),
    ("run", FinetuneOptions, ""),
    ("training", TrainingOptions, ""),
    ("training of LoRA", LoRATrainingOptions, ""),
)
# What `train --help` shows.
COMMON = (
    *("model_name_or_path", "train_file", "validation_file", "test_file", "dataset_name", "output_dir"),
    *("text_column", "text_pair_column", "label_column", "max_seq_length", "few_shot"),
    *("lora_rank", "lora_alpha", "lora_projections", "lora_layers", "pooling"),
    *("learning_rate", "num_train_epochs", "per_device_train_batch_size", "class_weights", "seed"),
    *("early_stopping_patience", "resume_from_checkpoint", "overwrite_output_dir", "push_to_hub"),
)


# Names that other tools have for options of ours.
_MEANT = {
    **{name: f"lora_{ours}" for name, ours in OTHER_NAMES.items()},
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "model": "model_name_or_path",
    "max_length": "max_seq_length",
    "rank": "lora_rank",
    "alpha": "lora_alpha",
    "target_modules": "lora_target_modules",
}


def options_of(owner: type, prefix: str = "") -> Iterator[Option]:
    """The options that a dataclass defines; a field whose flag is "" is none."""
    hints = typing.get_type_hints(owner)
    for entry in fields(owner):
        name = entry.metadata.get("flag")
        name = prefix + entry.name if name is None else name
        if name and "help" in entry.metadata:
            default = entry.metadata.get("default", entry.default)
            if default is MISSING and entry.default_factory is not MISSING:
                default = None
            hint = entry.metadata.get("type", _flag_type(hints[entry.name]))
            yield Option(name, entry.name, owner, hint, default, entry.metadata["help"])


@cache
def all_options() -> dict[str, tuple[Option, ...]]:
    """Every option of ours by topic."""
    return {title: tuple(options_of(owner, prefix)) for title, owner, prefix in TOPICS}


def training_defaults() -> dict[str, Any]:
    """Defaults of training arguments, where those of transformers do not suit LoRA. Measured: docs/benchmarks."""
    return {entry.name: entry.default for entry in fields(TrainingOptions) if entry.name not in _DESCRIBED}


@cache
def transformers_options() -> frozenset[str]:
    """The names of TrainingArguments' fields, read from the source: importing it takes seconds."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / "training_args.py").read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    body = next(node.body for node in classes if node.name == "TrainingArguments")
    targets = [node.target for node in body if isinstance(node, ast.AnnAssign)]
    return frozenset(target.id for target in targets if isinstance(target, ast.Name))


def option_names() -> set[str]:
    """Every name that `hf-lora train` and `finetune` know."""
    return {entry.name for options in all_options().values() for entry in options} | transformers_options()


def check_names(
    names: Iterable[str], what: str = "option ", also: Iterable[str] = (), prefix: str = ""
) -> None:
    """Raise ValueError, with the nearest known name, for one that is no option. also: other names that are known."""
    ours = [entry.name for options in all_options().values() for entry in options]
    known = option_names() | set(also)
    for name in names:
        if name not in known:
            near = nearest(name, [*ours, *also, *sorted(known)], prefix=prefix, meant=_MEANT)
            raise ValueError(f"unknown {what}{prefix}{name}{near or '; hf-lora train --help_all lists them'}")


def _flag_type(hint: Any) -> Any:
    """The type of a flag for a field's type: a list for a tuple, JSON text for a mapping."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    origins = [typing.get_origin(member) for member in members]
    if tuple in origins:
        return list[typing.get_args(members[origins.index(tuple)])[0]] | None  # type: ignore[misc]
    return str | None if any(o is not None and issubclass(o, Mapping) for o in origins) else hint
