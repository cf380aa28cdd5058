"""What a training run ends with: calibration, results with and without the adapter, the adapter, tables."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput

from hf_lora._files import write_text
from hf_lora.adapters.directory import TENSORS, adapter_info
from hf_lora.adapters.info import AdapterInfo
from hf_lora.cli.tables import print_class_errors, print_table
from hf_lora.data import ClassificationData
from hf_lora.lora.inject import injection, lora_disabled, trainable_parameter_count
from hf_lora.recipe.compare import Baselines
from hf_lora.tasks.calibration import MIN_EXAMPLES, Calibration
from hf_lora.tasks.metrics import BASELINES, CLASS_F1, first_output
from hf_lora.training.trainer import LoRATrainer

# What `metrics.json` keeps of the metrics of training: its loss, and where the seconds went.
_RUNTIMES = ("train_runtime", "warm_start_runtime", "evaluation_runtime", "refit_runtime")
_FROM_TRAINING = ("train_loss", *_RUNTIMES, "refit_examples")


@dataclass(frozen=True)
class Measured:
    """What one split says of the model at one moment, and the adapter's info with what was fitted on it.

    outputs: `(examples, labels)`, in the split's order.
    """

    metrics: dict[str, Any]
    class_errors: dict[str, dict[str, int]]
    info: AdapterInfo
    outputs: np.ndarray


def validated(trainer: LoRATrainer, data: ClassificationData, baselines: Baselines) -> Measured:
    """Results on the validation split; temperature and thresholds are fitted on it."""
    info = adapter_info(trainer.accelerator.unwrap_model(trainer.model)).calibrated(Calibration())
    return _results(trainer, data, baselines, info, "validation", "eval")


def finish(
    trainer: LoRATrainer,
    data: ClassificationData,
    train_metrics: dict[str, float],
    baselines: Baselines,
    validation: Measured,
) -> dict[str, Any]:
    """Evaluate on the test split, save the adapter, write and show `metrics.json`.

    validation: of `validated`, with the calibration that is saved with the adapter.
    """
    args = trainer.args
    output = Path(args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    info, errors, metrics = validation.info, validation.class_errors, dict(validation.metrics)
    if "test" in data.splits:
        test = _results(trainer, data, baselines, info, "test", "test")
        metrics |= test.metrics
        errors = test.class_errors
    injection(model).info = info
    if info.temperature is not None:
        metrics["temperature"] = info.temperature
    count = trainable_parameter_count(trainer.model)
    metrics |= {
        **{name: train_metrics[name] for name in _FROM_TRAINING if name in train_metrics},
        "trainable_parameters": count.trainable,
        "total_parameters": count.total,
        "epochs": trainer.state.epoch,
        "global_step": trainer.state.global_step,
        "peak_memory_mb": peak_memory_mb(),
    }
    trainer.facts.metrics, trainer.facts.class_errors = metrics, errors
    spent = train_metrics["train_runtime"] + train_metrics.get("refit_runtime", 0.0)
    trainer.facts.seconds, trainer.facts.device = spent, device_name(args.device)
    trainer.save_model(_internal_call=True)
    if trainer.is_world_process_zero():
        metrics["adapter_bytes"] = (output / TENSORS).stat().st_size
        metrics["class_errors"] = errors
        write_text(output / "metrics.json", json.dumps(metrics, indent=2, sort_keys=True) + "\n")
        show(metrics, errors, str(count), output)
    if args.push_to_hub:
        # Last, so that a push that fails takes nothing along.
        trainer.push_to_hub()
    return metrics


def _results(
    trainer: LoRATrainer,
    data: ClassificationData,
    baselines: Baselines,
    info: AdapterInfo,
    split: str,
    prefix: str,
) -> Measured:
    """Results on a split with the adapter and with it disabled; on the validation split `info` is fitted first."""
    result, disabled = predicted(trainer, data, split, prefix)
    if split == "validation":
        # Every process has all predictions, and fits the same.
        info = info.calibrated(data.task.calibrate(result.predictions, result.label_ids))
    metrics = measured(trainer, info, result, disabled, prefix)
    metrics |= measured_baselines(trainer, baselines.get(split, {}), result.label_ids, prefix)
    errors = data.task.class_errors(result.predictions, disabled.predictions, result.label_ids, data.labels)
    return Measured(metrics, errors, info, np.asarray(result.predictions))


def predicted(
    trainer: LoRATrainer, data: ClassificationData, split: str, prefix: str
) -> tuple[PredictionOutput, PredictionOutput]:
    """What the Trainer gives for a split with the adapter, and with it disabled."""
    result = trainer.predict(data.splits[split], metric_key_prefix=prefix)
    with lora_disabled(trainer.model):
        disabled = trainer.predict(data.splits[split], metric_key_prefix=prefix)
    first, second = (each._replace(predictions=first_output(each.predictions)) for each in (result, disabled))
    return first, second


def measured(
    trainer: LoRATrainer,
    info: AdapterInfo,
    result: PredictionOutput,
    disabled: PredictionOutput,
    prefix: str,
) -> dict[str, Any]:
    """The metrics of a split as `info` makes answers of its outputs; under `..._disabled` without the adapter.

    Under `..._uncalibrated` are those that temperature and thresholds changed, as they were before.
    """
    metrics = dict(result.metrics or {})
    timing = ("_runtime", "_per_second")
    metrics |= {
        f"{name}_disabled": value
        for name, value in (disabled.metrics or {}).items()
        if not name.endswith(timing)
    }
    for calibration, suffix, given in (
        (Calibration(), "_uncalibrated", result),
        (info.calibration, "", result),
        (info.calibration, "_disabled", disabled),
    ):
        found = info.task.reliability(given.predictions, given.label_ids, calibration)
        if found is not None:
            metrics[f"{prefix}_calibration_error{suffix}"] = found.error
    if info.thresholds is not None:
        decided = _by_thresholds(trainer, info, result)
        # The ranking of a label's scores, of which the area is, does not depend on where they are cut.
        changed = [name for name in decided if name != "roc_auc"]
        metrics |= {f"{prefix}_{name}_uncalibrated": metrics[f"{prefix}_{name}"] for name in changed}
        metrics |= {f"{prefix}_{name}": decided[name] for name in changed}
        without = _by_thresholds(trainer, info, disabled)
        metrics |= {f"{prefix}_{name}_disabled": without[name] for name in changed}
    return metrics


def measured_baselines(
    trainer: LoRATrainer, baselines: Mapping[str, np.ndarray], references: Any, prefix: str
) -> dict[str, float]:
    """The metrics of other outputs for the same examples, each under its name: `..._probe`, `..._majority`."""
    assert trainer.compute_metrics is not None
    return {
        f"{prefix}_{metric}_{name}": value
        for name, outputs in baselines.items()
        for metric, value in trainer.compute_metrics(EvalPrediction(outputs, references)).items()
        if CLASS_F1 not in metric
    }


def _by_thresholds(trainer: LoRATrainer, info: AdapterInfo, result: PredictionOutput) -> dict[str, float]:
    assert trainer.compute_metrics is not None
    outputs = info.calibration.decision_outputs(np.asarray(result.predictions))
    return trainer.compute_metrics(EvalPrediction(outputs, result.label_ids))


def show(metrics: dict[str, Any], errors: dict[str, dict[str, int]], count: str, output: Path) -> None:
    """Print the run's results as tables."""
    others = ("_disabled", "_uncalibrated", *(f"_{name}" for name in BASELINES))
    skipped = ("_runtime", "_per_second", "loss", "calibration_error", *others)
    names = [
        n
        for n in metrics
        if n.startswith(("eval_", "test_")) and not n.endswith(skipped) and CLASS_F1 not in n
    ]
    columns = {"with adapter": "", "adapter disabled": "_disabled"}
    if any(f"{name}_uncalibrated" in metrics for name in names):
        columns["at thresholds of 0.5"] = "_uncalibrated"
    columns |= {
        title: f"_{name}"
        for name, title in BASELINES.items()
        if any(f"{metric}_{name}" in metrics for metric in names)
    }
    rows = [(name, *(metrics.get(f"{name}{suffix}") for suffix in columns.values())) for name in names]
    print_table("results", ("metric", *columns), rows)
    if errors:
        print_class_errors(errors, "in metrics.json")
    facts = [
        ("parameters", count),
        ("start", f"{metrics['warm_start_runtime']:.1f} s"),
        ("training", f"{metrics['train_runtime']:.1f} s, {metrics['global_step']} steps"),
        ("peak memory", f"{metrics['peak_memory_mb']:.0f} MB"),
        ("adapter", f"{output} ({metrics['adapter_bytes'] / 1024:.0f} KiB)"),
    ]
    if "refit_runtime" in metrics:
        kept = metrics.get("refit_examples")
        outcome = "not kept" if kept is None else f"on all {kept:,} examples"
        note = "the results under eval are of the training before"
        facts.insert(3, ("refit", f"{metrics['refit_runtime']:.1f} s, {outcome}; {note}"))
    calibration = calibration_fact(metrics)
    if calibration is not None:
        facts.insert(0, ("calibration", calibration))
    print_table("run", ("what", "value"), facts)


def calibration_fact(metrics: dict[str, Any]) -> str | None:
    """The temperature with the calibration errors before and after it, in one line; None for a regression."""
    if not any(name.endswith("calibration_error") for name in metrics):
        return None
    if "temperature" not in metrics:
        return f"not fitted: that takes a validation split of at least {MIN_EXAMPLES} texts"
    errors = [
        f"{metrics[f'{prefix}_calibration_error_uncalibrated']:.4f} -> "
        f"{metrics[f'{prefix}_calibration_error']:.4f} ({split})"
        for prefix, split in (("eval", "validation"), ("test", "test"))
        if f"{prefix}_calibration_error" in metrics
    ]
    return f"temperature {metrics['temperature']:.3f}; expected calibration error {', '.join(errors)}"


def device_name(device: torch.device) -> str:
    """What the training ran on, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' * (threads != 1)} of a CPU" if device.type == "cpu" else device.type.upper()


def peak_memory_mb() -> float:
    """The largest resident memory of this process so far, in megabytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
