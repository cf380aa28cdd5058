"""What a training run ends with: results with and without the adapter, the adapter, `metrics.json`, tables."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from hf_lora.atomic import write_text
from hf_lora.checkpoint import TENSORS
from hf_lora.data import ClassificationData
from hf_lora.inject import lora_disabled, trainable_parameter_count
from hf_lora.metric_classes import CLASS_F1
from hf_lora.metrics import class_errors_beside
from hf_lora.tables import print_class_errors, print_table
from hf_lora.trainer import LoRATrainer


def finish(trainer: LoRATrainer, data: ClassificationData, train_metrics: dict[str, float]) -> dict[str, Any]:
    """Evaluate with the adapter and with it disabled, save the adapter, write and show `metrics.json`."""
    args = trainer.args
    output = Path(args.output_dir)
    metrics: dict[str, Any] = {}
    errors: dict[str, dict[str, int]] = {}
    for split, prefix in (("validation", "eval"), ("test", "test")):
        if split in data.splits:
            measured, errors = evaluate_split(trainer, data, split, prefix)
            metrics |= measured
    count = trainable_parameter_count(trainer.model)
    metrics |= {
        "train_loss": train_metrics["train_loss"],
        "train_runtime": train_metrics["train_runtime"],
        "trainable_parameters": count.trainable,
        "total_parameters": count.total,
        "epochs": trainer.state.epoch,
        "global_step": trainer.state.global_step,
        "peak_memory_mb": peak_memory_mb(),
    }
    trainer.facts.metrics, trainer.facts.class_errors = metrics, errors
    trainer.facts.seconds, trainer.facts.device = train_metrics["train_runtime"], device_name(args.device)
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


def evaluate_split(
    trainer: LoRATrainer, data: ClassificationData, split: str, prefix: str
) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
    """The split's metrics (those with the adapter disabled under `..._disabled`) and errors by class."""
    result = trainer.predict(data.splits[split], metric_key_prefix=prefix)
    with lora_disabled(trainer.model):
        disabled = trainer.predict(data.splits[split], metric_key_prefix=prefix)
    timing = ("_runtime", "_per_second")
    metrics = dict(result.metrics)
    metrics |= {f"{name}_disabled": v for name, v in disabled.metrics.items() if not name.endswith(timing)}
    if data.problem_type != "single_label_classification":
        return metrics, {}
    return metrics, class_errors_beside(
        result.predictions, disabled.predictions, result.label_ids, data.labels
    )


def show(metrics: dict[str, Any], errors: dict[str, dict[str, int]], count: str, output: Path) -> None:
    """Print the run's results as tables."""
    skipped = ("_runtime", "_per_second", "_disabled", "loss")
    names = [
        n
        for n in metrics
        if n.startswith(("eval_", "test_")) and not n.endswith(skipped) and CLASS_F1 not in n
    ]
    rows = [(name, metrics[name], metrics.get(f"{name}_disabled")) for name in names]
    print_table("results", ("metric", "with adapter", "adapter disabled"), rows)
    if errors:
        print_class_errors(errors)
    facts = [
        ("parameters", count),
        ("training", f"{metrics['train_runtime']:.1f} s, {metrics['global_step']} steps"),
        ("peak memory", f"{metrics['peak_memory_mb']:.0f} MB"),
        ("adapter", f"{output} ({metrics['adapter_bytes'] / 1024:.0f} KiB)"),
    ]
    print_table("run", ("what", "value"), facts)


def device_name(device: torch.device) -> str:
    """What the training ran on, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of a CPU" if device.type == "cpu" else device.type.upper()


def peak_memory_mb() -> float:
    """The largest resident memory of this process so far, in megabytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
