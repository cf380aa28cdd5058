"""What a report tells of an adapter: collected from its files, and from labelled data where there are some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_lora._files import MAX_JSON_BYTES, parse_object, read_bytes
from hf_lora.adapters.directory import TENSORS, AdapterFiles
from hf_lora.insight.inspect import Grid, Update, amplifications, grid_of, updates_of
from hf_lora.insight.judgement import Judgement
from hf_lora.insight.spectra import Amplification
from hf_lora.tasks import Task, task_of
from hf_lora.tasks.metrics import BASELINES
from hf_lora.training.checkpoints import checkpoints

METRICS, TRAINER_STATE = "metrics.json", "trainer_state.json"
# Longer histories are thinned out.
_MOST_POINTS = 1000
_ABSURD = 10**15
_SPLITS = {"eval": "validation ", "test": "test "}
# The columns of the training run's results, and how its metrics' names end there.
_COLUMNS = {
    "with the adapter": "",
    "adapter disabled": "_disabled",
    "before calibration": "_uncalibrated",
    **{title: f"_{name}" for name, title in BASELINES.items()},
}


@dataclass(frozen=True)
class Measured:
    """What was measured on labelled data, and how: `source` and `setting` in words, `truncated` texts cut."""

    judgement: Judgement
    problem_type: str
    labels: Sequence[str]
    source: str
    setting: str
    truncated: int


@dataclass(frozen=True)
class History:
    """The training curve: (step, value) of the training loss and of the validation loss, and where it was read."""

    training: Sequence[tuple[float, float]]
    validation: Sequence[tuple[float, float]]
    source: str


@dataclass
class Report:
    """All that the page tells. `missing`: sentences about what it could not tell, and why."""

    name: str
    facts: list[tuple[str, str]]
    problem_type: str | None
    labels: Sequence[str]
    updates: list[Update]
    grid: Grid
    amplified: Sequence[Amplification | None]
    history: History | None
    recorded: dict[str, Any]
    """Results of the training run, by name, as its files have them."""
    measured: Measured | None
    share: tuple[int, int] | None
    """How many parameters are trained, of how many."""
    missing: list[str] = field(default_factory=list)

    @property
    def task(self) -> Task:
        """What the problem type means, in words; that of single labels where it is not known."""
        return task_of(self.problem_type)

    @cached_property
    def recorded_columns(self) -> list[str]:
        """Under which of the columns the training run recorded anything: with the adapter, disabled, ..."""
        return [
            title
            for title, suffix in _COLUMNS.items()
            if any(f"{name}{suffix}" in self._numbers for name in self._recorded_names)
        ]

    @property
    def recorded_results(self) -> list[tuple[str, dict[str, float | None]]]:
        """The metrics of the training run: name, and a value or None for each of `recorded_columns`."""
        return [
            (
                _SPLITS[split] + metric,
                {title: self._numbers.get(f"{name}{_COLUMNS[title]}") for title in self.recorded_columns},
            )
            for name in self._recorded_names
            for split, _, metric in [name.partition("_")]
        ]

    @cached_property
    def _numbers(self) -> dict[str, float]:
        return {name: value for name, value in self.recorded.items() if _is_number(value)}

    @cached_property
    def _recorded_names(self) -> list[str]:
        other = ("_runtime", "_per_second", *filter(None, _COLUMNS.values()))
        return [n for n in self._numbers if n.partition("_")[0] in _SPLITS and not n.endswith(other)]

    @property
    def classes(self) -> Mapping[str, Mapping[str, int]]:
        """Errors by label, as measured, or else as the training run recorded them."""
        return self.measured.judgement.classes if self.measured else _class_errors(self.recorded)


def collect(
    files: AdapterFiles,
    *,
    measured: Measured | None = None,
    count: tuple[int, int] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    config: Any = None,
) -> Report:
    """The report of an adapter that was read.

    measured: on labelled data. count: (trained, all) parameters where the model was loaded; weights, config: those
    of its base, by module, `(out, in)`.
    """
    updates, missing = updates_of(files, config)
    amplified = [None] * len(updates) if weights is None else amplifications(updates, weights)
    info = files.info
    recorded = {**(info.metrics if info else {}), **_read_object(files.directory, METRICS, missing)}
    trained, total = recorded.get("trainable_parameters"), recorded.get("total_parameters")
    if count is None and all(isinstance(n, int) and 0 <= n < _ABSURD for n in (trained, total)) and total:
        count = int(trained or 0), total
    history = _history(files.directory, missing)
    if measured is None:
        missing.append(
            "confusion matrix, calibration and mistakes: no labelled data were given; try --test_file"
        )
    known = measured or info
    return Report(
        name=files.directory.resolve().name,
        facts=_facts(files, updates, recorded),
        problem_type=known.problem_type if known else None,
        labels=known.labels if known else (),
        updates=updates,
        grid=grid_of(updates),
        amplified=amplified,
        history=history,
        recorded=recorded,
        measured=measured,
        share=count,
        missing=missing,
    )


def _facts(
    files: AdapterFiles, updates: Sequence[Update], recorded: Mapping[str, Any]
) -> list[tuple[str, str]]:
    info, config = files.info, files.config
    lora = sum(tensor.numel() for key, tensor in files.tensors.items() if ".lora_" in key)
    other = sum(tensor.numel() for tensor in files.tensors.values()) - lora
    layers = sorted({update.layer for update in updates if update.layer is not None})
    roles = ", ".join(dict.fromkeys(update.role_name for update in updates))
    revision = info.base_model.revision if info else files.peft_config.get("revision")
    names = ("train_runtime", "global_step", "epochs", "refit_examples")
    seconds, steps, epochs, refitted = map(recorded.get, names)
    rows = [
        ("base model", f"{files.base_name or 'not named'}{f' at {revision}' if revision else ''}"),
        ("task", info.task.words if info else "not recorded"),
        ("labels", ", ".join(info.labels) if info else "not recorded"),
        ("longest input", f"{info.max_length} tokens" if info and info.max_length else ""),
        ("adapted", f"{len({update.module for update in updates})} modules: {roles}"),
        ("layers", f"{layers[0]} to {layers[-1]} ({len(layers)})" if layers else ""),
        ("rank, alpha", f"{config.rank}, {config.alpha:g}; {config.scaling} scaling"),
        ("dropout", f"{config.dropout:g}"),
        ("variant", config.variant),
        ("parameters", f"{lora:,} of LoRA, {other:,} of the head and other tensors"),
        ("file", f"{(files.directory / TENSORS).stat().st_size:,} bytes"),
        (
            "training",
            f"{seconds:,.0f} s, {steps:,} steps" if _is_number(seconds) and _is_number(steps) else "",
        ),
        ("epochs", f"{epochs:g}" if _is_number(epochs) else ""),
        ("refit", f"once more, on all {refitted:,} examples" if _is_number(refitted) else ""),
        ("written by", f"hf_lora {info.hf_lora_version}" if info and info.hf_lora_version else ""),
    ]
    return [(name, value) for name, value in rows if value]


def _read_object(folder: Path, name: str, missing: list[str]) -> dict[str, Any]:
    """A JSON object in a directory of somebody's; nothing if it is not there, or unusable, which is said."""
    if not (folder / name).is_file():
        return {}
    try:
        return parse_object(read_bytes(folder, name, limit=MAX_JSON_BYTES), name)
    except (ValueError, OSError) as error:
        missing.append(f"{name}: {error}")
        return {}


