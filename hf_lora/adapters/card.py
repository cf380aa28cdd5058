"""The training curve as a picture: losses and accuracy by step, from the Trainer's log."""

from __future__ import annotations

import importlib.metadata
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_lora.adapters.info import AdapterInfo
from hf_lora.cli.tables import MANY_LABELS
from hf_lora.lora.config import LoRAConfig
from hf_lora.lora.inject import ParameterCount
from hf_lora.models.pooling import NATIVE, POOLINGS
from hf_lora.tasks.metrics import BASELINES, CLASS_F1, class_f1

# The lines of the picture: key in the log, name, and how it is drawn.
_LINES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("loss", "training loss", {"color": "#4a6fa5"}),
    ("eval_loss", "validation loss", {"color": "#c1666b", "marker": "o"}),
    ("eval_accuracy", "validation accuracy", {"color": "#48806a", "marker": "o", "linestyle": "--"}),
)


def training_curve(log_history: Sequence[Mapping[str, Any]]) -> bytes | None:
    """A PNG of the log; None where there are not two points to join, or matplotlib is not installed."""
    points = {
        key: [(entry["step"], entry[key]) for entry in log_history if key in entry] for key, _, _ in _LINES
    }
    if max(map(len, points.values())) < 2:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for key, name, style in _LINES:
        if points[key]:
            axes.plot(*zip(*points[key], strict=True), label=name, **style)
    axes.set_xlabel("optimizer step")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return as_png(figure)


def as_png(figure: Any) -> bytes:
    """A figure of matplotlib as a PNG, without a date, so that the same run gives the same file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    return picture.getvalue()


TEMPLATE = "model_card.md.jinja"
CURVE = "training_curve.png"

# The arguments that decide a run's result, in the order the card shows them.
_HYPERPARAMETERS = (
    "learning_rate",
    "head_learning_rate",
    "lora_plus_ratio",
    "num_train_epochs",
    "per_device_train_batch_size",
    "max_tokens_per_batch",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "label_smoothing_factor",
    "class_weights",
    "optim",
    "seed",
    "bf16",
    "fp16",
)
# Metrics of the card's metadata under the Hub's names for them.
_INDEXED = {
    "accuracy": "accuracy",
    "f1_macro": "f1",
    "f1_micro": "f1",
    "matthews_correlation": "matthews_correlation",
    "pearson": "pearsonr",
    "mse": "mse",
}


_ENDS = tuple(f"_{name}" for name in BASELINES)


@dataclass
class CardFacts:
    """What a card tells beyond the adapter itself; all of it measured or given by the user."""

    model_name: str | None = None
    dataset_name: str | None = None
    """A Hub data set id, or None for local files."""
    license: str | None = None
    language: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    """Results by name: `eval_...` on the validation split, `test_...` on the test split."""
    label_counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    class_errors: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """By label: `support`, `wrong`, `false_positives`, and `wrong_disabled` with the adapter switched off."""
    seconds: float | None = None
    """How long the training took, without evaluations."""
    device: str | None = None
    """What it ran on."""
    place: str | None = None
    """The repository or relative directory that the snippets name."""


def render_card(
    info: AdapterInfo,
    config: LoRAConfig,
    count: ParameterCount,
    *,
    facts: CardFacts,
    args: Any = None,
    log_history: Sequence[Mapping[str, Any]] = (),
    curve: str | None = None,
) -> str:
    """The text of the card: YAML metadata and markdown.

    args: the TrainingArguments of the run; log_history: the Trainer's. curve: the name of its picture beside the card.
    """
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"cell": _cell, "number": _number}
    template = environment.from_string(
        resources.files("hf_lora.adapters").joinpath(TEMPLATE).read_text("utf-8")
    )
    return template.render(
        metadata=_metadata(info, facts).to_yaml(),
        name=facts.model_name or "LoRA text classifier",
        info=info,
        pooled=None if info.pooling == NATIVE else POOLINGS.get(info.pooling).words,
        config=config,
        count=count,
        facts=facts,
        results=_results(facts.metrics),
        baselines=_baselines(facts.metrics),
        calibration=_calibration(facts.metrics),
        hyperparameters=_hyperparameters(args),
        history=_history(log_history),
        curve=curve,
        place=facts.place or "<this repository or directory>",
        classes=_classes(facts.class_errors),
        many=MANY_LABELS,
        worse=[
            label
            for label, row in facts.class_errors.items()
            if row["wrong"] > row.get("wrong_disabled", row["wrong"])
        ],
        torch_version=importlib.metadata.version("torch").partition("+")[0],
    )


def _cell(text: Any) -> str:
    """Text that stays inside one cell of a markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _metadata(info: AdapterInfo, facts: CardFacts) -> ModelCardData:
    base = _hub_id(info.base_model.name_or_path)
    tags = ["lora", "transformers", "hf_lora", "peft"] + ([f"base_model:adapter:{base}"] if base else [])
    return ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        datasets=facts.dataset_name,
        language=facts.language,
        license=facts.license,
        library_name="peft",
        pipeline_tag="text-classification",
        tags=tags,
        model_name=facts.model_name or "LoRA text classifier",
        eval_results=_eval_results(facts) or None,
        metrics=sorted({_INDEXED[name] for _, name in _indexed(facts.metrics)}) or None,
    )


