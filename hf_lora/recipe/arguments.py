"""The command line's own arguments as dataclasses. Light: nothing heavy is imported, so that --help is quick.

`hf-lora train` takes these and every field of `LoRATrainingArguments`, through HfArgumentParser.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

# What is chosen from the data where it is 0, see run_settings.
FROM_DATA = ("learning_rate", "num_train_epochs")
# Defaults of the command line for fields of TrainingArguments, where those of transformers do not suit LoRA. The rate,
# the batch and the epochs are measured: README, "Quality".
TRAINING_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(FROM_DATA, 0.0),
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "warmup_steps": 0.06,
    "label_smoothing_factor": 0.1,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 20,
    "train_sampling_strategy": "group_by_length",
}
# Whether a run trains again on all examples, the held-out ones included, once it has been measured.
REFITS = ("auto", "always", "never")
# How many times the probe's penalty the head that LoRA starts from is fitted with; measured too.
HEAD_PENALTY = 30.0


def _option(default: Any = MISSING, *, help: str) -> Any:
    return (
        field(metadata={"help": help})
        if default is MISSING
        else field(default=default, metadata={"help": help})
    )


@dataclass
class ModelArguments:
    """Which pretrained model."""

    model_name_or_path: str = _option(help="Base model: a Hub id or a local directory.")
    model_revision: str | None = _option(None, help="Branch, tag or commit of the base model.")
    cache_dir: str | None = _option(None, help="Where downloads are kept; default: the Hub's own cache.")
    token: str | None = _option(None, help="Hub token; default: the one `hf auth login` stored.")
    trust_remote_code: bool = _option(False, help="Run code that the base model's repository brings.")


@dataclass
class DataArguments:
    """Which data, and what its columns mean."""

    dataset_name: str | None = _option(None, help="Data set: a Hub id.")
    dataset_config_name: str | None = _option(None, help="Configuration of the Hub data set.")
    dataset_revision: str | None = _option(None, help="Branch, tag or commit of the Hub data set.")
    train_file: str | None = _option(
        None,
        help="Training data: CSV, TSV, JSON lines, Parquet, a save_to_disk folder, or a folder with one "
        "sub-folder of text files for each label.",
    )
    validation_file: str | None = _option(
        None, help="Validation data; default: a part held out from training."
    )
    test_file: str | None = _option(None, help="Test data.")
    text_column: str | None = _option(None, help="Column of the text; default: guessed from the usual names.")
    text_pair_column: str | None = _option(None, help="Column of the second text of a pair.")
    label_column: str | None = _option(
        None, help="Column of the label; default: guessed from the usual names."
    )
    problem_type: str | None = _option(
        None,
        help="single_label_classification, multi_label_classification or regression; default: from the labels.",
    )
    max_seq_length: int = _option(
        128, help="Longer texts are cut to this many tokens; the number cut is reported."
    )
    validation_fraction: float | None = _option(
        None,
        help="Share of the training data held out when none is given; default: a fifth of up to 1,000 examples, then "
        "200 examples, but at least a tenth and one example of each label.",
    )
    split_seed: int | None = _option(
        None, help="Seed of the held-out part, of --few_shot and of --max_train_samples; default: --seed."
    )
    encoding: str = _option("utf-8", help="Character encoding of the files.")
    few_shot: int | None = _option(
        None,
        help="Use only this many training examples of each label, drawn with the split's seed. The validation part "
        "is held out of these; a validation file that is given stays whole, and so do the test data.",
    )
    max_train_samples: int | None = _option(None, help="Use only this many training examples.")
    max_eval_samples: int | None = _option(None, help="Use only this many validation examples.")
    max_test_samples: int | None = _option(None, help="Use only this many test examples.")


@dataclass
class LoRAArguments:
    """What to adapt, and how."""

    lora_rank: int = _option(8, help="Rank r of the updates; 0: no LoRA, the adapter is a linear probe.")
    lora_alpha: float = _option(16.0, help="The updates are scaled by alpha / rank.")
    lora_dropout: float = _option(0.0, help="Dropout on the input of A.")
    lora_projections: str = _option("qkvo", help="Projections to adapt: any letters of qkvo.")
    lora_target_modules: list[str] | None = _option(
        None, help="Modules to adapt by name instead: dotted suffixes, one regular expression, or all-linear."
    )
    lora_layers: list[int] | None = _option(
        None, help="Blocks to adapt, from 0, or from the end when negative."
    )
    lora_rank_pattern: str | None = _option(None, help='Other ranks by module, as JSON: {"layer.5.*": 16}.')
    lora_alpha_pattern: str | None = _option(None, help="Other alphas by module, as JSON.")
    lora_bias: str = _option("none", help="Biases to train: none, lora_only or all.")
    lora_init: str = _option(
        "auto",
        help="How A and B start: gradient (A along the gradient of the training loss), kaiming, gaussian, normal, "
        "orthogonal, pissa, olora, or auto: gradient, unless the head starts at random.",
    )
    lora_variant: str = _option(
        "lora", help="lora, dora (row norms are learned too) or lora_fa (A is not trained)."
    )
    lora_scaling: str = _option("standard", help="standard (alpha / rank) or rslora (alpha / sqrt(rank)).")
    lora_form: str = _option(
        "module", help="module, or parametrization (the update is put into the weights)."
    )
    train_head: bool = _option(True, help="Train the classification head.")
    pooling: str = _option(
        "auto",
        help="What the head reads: native (as the architecture does), cls or mean (a linear layer on the first token "
        "or on the mean of the tokens), mean_layers (on the means in three layers), or auto: what a sentence encoder's "
        "files name, for a linear probe of up to 64 labels in three layers or the last one, whichever is better on the "
        "validation part, else native.",
    )
    head_init: str = _option(
        "auto",
        help="How the head starts: probe (logistic or ridge regression on the frozen features), random, or auto: the "
        "probe, unless the checkpoint has a trained head for these labels.",
    )
    head_penalty: float = _option(
        HEAD_PENALTY,
        help="LoRA starts from a probe with so many times the penalty of the best one, which is less sure of itself; "
        "1: from the best one.",
    )


@dataclass
class RunArguments:
    """How the command runs."""

    precision: str = _option(
        "auto",
        help="Precision of the frozen weights: fp32, bf16, or auto (bf16 where the hardware multiplies it natively). "
        "LoRA and head are fp32.",
    )
    dry_run: bool = _option(
        False, help="Print the resolved configuration and the modules to adapt, and stop."
    )
    overwrite_output_dir: bool = _option(False, help="Replace what an earlier run left in output_dir.")
    refit: str = _option(
        "auto",
        help="Whether to train again on all examples once the run has been measured on the validation part: always, "
        "never, or auto: where that part was held out of up to 1,000 examples.",
    )
    early_stopping_patience: int | None = _option(
        None, help="Stop after this many evaluations without a better result; the best is kept."
    )
    model_card_license: str | None = _option(None, help="Licence of the adapter, for its model card.")
    language: str | None = _option(None, help="Language of the texts, for the model card.")


GROUPS: tuple[type, ...] = (ModelArguments, DataArguments, LoRAArguments, RunArguments)


def help_text() -> str:
    """The text of `hf-lora train --help`: every argument above with its default, made without transformers."""
    lines = [
        "usage: hf-lora train [CONFIG.yaml] --model_name_or_path M (--dataset_name D | --train_file F)",
        "                     --output_dir O [options]",
        "",
        "Fine-tune a pretrained encoder with LoRA on a text classification data set.",
        "Flags override the YAML file, which holds the same names as keys.",
    ]
    for group in GROUPS:
        lines += ["", f"{(group.__doc__ or '').rstrip('.').lower()}:"]
        for entry in fields(group):
            lines += _argument_lines(entry.name, entry.metadata["help"], entry.default)
    lines += ["", "training:"]
    lines += _argument_lines("output_dir", "Where the adapter, metrics.json and checkpoints go.", MISSING)
    lines += _argument_lines(
        "resume_from_checkpoint", "Go on from this checkpoint, or without a value from the last one.", None
    )
    lines += _argument_lines("head_learning_rate", "Learning rate of the head.", None)
    lines += _argument_lines("lora_plus_ratio", "Learning rate of B over that of A (LoRA+).", None)
    lines += _argument_lines("class_weights", "'balanced', or one number for each label.", None)
    lines += _argument_lines(
        "max_tokens_per_batch", "Tokens in a training batch, in place of its size.", None
    )
    lines += _argument_lines(
        "cache_frozen_prefix",
        "Keep the output of the frozen blocks below --lora_layers: auto, memory, disk.",
        "no",
    )
    lines += _argument_lines("frozen_prefix_cache_gb", "Memory for that; above it the disk is used.", 1.0)
    lines += _argument_lines(
        "learning_rate",
        "Learning rate; default: 2e-3, with fewer than 500 training examples less, by the root of their number.",
        None,
    )
    lines += _argument_lines(
        "num_train_epochs", "Epochs; default: 3, 2 if they make 200 steps, up to 30 to make 60.", None
    )
    lines += [
        f"  --{name} (default: {value})" for name, value in TRAINING_DEFAULTS.items() if name not in FROM_DATA
    ]
    lines += [
        "",
        "and every other argument of transformers.TrainingArguments: hf-lora train --help_all lists them.",
    ]
    return "\n".join(lines)


def _argument_lines(name: str, help: str, default: Any) -> list[str]:
    shown = "required" if default is MISSING else f"default: {default}"
    return [f"  --{name}", f"        {help} ({shown})" if default is not None else f"        {help}"]