def _history(directory: Path, missing: list[str]) -> History | None:
    """The curve in the newest checkpoint, or in the directory where that is one itself."""
    for folder in (directory, *reversed(checkpoints(directory))):
        log = _read_object(folder, TRAINER_STATE, missing).get("log_history")
        entries = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
        training, validation = (
            [
                (entry["step"], entry[name])
                for entry in entries
                if all(_is_number(entry.get(n)) for n in ("step", name))
            ]
            for name in ("loss", "eval_loss")
        )
        if training or validation:
            source = TRAINER_STATE if folder == directory else f"{folder.name}/{TRAINER_STATE}"
            return History(_thinned(training), _thinned(validation), source)
    missing.append(
        f"training curve: neither the adapter nor a checkpoint beside it has a {TRAINER_STATE} with losses"
    )
    return None


def _class_errors(recorded: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The errors by class of metrics.json, if they have the form in which they are written."""
    classes = recorded.get("class_errors")
    keys = ("support", "wrong", "wrong_disabled")
    if not isinstance(classes, dict) or not all(
        isinstance(row, dict)
        and all(isinstance(row.get(key), int) and 0 <= row[key] < _ABSURD for key in keys)
        for row in classes.values()
    ):
        return {}
    return {label: {key: row[key] for key in keys} for label, row in classes.items()}


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return points[:: max(1, -(-len(points) // _MOST_POINTS))]


def _is_number(value: Any) -> bool:
    """Whether a value of somebody's file is a number that can be shown: finite, and no absurdity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _ABSURD
