"""From the values of a label column to the ids, vectors or scores that a model is trained on."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

SINGLE = "single_label_classification"
MULTI = "multi_label_classification"
REGRESSION = "regression"

_INTEGER = re.compile(r"[+-]?\d+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_LISTED = 10


@dataclass(frozen=True)
class LabelScheme:
    """The label names in id order, and the problem type that says how they become numbers.

    A regression has one name: that of its label column.
    """

    problem_type: str
    names: tuple[str, ...]

    def encode(self, values: Sequence[Any], split: str) -> list[Any]:
        """Return an id, a multi-hot vector of `len(names)` floats, or a score for each value.

        Raises:
            ValueError: a label is missing, is not one of `names`, or is not a number in a regression.
        """
        return PROBLEM_TYPES[self.problem_type].encode(values, self.names, split)

    def count(self, encoded: Sequence[Any]) -> dict[str, int]:
        """Return how many examples carry each label; nothing for a regression."""
        return PROBLEM_TYPES[self.problem_type].count(encoded, self.names)

    @property
    def working_feature(self) -> Any:
        """The column type while splits are made: single labels are a ClassLabel, which stratifying needs."""
        return datasets.ClassLabel(names=list(self.names)) if self.problem_type == SINGLE else self.feature

    @property
    def feature(self) -> Any:
        """The type of the "labels" column: int64, a list of float32, or float32."""
        return PROBLEM_TYPES[self.problem_type].feature


def read_labels(dataset: datasets.Dataset, column: str) -> list[Any]:
    """Return the label column as plain values, the ids of a ClassLabel as names and its -1 as None."""
    feature, values = dataset.features[column], dataset[column][:]
    if isinstance(feature, datasets.ClassLabel):
        return [_class_name(feature, value) for value in values]
    item = getattr(feature, "feature", None)
    if isinstance(item, datasets.ClassLabel):
        return [row if row is None else [_class_name(item, value) for value in row] for row in values]
    return values


def are_hidden(dataset: datasets.Dataset, column: str) -> bool:
    """Return whether every label is -1, as in the test splits of GLUE."""
    return all(value == -1 for value in dataset[column])


def learn_labels(dataset: datasets.Dataset, column: str, problem_type: str | None) -> LabelScheme:
    """Learn the scheme from the training split; a problem type of None is inferred from the values.

    Integers are sorted as numbers and strings as strings; a ClassLabel keeps its names and their order.

    Raises:
        ValueError: a label is missing, or a classification has fewer labels than it needs.
    """
    values = read_labels(dataset, column)
    chosen = problem_type or infer_problem_type(values)
    declared = _declared_names(dataset.features[column])
    return LabelScheme(chosen, PROBLEM_TYPES[chosen].learn(values, column, declared))


def infer_problem_type(values: Sequence[Any]) -> str:
    """Return the problem type that the values suggest.

    Lists are multi-label and floats a regression. So are strings that are all numbers, with a decimal point
    or an exponent among them: every value of a CSV file is a string. The rest is single-label.
    """
    present = [value for value in values if not _is_missing(value)]
    if any(isinstance(value, (list, tuple)) for value in present):
        return MULTI
    if any(isinstance(value, float) for value in present):
        return REGRESSION
    texts = [value for value in present if isinstance(value, str)]
    all_numbers = bool(texts) and all(_NUMBER.fullmatch(text.strip()) for text in texts)
    return REGRESSION if all_numbers and not all(map(_is_integer, texts)) else SINGLE


def _learn_single(values: Sequence[Any], column: str, declared: tuple[str, ...]) -> tuple[str, ...]:
    _require_labels(values, "train", _is_missing)
    seen = {_name(value, "train", row) for row, value in enumerate(values, 1)}
    if len(seen) < 2:
        raise ValueError(
            f"the train split has one label only in {column!r}: {min(seen)!r}; expected two or more"
        )
    return declared or _in_order(seen)


def _encode_single(values: Sequence[Any], names: Sequence[str], split: str) -> list[int]:
    _require_labels(values, split, _is_missing)
    ids = {name: index for index, name in enumerate(names)}
    return [_id(ids, _name(value, split, row), split, row) for row, value in enumerate(values, 1)]


def _count_single(encoded: Sequence[int], names: Sequence[str]) -> dict[str, int]:
    counts = Counter(encoded)
    return {name: counts[index] for index, name in enumerate(names)}


def _learn_multi(values: Sequence[Any], column: str, declared: tuple[str, ...]) -> tuple[str, ...]:
    rows = _name_lists(values, "train")
    seen = {name for row in rows for name in row}
    names = declared or _in_order(seen)
    if len(names) < 2:
        raise ValueError(f"the train split has {len(names)} labels in {column!r}; expected two or more")
    return names


def _encode_multi(values: Sequence[Any], names: Sequence[str], split: str) -> list[list[float]]:
    ids = {name: index for index, name in enumerate(names)}
    vectors = []
    for row, labels in enumerate(_name_lists(values, split), 1):
        vector = [0.0] * len(names)
        for label in labels:
            vector[_id(ids, label, split, row)] = 1.0
        vectors.append(vector)
    return vectors


def _count_multi(encoded: Sequence[Sequence[float]], names: Sequence[str]) -> dict[str, int]:
    return {name: sum(int(vector[index]) for vector in encoded) for index, name in enumerate(names)}


def _learn_regression(values: Sequence[Any], column: str, declared: tuple[str, ...]) -> tuple[str, ...]:
    return (column,)


def _encode_regression(values: Sequence[Any], names: Sequence[str], split: str) -> list[float]:
    _require_labels(values, split, _is_missing)
    return [_score(value, split, row) for row, value in enumerate(values, 1)]


def _count_regression(encoded: Sequence[float], names: Sequence[str]) -> dict[str, int]:
    return {}


@dataclass(frozen=True)
class ProblemType:
    """What one problem type does with its labels."""

    learn: Callable[[Sequence[Any], str, tuple[str, ...]], tuple[str, ...]]
    encode: Callable[[Sequence[Any], Sequence[str], str], list[Any]]
    count: Callable[[Sequence[Any], Sequence[str]], dict[str, int]]
    feature: Any


PROBLEM_TYPES: dict[str, ProblemType] = {
    SINGLE: ProblemType(_learn_single, _encode_single, _count_single, datasets.Value("int64")),
    MULTI: ProblemType(_learn_multi, _encode_multi, _count_multi, datasets.List(datasets.Value("float32"))),
    REGRESSION: ProblemType(
        _learn_regression, _encode_regression, _count_regression, datasets.Value("float32")
    ),
}


def _name_lists(values: Sequence[Any], split: str) -> list[list[str]]:
    """Return the label names of each row; strings are split on "|", or on "," where no row has a "|"."""
    _require_labels(values, split, lambda value: value is None)
    strings = [value for value in values if isinstance(value, str)]
    separator = "|" if any("|" in value for value in strings) else ","
    rows = []
    for row, value in enumerate(values, 1):
        parts = [part.strip() for part in value.split(separator)] if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)):
            raise ValueError(
                _bad_label(value, split, row, "expected a list of labels for a multi-label problem")
            )
        names = [_name(part, split, row) for part in parts if part != ""]
        if len(set(names)) < len(names):
            hint = "it has a label twice; expected names or ids of labels, not a vector of 0 and 1"
            raise ValueError(_bad_label(value, split, row, hint))
        rows.append(names)
    return rows


def _name(value: Any, split: str, row: int) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, str)):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    raise ValueError(_bad_label(value, split, row, "expected a string, an integer or a boolean for a class"))


def _id(ids: dict[str, int], name: str, split: str, row: int) -> int:
    if name not in ids:
        known = ", ".join(map(repr, list(ids)[:_LISTED])) + (", ..." if len(ids) > _LISTED else "")
        raise ValueError(
            _bad_label(name, split, row, f"it is not one of the {len(ids)} labels known: {known}")
        )
    return ids[name]


def _score(value: Any, split: str, row: int) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(_bad_label(value, split, row, "expected a finite number for a regression"))
    return score


def _class_name(feature: datasets.ClassLabel, value: int | None) -> str | None:
    return None if value is None or value == -1 else feature.int2str(value)


def _declared_names(feature: Any) -> tuple[str, ...]:
    """Return the names of a ClassLabel, or of a list of them; none for other types."""
    return tuple(getattr(getattr(feature, "feature", feature), "names", None) or ())


def _in_order(names: set[str]) -> tuple[str, ...]:
    if all(map(_is_integer, names)):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _is_integer(text: str) -> bool:
    return _INTEGER.fullmatch(text.strip()) is not None


def _is_missing(value: Any) -> bool:
    blank = isinstance(value, str) and not value.strip()
    return value is None or blank or (isinstance(value, float) and math.isnan(value))


def _require_labels(values: Sequence[Any], split: str, is_missing: Callable[[Any], bool]) -> None:
    rows = [row for row, value in enumerate(values, 1) if is_missing(value)]
    if rows:
        raise ValueError(
            f"{len(rows):,} of {len(values):,} examples of the {split} split have no label (null, empty, NaN "
            f"or -1); the first is row {rows[0]}; remove them or fill them in"
        )


def _bad_label(value: Any, split: str, row: int, problem: str) -> str:
    return f"label {value!r} in the {split} split, row {row}: {problem}"
