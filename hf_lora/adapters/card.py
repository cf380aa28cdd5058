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

from hf_lora._text import MANY_LABELS, in_markdown
from hf_lora.adapters.info import AdapterInfo
from hf_lora.lora.config import LoRAConfig
from hf_lora.lora.inject import ParameterCount
from hf_lora.models.pooling import NATIVE, POOLINGS
from hf_lora.tasks.metrics import BASELINES, CLASS_F1, class_f1

TEMPLATE = "model_card.md.jinja"
CURVE = "training_curve.png"
_SPLITS = {"eval": "validation", "test": "test"}
# The training arguments on the card, in this order.
_HYPERPARAMETERS = (
    *("learning_rate", "head_learning_rate", "lora_plus_ratio", "num_train_epochs"),
    *("per_device_train_batch_size", "max_tokens_per_batch", "gradient_accumulation_steps"),
    *("lr_scheduler_type", "warmup_steps", "weight_decay", "label_smoothing_factor", "class_weights"),
    *("optim", "seed", "bf16", "fp16"),
)
# The metrics in the metadata, and the Hub's names for them.
_HUB_METRICS = {name: name for name in ("accuracy", "matthews_correlation", "mse")}
_HUB_METRICS |= {"f1_macro": "f1", "f1_micro": "f1", "pearson": "pearsonr"}
_BASELINE_ENDS = tuple(f"_{name}" for name in BASELINES)
# The endings of keys that are no results of the adapter itself.
_OTHER_ENDS = ("_runtime", "_per_second", "_disabled", "_uncalibrated", "calibration_error", *_BASELINE_ENDS)

# What a model reads, by the name of its main input; another one is not named.
READS = {"input_ids": "text", "pixel_values": "image", "input_values": "audio", "input_features": "audio"}
# The lines of the training curve, by their keys in the Trainer's log: matplotlib's options.
_LINES: dict[str, dict[str, Any]] = {
    "loss": {"label": "training loss", "color": "#4a6fa5"},
    "eval_loss": {"label": "validation loss", "color": "#c1666b", "marker": "o"},
    "eval_accuracy": {"label": "validation accuracy", "color": "#48806a", "marker": "o", "linestyle": "--"},
}


@dataclass
class RunSummary:
    """The results of a run, and the user's words about model and data.

    dataset_name: a Hub data set id; None for local files.
    metrics: by name; `eval_...` for the validation split, `test_...` for the test split.
    label_counts: by split and label. class_errors: by label, as `class_errors` and `class_errors_beside` count them.
    seconds: the time of the training, without evaluations. device: the name of the device.
    place: the repository or relative directory that the snippets name. reads: what is classified, a key of `READS`.
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
    reads: str = "text"


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
    metrics = run.metrics
    arguments = ((name, getattr(args, name, None)) for name in _HYPERPARAMETERS)
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["cell"] = in_markdown
    text = resources.files("hf_lora.adapters").joinpath(TEMPLATE).read_text("utf-8")
    return environment.from_string(text).render(
        metadata=_metadata(info, run),
        info=info,
        pooled=None if info.pooling == NATIVE else POOLINGS.get(info.pooling).words,
        config=config,
        count=count,
        run=run,
        splits=_SPLITS,
        results=_results(metrics),
        # The baselines are those of the test split where there is one.
        baselines_split="test" if any(key.startswith("test_") for key in metrics) else "eval",
        has_baselines=any(key.endswith(_BASELINE_ENDS) for key in metrics),
        hyperparameters=[
            (name, getattr(value, "value", value))
            for name, value in arguments
            if value is not None and value is not False
        ],
        log_history=log_history,
        curve=curve,
        class_f1=class_f1,
        many=MANY_LABELS,
        torch_version=importlib.metadata.version("torch").partition("+")[0],
    )


def of_log(state: Any, best: bool) -> dict[str, float]:
    """The results by name that a Trainer's log, in its state, has of the weights as they are.

    best: whether those are the weights of the best evaluation, and not of the last step.
    """
    steps = {"eval_": (best and state.best_global_step) or state.global_step, "test_": state.global_step}
    found = {
        key: value
        for entry in state.log_history
        for key, value in entry.items()
        if key[:5] in steps and entry.get("step") == steps[key[:5]]
    }
    return {key: value for key, value in found.items() if not key.endswith("_model_preparation_time")}


def training_curve(log_history: Sequence[Mapping[str, Any]]) -> bytes | None:
    """A PNG of losses and accuracy by step; None for a log without two points, or without matplotlib.

    It has no date in it, so that the same log gives the same bytes.
    """
    points = {key: [(entry["step"], entry[key]) for entry in log_history if key in entry] for key in _LINES}
    if max(map(len, points.values())) < 2:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for key, style in _LINES.items():
        if points[key]:
            axes.plot(*zip(*points[key], strict=True), **style)
    axes.set_xlabel("optimizer step")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    return picture.getvalue()


def _metadata(info: AdapterInfo, run: RunSummary) -> ModelCardData:
    base = _hub_id(info.base_model.name_or_path)
    parts = (key.partition("_") for key in run.metrics)
    listed = [(split, name) for split, _, name in parts if split in _SPLITS and name in _HUB_METRICS]
    results = [
        EvalResult(
            task_type=f"{run.reads}-classification",
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
        pipeline_tag=f"{run.reads}-classification" if run.reads else None,
        tags=["lora", "transformers", "hf_lora", "peft", *([f"base_model:adapter:{base}"] if base else [])],
        model_name=run.model_name or " ".join(f"LoRA {run.reads} classifier".split()),
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


def _results(metrics: Mapping[str, Any]) -> list[str]:
    """The names of the adapter's own results, without their splits."""
    names = {
        key.partition("_")[2]: None
        for key, value in metrics.items()
        if key.startswith(("eval_", "test_"))
        and not key.endswith(_OTHER_ENDS)
        and CLASS_F1 not in key
        and isinstance(value, float)
    }
    return list(names)
