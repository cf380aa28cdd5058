"""The facts of a report: from the files of an adapter, and from labelled data where they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_lora._files import MAX_JSON_BYTES, is_number, parse_object, read_bytes
from hf_lora._text import in_words
from hf_lora.adapters.directory import TENSORS, AdapterFiles
from hf_lora.adapters.peft_format import factor_place
from hf_lora.adapters.values import check_pair
from hf_lora.insight.inspect import Update, amplify, updates_of
from hf_lora.lora.inject import trainable_parameter_count
from hf_lora.tasks import Task, task_of
from hf_lora.tasks.metrics import BASELINES
from hf_lora.tasks.mistakes import Evaluation
from hf_lora.training.checkpoints import checkpoints

METRICS, TRAINER_STATE = "metrics.json", "trainer_state.json"
# A longer training curve is thinned out.
_MOST_POINTS = 1000
# Greater numbers in somebody's files are not shown.
_ABSURD = 10**15
# Facts of the training run, and their names in metrics.json.
_TRAINING = {
    "training_seconds": "train_runtime",
    "steps": "global_step",
    "epochs": "epochs",
    "retrained_on_examples": "refit_examples",
}
_SPLITS = {"eval": "validation", "test": "test"}


@dataclass(frozen=True)
class History:
    """The training curve: (step, loss) on the training and the validation data, and the file that has it."""

    training: Sequence[tuple[float, float]]
    validation: Sequence[tuple[float, float]]
    source: str


@dataclass(frozen=True)
class Report:
    """Everything on the page.

    task: None where it is not known. results: those of the training run, (metric, {column: value}).
    classes: errors by label. measured_on, setting: which data and how computed, in words.
    share: (trained, all) parameters. missing: a sentence for each thing that the page does not show.
    """

    name: str
    facts: list[tuple[str, str]]
    task: Task | None
    labels: Sequence[str]
    updates: list[Update]
    history: History | None
    results: list[tuple[str, dict[str, float | None]]]
    classes: Mapping[str, Mapping[str, int]]
    evaluation: Evaluation | None
    measured_on: str
    setting: str
    share: tuple[Any, Any] | None
    missing: list[str]


def collect(
    files: AdapterFiles,
    *,
    model: nn.Module | None = None,
    evaluation: Evaluation | None = None,
    measured_on: str = "",
    setting: str = "",
) -> Report:
    """The report of an adapter: from its files, the model with the adapter, and results on labelled data."""
    updates, missing = updates_of(files, model and model.config)
    info = files.info
    recorded = {**(info.metrics if info else {}), **_read_object(files.directory, METRICS, missing)}
    numbers = {name: value for name, value in recorded.items() if _can_show(value)}
    history = _history(files.directory, missing)
    if evaluation is None:
        missing.append(
            "confusion matrix, calibration and mistakes: no labelled data were given; try --test_file"
        )
    share = numbers.get("trainable_parameters"), numbers.get("total_parameters")
    if model is not None:
        amplify(updates, model)
        count = trainable_parameter_count(model)
        share = count.trainable, count.total
    known = evaluation or info
    task = known.task if known else None
    return Report(
        name=files.directory.resolve().name,
        facts=_facts(files, updates, numbers),
        task=task,
        labels=known.labels if known else (),
        updates=updates,
        history=history,
        results=_results(numbers, task or task_of(None)),
        classes=evaluation.classes if evaluation else _class_errors(recorded.get("class_errors")),
        evaluation=evaluation,
        measured_on=measured_on,
        setting=setting,
        share=share if all(map(_is_count, share)) and share[1] else None,
        missing=missing,
    )


def describe(files: AdapterFiles) -> dict[str, Any]:
    """Identity and sizes of an adapter, and the norm of each update, from its files alone."""
    own, config, norms = files.info, files.config, delta_norms(files)
    lora = sum(tensor.numel() for key, tensor in files.tensors.items() if ".lora_" in key)
    known = ("labels", "problem_type", "pooling", "max_length", "temperature", "thresholds")
    return {
        "directory": str(files.directory),
        "base_model": files.base_name,
        "base_revision": own.base_model.revision if own else files.peft_config.get("revision"),
        "fingerprint": own.base_model.fingerprint if own else None,
        **{name: getattr(own, name, None) for name in known},
        **{name: getattr(config, name) for name in ("rank", "alpha", "variant", "scaling")},
        "projections": own.projections if own else None,
        "target_modules": config.target_modules,
        "modules": len(norms),
        "lora_parameters": lora,
        "other_parameters": sum(tensor.numel() for tensor in files.tensors.values()) - lora,
        "bytes": (files.directory / TENSORS).stat().st_size,
        "metrics": dict(own.metrics) if own else {},
        "delta_norms": norms,
    }


def delta_norms(files: AdapterFiles) -> dict[str, float]:
    """The Frobenius norm of scaling * B A by module: the root of trace((B'B)(AA')), for any PEFT adapter.

    Raises ValueError for tensors that are no low-rank product.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in files.tensors.items():
        if place := factor_place(key):
            module, side, _ = place
            factors.setdefault(module, {})[side] = tensor
    norms = {}
    for module, pair in sorted(factors.items()):
        check_pair(pair, module, str(files.directory))
        B, A = (pair[side].double().flatten(1) for side in "BA")
        # PEFT's file has the A of a grouped convolution once for each group, beside zeros.
        A = A[: B.shape[1]]
        # The smaller of the products: neither has more values than the two factors.
        square = (
            ((B.T @ B) * (A @ A.T)).sum()
            if len(A) ** 2 <= B.shape[0] * A.shape[1]
            else (B @ A).square().sum()
        )
        norms[module] = files.config.scaling_of(module) * square.clamp(min=0).sqrt().item()
    return norms


