"""What a run has measured, by split and side, and how it is measured and written."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput

from hf_lora._choices import nearest
from hf_lora._files import write_text
from hf_lora.adapters.directory import TENSORS, adapter_info
from hf_lora.adapters.info import AdapterInfo
from hf_lora.data import ClassificationData
from hf_lora.lora.inject import ParameterCount, injection, lora_disabled, trainable_parameter_count
from hf_lora.serving.classifier import TextClassifier
from hf_lora.tasks.calibration import Calibration
from hf_lora.tasks.metrics import CLASS_F1, errors_beside, first_output
from hf_lora.training.trainer import LoRATrainer

METRICS = "metrics.json"
# How the keys of `metrics.json` begin, by split.
PREFIXES = {"validation": "eval", "test": "test"}
# How they end, by side: with the adapter; before calibration; of the encoder without adapter; of the linear probe; of
# the best answer that does not look at the text.
SIDES = {
    "adapter": "",
    "uncalibrated": "_uncalibrated",
    "disabled": "_disabled",
    "probe": "_probe",
    "baseline": "_majority",
}
_TIMING = ("runtime", "_per_second")
# What `metrics.json` keeps of the metrics of training: its loss, and where the seconds went.
_FROM_TRAINING = (
    *("train_loss", "train_runtime", "warm_start_runtime", "evaluation_runtime"),
    *("refit_runtime", "refit_examples"),
)
# By split and name the outputs `(examples, labels)`.
Baselines = Mapping[str, Mapping[str, np.ndarray]]


class Scores(dict[str, float]):
    """Metrics by name; `scores.accuracy` is `scores["accuracy"]`."""

    def __getattr__(self, name: str) -> float:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"no metric {name!r}; expected one of {', '.join(self) or 'none'}{nearest(name, self)}"
            ) from None


@dataclass(frozen=True)
class SplitResult:
    """What was measured on one split. The adapter's metrics are attributes too: `result.test.accuracy`.

    adapter: with the adapter, decided as `predict` decides. uncalibrated: those of them that calibration changed,
    before it. disabled: the encoder without adapter. probe: the linear probe; empty where there is none. baseline: the
    majority class, or of a regression the mean predictor. class_errors: by label
    `support`, `wrong`, `false_positives` and `wrong_disabled`.
    timing: seconds, and examples and batches a second.
    """

    adapter: Scores
    disabled: Scores
    baseline: Scores
    probe: Scores = field(default_factory=Scores)
    uncalibrated: Scores = field(default_factory=Scores)
    class_errors: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    timing: Mapping[str, float] = field(default_factory=dict)

    def __getattr__(self, name: str) -> float:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.adapter, name)

    def keys(self, split: str) -> Iterator[tuple[str, float]]:
        """The entries of `metrics.json`, flat."""
        prefix = PREFIXES[split]
        for side, ending in SIDES.items():
            yield from ((f"{prefix}_{name}{ending}", value) for name, value in getattr(self, side).items())
        yield from ((f"{prefix}_{name}", value) for name, value in self.timing.items())


@dataclass(frozen=True)
class FinetuneResult:
    """A run: its results, and where they are.

    metrics: what `metrics.json` holds. parameters: trained, and all.
    """

    output_dir: Path
    validation: SplitResult
    test: SplitResult | None
    metrics: Mapping[str, Any]
    info: AdapterInfo
    parameters: ParameterCount

    @property
    def judged(self) -> tuple[str, SplitResult]:
        """The split that judges the run, and its results: test, else validation."""
        return ("validation", self.validation) if self.test is None else ("test", self.test)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels' names, in the order of the outputs."""
        return self.info.labels

    @property
    def seconds(self) -> float:
        """Seconds of training: the start, the training and a retraining, without evaluations."""
        return seconds_of(self.metrics)

    @cached_property
    def classifier(self) -> TextClassifier:
        """The classifier, loaded from `output_dir` at the first use."""
        return TextClassifier.from_pretrained(self.output_dir)


def seconds_of(metrics: Mapping[str, Any]) -> float:
    """Seconds of training in the contents of `metrics.json`."""
    return sum(metrics.get(name, 0.0) for name in ("warm_start_runtime", "train_runtime", "refit_runtime"))


def measure_validation(
    trainer: LoRATrainer, data: ClassificationData, baselines: Baselines
) -> tuple[SplitResult, AdapterInfo, np.ndarray]:
    """Results on the validation split, the adapter's info with what is fitted on it, and the outputs `(n, labels)`.

    Temperature and thresholds are fitted. Every process has all predictions, and fits the same.
    """
    info = adapter_info(trainer.accelerator.unwrap_model(trainer.model)).calibrated(Calibration())
    pair = _predicted(trainer, data, "validation")
    info = info.calibrated(info.task.calibrate(pair[0].predictions, pair[0].label_ids))
    result = _measured(trainer, data, info, pair, "validation", baselines)
    return result, info, np.asarray(pair[0].predictions)


