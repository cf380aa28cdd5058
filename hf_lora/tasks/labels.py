"""From the values of a label column to what a model is trained on: ids, vectors or numbers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time
from typing import Any
from unicodedata import category, normalize

import datasets

from hf_lora._text import shortened
from hf_lora.tasks.task import MULTI, REGRESSION, SINGLE, TASKS, Task, task_of

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_INTEGER = re.compile(r"[+-]?\d+")
_WHOLE = re.compile(r"\s*([+-]?\d+)\.0*\s*")
# As numpy prints a vector.
SPACED_BITS = re.compile(r"\s*[01]\.?0?(\s+[01]\.?0?)+\s*")
_COMMA = re.compile(r"\s*[+-]?\d+(,\d+)?\s*")
_LIKE_MISSING = ("nan", "na", "n/a", "<na>", "none", "null", "nat")
_LISTED = 10
# Of more different whole numbers than these a quantity is likelier than classes.
_MANY_NUMBERS = 20


@dataclass(frozen=True)
class LabelScheme:
    """The task, and the label names in id order. A regression has one name: that of its label column.

    why: in words, what decided on the task. warnings: what is doubtful about the labels.
    """

    task: Task
    names: tuple[str, ...]
    why: str = ""
    warnings: tuple[str, ...] = ()

    def because(self, why: str) -> LabelScheme:
        """The same with another reason, unless it is empty."""
        return replace(self, why=why or self.why)

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
    Raises ValueError: a label is missing, a classification has fewer labels than it needs, or the values suit two
    problem types.
    """
    values = read_labels(dataset, column)
    task = task_of(problem_type) if problem_type else infer_task(values)
    if problem_type is None and task.name == SINGLE:
        refuse_ambiguous(values, column)
    feature = dataset.features[column]
    declared = tuple(getattr(getattr(feature, "feature", feature), "names", None) or ())
    names = task.learn(values, column, declared)
    why = "problem_type says so" if problem_type else _reason(task, values)
    return LabelScheme(task, names, why, tuple(_doubts(task, values, names, chosen=not problem_type)))


def _reason(task: Task, values: Sequence[Any]) -> str:
    """What the values have that decided on the task."""
    present = [value for value in values if not is_missing(value)]
    if task.name == REGRESSION:
        return "the labels are numbers with a decimal point"
    if task.name == MULTI:
        return "the labels are lists"
    if all(isinstance(value, bool) for value in present):
        return "the labels are booleans"
    whole = all(is_integer(str(value)) for value in present)
    return f"the labels are {'whole numbers' if whole else 'text'}"


def refuse_ambiguous(values: Sequence[Any], column: str) -> None:
    """Raise ValueError for texts that suit single labels and something else as well."""
    rows = [(row, value) for row, value in enumerate(values, 1) if isinstance(value, str) and value.strip()]
    texts = list(dict.fromkeys(value for _, value in rows))
    numbers = {text for text in texts if NUMBER.fullmatch(text.strip())}
    choose = f"set problem_type to {SINGLE} if each is a name, else"
    if any("," in text for text in texts) and all(map(_COMMA.fullmatch, texts)):
        raise ValueError(
            f"labels in {column!r} look like numbers with a decimal comma; got {texts[0]!r}; expected a decimal point; "
            "correct them or set problem_type"
        )
    others = [(row, value) for row, value in rows if value not in numbers]
    if others and not all(map(is_integer, numbers)) and 2 * len(others) <= len(rows):
        row, value = others[0]
        raise ValueError(
            f"{len(others):,} of {len(rows):,} labels in {column!r} are no numbers; the first is {shortened(value)} in "
            f"row {row}; {choose} correct them"
        )
    if texts and all(map(SPACED_BITS.fullmatch, texts)):
        raise ValueError(
            f"labels in {column!r} look like vectors of 0 and 1; got {texts[0]!r}; {choose} write [1, 0]"
        )
    for mark in "|;,":
        parts = {text: [part.strip() for part in text.split(mark)] for text in texts if mark in text}
        # A name may hold a comma. One that is a list has parts that are names elsewhere.
        seen = (
            Counter(part for found in parts.values() for part in set(found))
            if mark != ","
            else Counter[str]()
        )
        seen.update(text.strip() for text in texts if mark not in text)
        if two := next(
            (t for t, found in parts.items() if any(seen[p] > (mark != ",") for p in found)), None
        ):
            raise ValueError(
                f"labels in {column!r} may be several, with {mark!r} between them; got {shortened(two)}; {choose} to "
                f"{MULTI}"
            )


