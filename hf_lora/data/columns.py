"""Which columns hold the text and the label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_lora.data.config import DataConfig

# The layouts of GLUE and of the usual Hub data sets: one text, or a pair of texts in the order of the model.
TEXT_LAYOUTS: tuple[tuple[str, ...], ...] = (
    *(("text",), ("sentence",), ("content",), ("review",), ("utterance",)),
    *(("text", "text_pair"), ("text1", "text2"), ("sentence1", "sentence2"), ("question1", "question2")),
    *(("question", "sentence"), ("premise", "hypothesis")),
)
LABEL_COLUMNS = ("label", "labels")


def choose_columns(columns: Sequence[str], config: DataConfig, source: str) -> tuple[str, ...]:
    """Return the text column, or the two columns of a pair, and then the label column.

    Columns that `config` names win; the others are chosen by `TEXT_LAYOUTS` and `LABEL_COLUMNS`.
    Raises ValueError: a named column does not exist in `source`, or none or several fit.
    """
    if config.label_column is not None:
        label = require_column(columns, config.label_column, source)
    else:
        label = _only([name for name in LABEL_COLUMNS if name in columns], "label", columns, source)
    others = [name for name in columns if name != label]
    return *choose_text_columns(others, config.text_column, config.text_pair_column, source), label


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
        raise ValueError(f"{source} has no column {name!r}; its columns are {', '.join(map(repr, columns))}")
    return name


def _only(fitting: Sequence[Any], role: str, columns: Sequence[str], source: str, more: str = "") -> Any:
    if len(fitting) != 1:
        raise ValueError(
            f"cannot tell which column of {source} is the {role}: {', '.join(map(repr, columns))}; "
            f"set {role}_column{more}"
        )
    return fitting[0]
