"""From the values of a label column to what a model is trained on: ids, vectors or numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from hf_lora.tasks.task import SINGLE, TASKS, Task, task_of

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_INTEGER = re.compile(r"[+-]?\d+")
_LISTED = 10


@dataclass(frozen=True)
class LabelScheme:
    """The task, and the label names in id order. A regression has one name: that of its label column."""

    task: Task
    names: tuple[str, ...]

    def count(self, encoded: Sequence[Any]) -> dict[str, int]:
        """How many examples have each label; nothing for a regression."""
        counts = self.task.count(encoded, len(self.names))
        return dict(zip(self.names, counts, strict=True)) if self.task.has_classes else {}


def read_labels(dataset: datasets.Dataset, column: str) -> list[Any]:
    """The label column as plain values: the ids of a ClassLabel as names, and its -1 as None."""
    feature, values = dataset.features[column], dataset[column][:]
    item = getattr(feature, "feature", feature)
    if not isinstance(item, datasets.ClassLabel):
        return values

    def name(value: int | None) -> str | None:
        return None if value in (None, -1) else item.int2str(value)

    if item is feature:
        return [name(value) for value in values]
    return [row if row is None else [name(value) for value in row] for row in values]


def are_hidden(dataset: datasets.Dataset, column: str) -> bool:
    """Whether every label is -1, as in the test splits of GLUE."""
    return all(value == -1 for value in dataset[column])


def learn_labels(dataset: datasets.Dataset, column: str, problem_type: str | None) -> LabelScheme:
    """Learn the scheme from the training split; a problem type of None is inferred from the values.

    Integers are sorted as numbers and strings as strings; a ClassLabel keeps its names and their order.
    Raises ValueError: a label is missing, or a classification has fewer labels than it needs.
    """
    values = read_labels(dataset, column)
    task = task_of(problem_type) if problem_type else infer_task(values)
    feature = dataset.features[column]
    declared = tuple(getattr(getattr(feature, "feature", feature), "names", None) or ())
    return LabelScheme(task, task.learn(values, column, declared))


def infer_task(values: Sequence[Any]) -> Task:
    """The first task that the values suit: lists are multi-label, floats a regression, the rest single labels."""
    present = [value for value in values if not is_missing(value)]
    return next((task for _, task in TASKS.items() if task.suits(present)), TASKS.get(SINGLE))


def label_name(value: Any, split: str, row: int) -> str:
    """The name of a label that is a string, an integer, a whole float or a boolean."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | str):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    raise bad_label(value, split, row, "expected a string, an integer or a boolean for a class")


def label_id(ids: dict[str, int], name: str, split: str, row: int) -> int:
    """The id of a name. Raises ValueError for an unknown one."""
    if name not in ids:
        known = ", ".join(map(repr, list(ids)[:_LISTED])) + (", ..." if len(ids) > _LISTED else "")
        raise bad_label(name, split, row, f"it is not one of the {len(ids)} labels known: {known}")
    return ids[name]


def in_order(names: set[str]) -> tuple[str, ...]:
    """Sorted, as numbers if all are integers."""
    numbers = all(map(is_integer, names))
    return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))


def is_integer(text: str) -> bool:
    return _INTEGER.fullmatch(text.strip()) is not None


def is_missing(value: Any) -> bool:
    """Whether a label is None, NaN or blank."""
    blank = isinstance(value, str) and not value.strip()
    return value is None or blank or (isinstance(value, float) and math.isnan(value))


def require_labels(values: Sequence[Any], split: str, is_missing: Callable[[Any], bool]) -> None:
    """Raise ValueError if any label is missing."""
    if rows := [row for row, value in enumerate(values, 1) if is_missing(value)]:
        raise ValueError(
            f"{len(rows):,} of {len(values):,} examples of the {split} split have no label (null, empty, NaN "
            f"or -1); the first is row {rows[0]}; remove them or fill them in"
        )


def bad_label(value: Any, split: str, row: int, problem: str) -> ValueError:
    return ValueError(f"label {value!r} in the {split} split, row {row}: {problem}")
