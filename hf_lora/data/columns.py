"""Which columns hold the text and the label, when the user does not say."""

from __future__ import annotations

from collections.abc import Sequence

# The layouts of GLUE and of the usual Hub data sets: one text, or a pair of texts in the order of the model.
TEXT_LAYOUTS: tuple[tuple[str, ...], ...] = (
    ("text",),
    ("sentence",),
    ("content",),
    ("review",),
    ("utterance",),
    ("text", "text_pair"),
    ("text1", "text2"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
)
LABEL_COLUMNS = ("label", "labels")


def choose_text_columns(
    columns: Sequence[str], text_column: str | None, text_pair_column: str | None, source: str
) -> tuple[str, ...]:
    """Return the text column, or the two columns of a text pair.

    Columns that are given win; otherwise the one layout of `TEXT_LAYOUTS` that `columns` has is taken.

    Raises:
        ValueError: a given column does not exist, or no layout or more than one fits `source`.
    """
    if text_column is not None:
        given = (text_column,) if text_pair_column is None else (text_column, text_pair_column)
        return tuple(require_column(columns, name, source) for name in given)
    fitting = [set(layout) for layout in TEXT_LAYOUTS if set(layout) <= set(columns)]
    widest = [
        layout
        for layout in TEXT_LAYOUTS
        if set(layout) in fitting and not any(set(layout) < other for other in fitting)
    ]
    if len(widest) != 1:
        raise ValueError(_ambiguous(source, "text", columns, "text_column (and text_pair_column)"))
    return widest[0]


def choose_label_column(columns: Sequence[str], label_column: str | None, source: str) -> str:
    """Return the label column: the given one, or the one of `LABEL_COLUMNS` that `columns` has.

    Raises:
        ValueError: the given column does not exist, or none or both of the usual names do.
    """
    if label_column is not None:
        return require_column(columns, label_column, source)
    fitting = [name for name in LABEL_COLUMNS if name in columns]
    if len(fitting) != 1:
        raise ValueError(_ambiguous(source, "label", columns, "label_column"))
    return fitting[0]


def require_column(columns: Sequence[str], name: str, source: str) -> str:
    """Return `name`, or raise a ValueError that lists the columns of `source`."""
    if name not in columns:
        raise ValueError(f"{source} has no column {name!r}; its columns are {_listed(columns)}")
    return name


def _ambiguous(source: str, role: str, columns: Sequence[str], option: str) -> str:
    return f"cannot tell which column of {source} is the {role}: {_listed(columns)}; set {option}"


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in columns)
