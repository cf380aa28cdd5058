"""Which columns hold the text and the label, and in which layout the labels of a text stand there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, NamedTuple

import datasets
import pyarrow.compute

from hf_lora._choices import nearest
from hf_lora.data.config import MAX_TEXT, DataConfig
from hf_lora.tasks import MULTI, TASKS
from hf_lora.tasks.labels import as_text, bad_label, is_missing, label_name, read_labels
from hf_lora.tasks.layouts import are_lists, are_vectors, as_bit, split_names

# The layouts of GLUE and of the usual Hub data sets: one text, or a pair of texts in the order of the model.
TEXT_LAYOUTS: tuple[tuple[str, ...], ...] = (
    *(("text",), ("sentence",), ("content",), ("review",), ("utterance",)),
    *(("text", "text_pair"), ("text1", "text2"), ("sentence1", "sentence2"), ("question1", "question2")),
    *(("question", "sentence"), ("premise", "hypothesis")),
)
LABEL_COLUMNS = ("label", "labels")

# How the labels stand in their columns, as `hf_lora.json` has it.
VALUES, NAMES, VECTORS, COLUMNS = LAYOUTS = ("values", "names", "vectors", "columns")


class Columns(NamedTuple):
    """The text column, or the two of a pair; and the label column, or one for each label."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]


def choose_columns(
    columns: Sequence[str], config: DataConfig, source: str, usual: Sequence[str] = ()
) -> Columns:
    """Return the columns of the text and of the label.

    Columns that `config` names win; then `usual`, the label columns of an adapter, if all are there; else they are
    chosen by `TEXT_LAYOUTS` and `LABEL_COLUMNS`.
    Raises ValueError: a named column does not exist in `source`, or none or several fit.
    """
    labels = tuple(require_column(columns, name, source) for name in config.label_columns)
    if not labels and usual and set(usual) <= set(columns):
        labels = tuple(usual)
    if not labels:
        fitting = [name for name in LABEL_COLUMNS if name in columns]
        labels = (
            _only(fitting, "label", columns, source, " (several if each label has a column of 0 and 1)"),
        )
    others = [name for name in columns if name not in labels]
    return Columns(choose_text_columns(others, config.text_column, config.text_pair_column, source), labels)


def choose_text_columns(
    columns: Sequence[str], text_column: str | None, text_pair_column: str | None, source: str
) -> tuple[str, ...]:
    """Return the text column, or the two columns of a text pair; raises as `choose_columns`."""
    if text_column is not None:
        given = (text_column,) if text_pair_column is None else (text_column, text_pair_column)
        return tuple(require_column(columns, name, source) for name in given)
    fitting = [layout for layout in TEXT_LAYOUTS if set(layout) <= set(columns)]
    widest = [layout for layout in fitting if not any(set(layout) < set(other) for other in fitting)]
    return _only(widest, "text", columns, source, " (and text_pair_column)")


def require_column(columns: Sequence[str], name: str, source: str) -> str:
    """Return `name`, or raise a ValueError that lists the columns of `source`."""
    if name not in columns:
        known = f"its columns are {', '.join(map(repr, columns))}{nearest(name, columns)}"
        raise ValueError(f"{source} has no column {name!r}; {known}")
    return name


def _only(fitting: Sequence[Any], role: str, columns: Sequence[str], source: str, more: str = "") -> Any:
    if len(fitting) != 1:
        raise ValueError(
            f"cannot tell which column of {source} is the {role}: {', '.join(map(repr, columns))}; "
            f"set {role}_column{more}"
        )
    return fitting[0]


def with_string_texts(dataset: datasets.Dataset, text_columns: Sequence[str], split: str) -> datasets.Dataset:
    """Turn nulls into empty texts, numbers and dates into text; leave columns of strings as they are.

    Raises ValueError: a column holds something else, or a text that is too long to be tokenized.
    """
    features, changing = dataset.features.copy(), []
    for name in text_columns:
        column = dataset.select_columns([name]).with_format("arrow")[:].column(name)
        is_string = getattr(features[name], "dtype", None) in ("string", "large_string")
        longest = pyarrow.compute.max(pyarrow.compute.utf8_length(column)).as_py() if is_string else 0
        if (longest or 0) > MAX_TEXT:
            raise ValueError(
                f"column {name!r} of the {split} split has a text of {longest:,} characters; expected at most "
                f"{MAX_TEXT:,}; cut it or divide it"
            )
        if is_string and column.null_count == 0:
            continue
        value = next((value for value in dataset[name] if value is not None), "")
        if not isinstance(value, str | int | float | date):
            held = type(value).__name__
            raise ValueError(f"column {name!r} of the {split} split holds {held} values, not text")
        features[name] = datasets.Value("string")
        changing.append(name)
    if not changing:
        return dataset
    return dataset.map(_stringify, batched=True, fn_kwargs={"columns": changing}, features=features)