def measure_test(
    trainer: LoRATrainer, data: ClassificationData, baselines: Baselines, info: AdapterInfo
) -> SplitResult:
    """Results on the test split, with the calibration of `info`."""
    return _measured(trainer, data, info, _predicted(trainer, data, "test"), "test", baselines)


def write_results(
    trainer: LoRATrainer,
    info: AdapterInfo,
    validation: SplitResult,
    test: SplitResult | None,
    spent: Mapping[str, float],
) -> FinetuneResult:
    """Write the adapter and `metrics.json`; push them last, so that a push that fails takes nothing along.

    spent: the metrics of training.
    """
    args, output = trainer.args, Path(trainer.args.output_dir)
    injection(trainer.accelerator.unwrap_model(trainer.model)).info = info
    count = trainable_parameter_count(trainer.model)
    metrics: dict[str, Any] = dict(validation.keys("validation"))
    metrics |= {} if test is None else dict(test.keys("test"))
    metrics |= {} if info.temperature is None else {"temperature": info.temperature}
    metrics |= {
        **{name: spent[name] for name in _FROM_TRAINING if name in spent},
        "trainable_parameters": count.trainable,
        "total_parameters": count.total,
        "epochs": trainer.state.epoch,
        "global_step": trainer.state.global_step,
        "peak_memory_mb": peak_memory_mb(),
    }
    errors = (test or validation).class_errors
    trainer.facts.metrics, trainer.facts.class_errors = metrics, errors
    trainer.facts.seconds = spent["train_runtime"] + spent.get("refit_runtime", 0.0)
    trainer.facts.device = device_name(args.device)
    trainer.save_model(_internal_call=True)
    if trainer.is_world_process_zero():
        metrics |= {"adapter_bytes": (output / TENSORS).stat().st_size, "class_errors": errors}
        write_text(output / METRICS, json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    if args.push_to_hub:
        trainer.push_to_hub()
    return FinetuneResult(output, validation, test, metrics, info, count)


def _predicted(
    trainer: LoRATrainer, data: ClassificationData, split: str
) -> tuple[PredictionOutput, PredictionOutput]:
    """What the Trainer gives for a split with the adapter, and without it."""
    prefix, dataset = PREFIXES[split], data.splits[split]
    result = trainer.predict(dataset, metric_key_prefix=prefix)
    with lora_disabled(trainer.model):
        disabled = trainer.predict(dataset, metric_key_prefix=prefix)
    first, second = (each._replace(predictions=first_output(each.predictions)) for each in (result, disabled))
    return first, second


def _measured(
    trainer: LoRATrainer,
    data: ClassificationData,
    info: AdapterInfo,
    pair: tuple[PredictionOutput, PredictionOutput],
    split: str,
    baselines: Baselines,
) -> SplitResult:
    """The metrics of a split, as `info` makes answers of its outputs. pair: of `_predicted`."""
    compute: Any = trainer.compute_metrics
    prefix, (result, disabled) = f"{PREFIXES[split]}_", pair
    found, without = (
        {name.removeprefix(prefix): value for name, value in (given.metrics or {}).items()} for given in pair
    )
    timing = {name: found.pop(name) for name in list(found) if name.endswith(_TIMING)}
    sides = {"adapter": Scores(found), "uncalibrated": Scores()}
    sides["disabled"] = Scores({name: without[name] for name in found if name in without})
    for side, calibration, given in (
        ("uncalibrated", Calibration(), result),
        ("adapter", info.calibration, result),
        ("disabled", info.calibration, disabled),
    ):
        reliability = info.task.reliability(given.predictions, given.label_ids, calibration)
        if reliability is not None:
            sides[side]["calibration_error"] = reliability.error
    for side, given in (("adapter", result), ("disabled", disabled)) if info.thresholds is not None else ():
        outputs = info.calibration.decision_outputs(np.asarray(given.predictions))
        decided = compute(EvalPrediction(outputs, given.label_ids))
        # The ranking of a label's scores, of which the area is, does not depend on where they are cut.
        decided.pop("roc_auc", None)
        if side == "adapter":
            sides["uncalibrated"] |= {name: sides[side][name] for name in decided}
        sides[side] |= decided
    for name, outputs in baselines.get(split, {}).items():
        values = compute(EvalPrediction(outputs, result.label_ids))
        kept = {metric: value for metric, value in values.items() if CLASS_F1 not in metric}
        sides["probe" if name == "probe" else "baseline"] = Scores(kept)
    chosen, before = result.predictions.argmax(-1), disabled.predictions.argmax(-1)
    errors = errors_beside(chosen, before, result.label_ids, data.labels) if info.task.one_label else {}
    return SplitResult(**sides, class_errors=errors, timing=timing)


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