def _facts(
    files: AdapterFiles, updates: Sequence[Update], numbers: Mapping[str, float]
) -> list[tuple[str, str]]:
    """The facts of `describe` that are fit for a page, and those of the training run."""
    facts = describe(files)
    for name in ("directory", "metrics", "delta_norms"):
        del facts[name]
    facts["roles"] = list(dict.fromkeys(update.role_name for update in updates))
    facts["dropout"] = files.config.dropout
    facts |= {title: numbers[name] for title, name in _TRAINING.items() if name in numbers}
    if files.info and files.info.hf_lora_version:
        facts["written_by"] = f"hf_lora {files.info.hf_lora_version}"
    return in_words(facts)


def _results(numbers: Mapping[str, float], task: Task) -> list[tuple[str, dict[str, float | None]]]:
    """Metrics of the training run by column; a column without any number is left out."""
    columns = {
        "with adapter": "",
        "encoder without adapter": "_disabled",
        "before calibration": "_uncalibrated",
        **{title: f"_{name}" for name, title in (BASELINES | {"majority": task.baseline}).items()},
    }
    other = ("_runtime", "_per_second", *filter(None, columns.values()))
    names = [name for name in numbers if name.partition("_")[0] in _SPLITS and not name.endswith(other)]
    columns = {title: end for title, end in columns.items() if any(name + end in numbers for name in names)}
    results = []
    for name in names:
        split, _, metric = name.partition("_")
        values = {title: numbers.get(name + end) for title, end in columns.items()}
        results.append((f"{_SPLITS[split]} {metric}".replace("_", " "), values))
    return results


def _read_object(folder: Path, name: str, missing: list[str]) -> dict[str, Any]:
    """A JSON object from somebody's directory; {} without the file, or with an unusable one, which is noted."""
    if not (folder / name).is_file():
        return {}
    try:
        return parse_object(read_bytes(folder, name, limit=MAX_JSON_BYTES), name)
    except (ValueError, OSError) as error:
        missing.append(f"{name}: {error}")
        return {}


def _history(directory: Path, missing: list[str]) -> History | None:
    """The training curve of the directory itself, or of its newest checkpoint that has one."""
    for folder in (directory, *reversed(checkpoints(directory))):
        log = _read_object(folder, TRAINER_STATE, missing).get("log_history")
        curves = []
        for name in ("loss", "eval_loss"):
            pairs: list[tuple[Any, Any]] = [
                (entry.get("step"), entry.get(name))
                for entry in (log if isinstance(log, list) else [])
                if isinstance(entry, dict)
            ]
            points = [pair for pair in pairs if all(map(_can_show, pair))]
            curves.append(points[:: max(1, -(-len(points) // _MOST_POINTS))])
        training, validation = curves
        if training or validation:
            source = TRAINER_STATE if folder == directory else f"{folder.name}/{TRAINER_STATE}"
            return History(training, validation, source)
    missing.append(f"training curve: no {TRAINER_STATE} with losses in the adapter or a checkpoint beside it")
    return None


def _class_errors(classes: Any) -> dict[str, dict[str, int]]:
    """The errors by label in metrics.json; {} unless they have the form in which they are written."""
    keys = ("support", "wrong", "wrong_disabled")
    rows = classes.values() if isinstance(classes, dict) else [None]
    if not all(isinstance(row, dict) and all(_is_count(row.get(key)) for key in keys) for row in rows):
        return {}
    return {label: {key: row[key] for key in keys} for label, row in classes.items()}


def _can_show(value: Any) -> bool:
    return is_number(value) and abs(value) < _ABSURD


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < _ABSURD