def _stringify(batch: dict[str, list[Any]], columns: Sequence[str]) -> dict[str, list[str]]:
    return {name: [as_text(value) for value in batch[name]] for name in columns}


@dataclass(frozen=True)
class LabelLayout:
    """How the labels stand in their columns.

    form: of `LAYOUTS`: a value for each text, lists of names or ids, vectors of 0 and 1, or a column of 0 and 1 for
    each label. names: the labels of vectors and columns, in their order. words: the same for people.
    """

    columns: tuple[str, ...]
    form: str = VALUES
    names: tuple[str, ...] = ()
    words: str = ""

    @classmethod
    def of(
        cls,
        dataset: datasets.Dataset,
        columns: tuple[str, ...],
        problem_type: str | None,
        split: str,
        known: Sequence[str] = (),
        form: str | None = None,
    ) -> LabelLayout:
        """Find the layout in a split.

        known, form: the labels of an existing classifier, and the form in which it has read them if that is known.
        Raises ValueError: lists in the form of text cannot be read, or the columns do not fit the labels.
        """
        if len(columns) > 1:
            if known and set(columns) != set(known):
                raise ValueError(
                    f"label columns are {', '.join(columns)}; expected one for each of {', '.join(known)}"
                )
            return cls(columns, COLUMNS, columns, "a column of 0 and 1 for each label")
        values = [value for value in read_labels(dataset, columns[0]) if not is_missing(value)]
        if problem_type != MULTI and (problem_type or not _are_lists(values)):
            return cls(columns)
        lists, words = split_names(values, split, known)
        feature = dataset.features[columns[0]]
        is_declared = isinstance(getattr(feature, "feature", None), datasets.ClassLabel)
        numbered = tuple(map(str, range(len(lists[0])))) if not is_declared and are_vectors(lists) else ()
        if numbered and tuple(known) in ((), numbered) and form in (None, VECTORS, COLUMNS):
            named = f", named {numbered[0]} to {numbered[-1]}"
            return cls(columns, VECTORS, numbered, f"vectors of 0 and 1 for {len(numbered)} labels{named}")
        return cls(columns, NAMES, (), words)

    @property
    def column(self) -> str:
        """The column that has the labels after `applied`."""
        return self.columns[0] if len(self.columns) == 1 else "label"

    def applied(self, dataset: datasets.Dataset, split: str, known: Sequence[str] = ()) -> datasets.Dataset:
        """The data set with names of labels, or lists of them, in one column.

        known: the names of the labels, where they are known already.
        Raises ValueError: a value is not of this layout.
        """
        for name in self.columns:
            require_column(dataset.column_names, name, f"the {split} split")
        kept = dataset.remove_columns(
            [name for name in {*self.columns, self.column} if name in dataset.column_names]
        )
        names: Any = datasets.Value("string")
        if self.form in (VECTORS, COLUMNS):
            rows = self._ids(dataset, split)
            names = datasets.ClassLabel(names=list(self.names))
        else:
            values = read_labels(dataset, self.column)
            if self.form == VALUES or not any(isinstance(value, str) for value in values):
                return dataset
            lists, _ = split_names(values, split, known)
            rows = [row and [label_name(name, split, at) for name in row] for at, row in enumerate(lists, 1)]
        return kept.add_column(self.column, rows, feature=datasets.List(names))

    def _ids(self, dataset: datasets.Dataset, split: str) -> list[list[int]]:
        """The ids of the labels that each row has by its vector, or by its columns."""
        if self.form == COLUMNS:
            rows: Any = zip(*(dataset[name][:] for name in self.columns), strict=True)
        else:
            rows = split_names(read_labels(dataset, self.column), split)[0]
        found = []
        for number, row in enumerate(rows, 1):
            bits = list(map(as_bit, row)) if isinstance(row, list | tuple) else []
            if len(bits) != len(self.names) or None in bits:
                at = bits.index(None) if None in bits else 0
                value = row[at] if self.form == COLUMNS else row
                where = (
                    f"0 or 1 in the column {self.names[at]!r}"
                    if self.form == COLUMNS
                    else (f"a vector of {len(self.names)} times 0 or 1")
                )
                raise bad_label(value, split, number, f"expected {where}")
            found.append([label for label, bit in enumerate(bits) if bit])
        return found


def _are_lists(values: Sequence[Any]) -> bool:
    """Whether the values that are not missing are lists, or texts in the form of lists."""
    if TASKS.get(MULTI).suits(values):
        return True
    return all(isinstance(value, str) for value in values) and are_lists(values)