def _hub_id(name: str | None) -> str | None:
    """The name, if it can be one on the Hub: its card rules refuse a local directory."""
    if name is None or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _indexed(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(split, metric) of the results that the metadata lists."""
    keys = (key.partition("_") for key in metrics)
    return [(split, name) for split, _, name in keys if split in ("eval", "test") and name in _INDEXED]


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    splits = {"eval": "validation", "test": "test"}
    return [
        EvalResult(
            task_type="text-classification",
            dataset_type=facts.dataset_name or "local",
            dataset_name=facts.dataset_name or "local files",
            dataset_split=splits[split],
            metric_type=_INDEXED[name],
            metric_name=name,
            metric_value=round(float(facts.metrics[f"{split}_{name}"]), 6),
        )
        for split, name in _indexed(facts.metrics)
    ]


def _results(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each metric with its value on the validation and on the test split."""
    names = dict.fromkeys(
        key.partition("_")[2]
        for key, value in metrics.items()
        if _is_result(key) and isinstance(value, float)
    )
    split = _measured_split(metrics)
    return [
        {
            "name": name,
            "eval": metrics.get(f"eval_{name}"),
            "test": metrics.get(f"test_{name}"),
            **{suffix[1:]: metrics.get(f"{split}_{name}{suffix}") for suffix in _ENDS},
        }
        for name in names
    ]


def _measured_split(metrics: Mapping[str, Any]) -> str:
    """The split that baselines are shown on: the test split where there is one."""
    return "test" if any(key.startswith("test_") for key in metrics) else "eval"


def _baselines(metrics: Mapping[str, Any]) -> str | None:
    """What the split of the baselines is called; None where none were measured."""
    if not any(key.endswith(_ENDS) for key in metrics):
        return None
    return {"eval": "validation", "test": "test"}[_measured_split(metrics)]


def _is_result(key: str) -> bool:
    other = ("_runtime", "_per_second", "_disabled", "_uncalibrated", "calibration_error", *_ENDS)
    return key.startswith(("eval_", "test_")) and not key.endswith(other) and CLASS_F1 not in key


def _calibration(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By split, the expected calibration error before and after the temperature."""
    keys = (f"{split}_calibration_error" for split in ("eval", "test"))
    return [
        {"split": split, "before": metrics[f"{key}_uncalibrated"], "after": metrics[key]}
        for split, key in zip(("validation", "test"), keys, strict=True)
        if f"{key}_uncalibrated" in metrics
    ]


def _classes(errors: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """One row for each label: its counts, precision, recall and F1; None where a quotient has nothing below it."""
    rows = []
    for label, row in errors.items():
        right = row["support"] - row["wrong"]
        given = right + row.get("false_positives", 0)
        rows.append(
            {
                "label": label,
                **row,
                "precision": right / given if given else None,
                "recall": right / row["support"] if row["support"] else None,
                "f1": class_f1(row),
            }
        )
    return rows


def _hyperparameters(args: Any) -> list[tuple[str, Any]]:
    values = ((name, getattr(args, name, None)) for name in _HYPERPARAMETERS)
    return [
        (name, getattr(value, "value", value))
        for name, value in values
        if value is not None and value is not False
    ]


def _history(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each evaluation: epoch, step, its loss and accuracy, and the last training loss before it."""
    rows, loss = [], None
    for entry in log_history:
        loss = entry.get("loss", loss)
        if "eval_loss" in entry:
            row = {"epoch": entry.get("epoch"), "step": entry.get("step"), "loss": loss}
            rows.append({**row, "eval_loss": entry["eval_loss"], "accuracy": entry.get("eval_accuracy")})
    return rows