def _doubts(task: Task, values: Sequence[Any], names: Sequence[str], *, chosen: bool) -> Iterator[str]:
    """Warnings of labels that may be meant otherwise. chosen: the task was chosen by the values."""
    present = [value for value in values if not is_missing(value)]
    numbers = [value for value in present if _is_number(value)]
    if task.name == REGRESSION:
        different = set(map(float, numbers))
        if chosen and len(different) <= _MANY_NUMBERS and all(value.is_integer() for value in different):
            yield (
                f"train: the labels are {len(different)} different whole numbers with a decimal point, taken as "
                f"numbers of a regression; if they are classes, set problem_type to {SINGLE}"
            )
        return
    alike: dict[str, list[str]] = {}
    for name in names:
        seen = (letter for letter in normalize("NFKC", name) if category(letter) not in ("Cf", "Cc"))
        alike.setdefault("".join("".join(seen).split()).casefold(), []).append(name)
    pairs = [" and ".join(map(repr, same)) for same in alike.values() if len(same) > 1]
    if pairs:
        yield f"train: labels differ by blanks, case or unseen characters alone: {'; '.join(pairs[:3])}"
    if task.name != SINGLE:
        return
    if missing := [name for name in names if name.strip().lower() in _LIKE_MISSING]:
        yield f"train: the label {missing[0]!r} is taken as a name; leave the row out if it means no label"
    if len(numbers) < len(present) <= 2 * len(numbers):
        yield f"train: {len(numbers):,} of {len(present):,} labels are numbers; all are taken as names"
    texts = {value for value in numbers if isinstance(value, str)} - set(names)
    if pointed := sorted(text for text in texts if (whole := _WHOLE.fullmatch(text)) and whole[1] in names):
        yield f"train: labels such as {pointed[0]!r} are taken as whole numbers"
    if (
        chosen
        and len(names) > _MANY_NUMBERS
        and all(map(is_integer, names))
        and 5 * len(names) > len(present)
    ):
        yield (
            f"train: the labels are {len(names)} different whole numbers, taken as classes; if they are quantities, "
            f"set problem_type to {REGRESSION}"
        )


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return NUMBER.fullmatch(value.strip()) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def infer_task(values: Sequence[Any]) -> Task:
    """The first task that the values suit: lists are multi-label, floats a regression, the rest single labels."""
    present = [value for value in values if not is_missing(value)]
    return next((task for _, task in TASKS.items() if task.suits(present)), TASKS.get(SINGLE))


def label_name(value: Any, split: str, row: int) -> str:
    """The name of a label that is a string, an integer, a whole float, a boolean or a date."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | str | date):
        return as_text(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    raise bad_label(value, split, row, "expected a string, an integer or a boolean for a class")


def as_text(value: Any) -> str:
    """A value as a CSV file has it: nothing for None, a date without a time of midnight."""
    if isinstance(value, datetime) and value.time() == time() and value.tzinfo is None:
        value = value.date()
    return "" if value is None else str(value)


def label_id(ids: dict[str, int], name: str, split: str, row: int) -> int:
    """The id of a name, or of its other spelling as a number or boolean. Raises ValueError for an unknown one."""
    if name in ids:
        return ids[name]
    whole = _WHOLE.fullmatch(name)
    booleans = (name.lower(), name.capitalize()) if name.lower() in ("true", "false") else ()
    for spelling in (whole[1] if whole else name, *booleans):
        if spelling in ids:
            return ids[spelling]
    known = ", ".join(map(repr, list(ids)[:_LISTED])) + (", ..." if len(ids) > _LISTED else "")
    near = next((other for other in ids if other.strip().casefold() == name.strip().casefold()), None)
    hint = "" if near is None else f"; did you mean {near!r}?"
    raise bad_label(name, split, row, f"it is not one of the {len(ids)} labels known: {known}{hint}")


def in_order(names: set[str]) -> tuple[str, ...]:
    """Sorted, as numbers if all are integers. `1.0` is 1 there."""
    pointed = {name: whole[1] for name in names if (whole := _WHOLE.fullmatch(name))}
    numbers = all(name in pointed or is_integer(name) for name in names)
    if numbers:
        names = {pointed.get(name, name) for name in names}
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
    """The error of a label in a row."""
    return ValueError(f"label {value!r} in the {split} split, row {row}: {problem}")
