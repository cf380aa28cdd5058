"""The model card: YAML metadata and Markdown, and a picture of the training curve."""

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

from hf_lora._text import MANY_LABELS
from hf_lora.adapters.info import AdapterInfo
from hf_lora.lora.config import LoRAConfig
from hf_lora.lora.inject import ParameterCount
from hf_lora.models.pooling import NATIVE, POOLINGS
from hf_lora.tasks.metrics import BASELINES, CLASS_F1, class_f1

TEMPLATE = "model_card.md.jinja"
CURVE = "training_curve.png"
_NAME = "LoRA text classifier"
_SPLITS = {"eval": "validation", "test": "test"}
# The training arguments on the card, in this order.
_HYPERPARAMETERS = (
    *("learning_rate", "head_learning_rate", "lora_plus_ratio", "num_train_epochs"),
    *("per_device_train_batch_size", "max_tokens_per_batch", "gradient_accumulation_steps"),
    *("lr_scheduler_type", "warmup_steps", "weight_decay", "label_smoothing_factor", "class_weights"),
    *("optim", "seed", "bf16", "fp16"),
)
# The metrics in the metadata, and the Hub's names for them.
_HUB_METRICS = {
    "accuracy": "accuracy",
    "f1_macro": "f1",
    "f1_micro": "f1",
    "matthews_correlation": "matthews_correlation",
    "pearson": "pearsonr",
    "mse": "mse",
}
_BASELINE_ENDS = tuple(f"_{name}" for name in BASELINES)
# The endings of keys that are no results of the adapter itself.
_OTHER_ENDS = ("_runtime", "_per_second", "_disabled", "_uncalibrated", "calibration_error", *_BASELINE_ENDS)

# The lines of the training curve: key in the Trainer's log, name, and style.
_LINES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("loss", "training loss", {"color": "#4a6fa5"}),
    ("eval_loss", "validation loss", {"color": "#c1666b", "marker": "o"}),
    ("eval_accuracy", "validation accuracy", {"color": "#48806a", "marker": "o", "linestyle": "--"}),
)


@dataclass
class RunSummary:
    """The results of a run, and the user's words about model and data.

    dataset_name: a Hub data set id; None for local files.
    metrics: by name; `eval_...` for the validation split, `test_...` for the test split.
    label_counts: by split and label. class_errors: by label, as `class_errors` and `class_errors_beside` count them.
    seconds: the time of the training, without evaluations. device: the name of the device.
    place: the repository or relative directory that the snippets name.
    """

    model_name: str | None = None
    dataset_name: str | None = None
    license: str | None = None
    language: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    label_counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    class_errors: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    seconds: float | None = None
    device: str | None = None
    place: str | None = None


def render_card(
    info: AdapterInfo,
    config: LoRAConfig,
    count: ParameterCount,
    *,
    run: RunSummary,
    args: Any = None,
    log_history: Sequence[Mapping[str, Any]] = (),
    curve: str | None = None,
) -> str:
    """The text of the card: YAML metadata and Markdown.

    args: the TrainingArguments of the run; log_history: the Trainer's; curve: the file name of the curve's picture.
    """
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"cell": _cell, "number": _number}
    template = environment.from_string(
        resources.files("hf_lora.adapters").joinpath(TEMPLATE).read_text("utf-8")
    )
    return template.render(
        metadata=_metadata(info, run).to_yaml(),
        name=run.model_name or _NAME,
        info=info,
        pooled=None if info.pooling == NATIVE else POOLINGS.get(info.pooling).words,
        config=config,
        count=count,
        run=run,
        results=_results(run.metrics),
        baselines_split=_baselines_split(run.metrics),
        calibration=_calibration(run.metrics),
        hyperparameters=_hyperparameters(args),
        history=_history(log_history),
        curve=curve,
        place=run.place or "<this repository or directory>",
        classes=_classes(run.class_errors),
        many=MANY_LABELS,
        worse=[
            label
            for label, row in run.class_errors.items()
            if row["wrong"] > row.get("wrong_disabled", row["wrong"])
        ],
        torch_version=importlib.metadata.version("torch").partition("+")[0],
    )


def training_curve(log_history: Sequence[Mapping[str, Any]]) -> bytes | None:
    """A PNG of losses and accuracy by step; None for a log without two points, or without matplotlib.

    It has no date in it, so that the same log gives the same bytes.
    """
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
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    return picture.getvalue()


def _cell(text: Any) -> str:
    """The text as one cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _metadata(info: AdapterInfo, run: RunSummary) -> ModelCardData:
    base = _hub_id(info.base_model.name_or_path)
    tags = ["lora", "transformers", "hf_lora", "peft"] + ([f"base_model:adapter:{base}"] if base else [])
    parts = (key.partition("_") for key in run.metrics)
    listed = [(split, name) for split, _, name in parts if split in _SPLITS and name in _HUB_METRICS]
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=run.dataset_name or "local",
            dataset_name=run.dataset_name or "local files",
            dataset_split=_SPLITS[split],
            metric_type=_HUB_METRICS[name],
            metric_name=name,
            metric_value=round(float(run.metrics[f"{split}_{name}"]), 6),
        )
        for split, name in listed
    ]
    return ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        datasets=run.dataset_name,
        language=run.language,
        license=run.license,
        library_name="peft",
        pipeline_tag="text-classification",
        tags=tags,
        model_name=run.model_name or _NAME,
        eval_results=results or None,
        metrics=sorted({_HUB_METRICS[name] for _, name in listed}) or None,
    )


def _hub_id(name: str | None) -> str | None:
    """The name if it can be a Hub id; the Hub refuses cards that name a local directory."""
    if name is None or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _results(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each metric: its value on the validation and test split, and those of the baselines."""
    names = dict.fromkeys(
        key.partition("_")[2]
        for key, value in metrics.items()
        if key.startswith(("eval_", "test_"))
        and not key.endswith(_OTHER_ENDS)
        and CLASS_F1 not in key
        and isinstance(value, float)
    )
    split = _best_split(metrics)
    return [
        {
            "name": name,
            "eval": metrics.get(f"eval_{name}"),
            "test": metrics.get(f"test_{name}"),
            **{baseline: metrics.get(f"{split}_{name}_{baseline}") for baseline in BASELINES},
        }
        for name in names
    ]


def _best_split(metrics: Mapping[str, Any]) -> str:
    """The split of the baselines: the test split where there is one."""
    return "test" if any(key.startswith("test_") for key in metrics) else "eval"


def _baselines_split(metrics: Mapping[str, Any]) -> str | None:
    """The name of the split of the baselines; None if there are none."""
    measured = any(key.endswith(_BASELINE_ENDS) for key in metrics)
    return _SPLITS[_best_split(metrics)] if measured else None


def _calibration(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By split, the expected calibration error before and after the temperature."""
    return [
        {"split": name, "before": metrics[f"{key}_uncalibrated"], "after": metrics[key]}
        for key, name in ((f"{split}_calibration_error", name) for split, name in _SPLITS.items())
        if f"{key}_uncalibrated" in metrics
    ]


def _classes(errors: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """One row for each label: counts, precision, recall and F1; None for a division by zero."""
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
    """One row for each evaluation, with the last training loss before it."""
    rows, loss = [], None
    for entry in log_history:
        loss = entry.get("loss", loss)
        if "eval_loss" in entry:
            row = {"epoch": entry.get("epoch"), "step": entry.get("step"), "loss": loss}
            rows.append({**row, "eval_loss": entry["eval_loss"], "accuracy": entry.get("eval_accuracy")})
    return rows
