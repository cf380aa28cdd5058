"""Labelled examples in memory: a Dataset, a DatasetDict, a pandas DataFrame or a list of dicts."""

from __future__ import annotations

from typing import Any

import datasets
import pandas
import pyarrow

EXPECTED = "a path, a datasets.Dataset, a DatasetDict, a pandas DataFrame or a list of dicts"


def read_table(table: Any, split: str) -> datasets.Dataset | datasets.DatasetDict:
    """The rows of `table` as `datasets` holds them, with the meaning that they have in a file.

    A DataFrame and a list of dicts lose their index. NaN, NaT and NA are nulls, as is a key that a dict lacks.
    A column of strings and numbers becomes one of strings, as in a CSV file.
    Raises ValueError: `table` is something else, or has a column that cannot be held.
    """
    if isinstance(table, datasets.Dataset | datasets.DatasetDict):
        return table.with_format(None)
    if isinstance(table, list | tuple):
        for row, example in enumerate(table, 1):
            if not isinstance(example, dict):
                raise ValueError(
                    f"the {split} data holds a {type(example).__name__} in row {row}; expected a list of dicts, "
                    'such as [{"text": "...", "label": "..."}]'
                )
        table = pandas.DataFrame(list(table), dtype=object)
    if not isinstance(table, pandas.DataFrame):
        raise ValueError(f"the {split} data is a {type(table).__name__}; expected {EXPECTED}")
    names = [str(name) for name in table.columns]
    if len(set(names)) < len(names):
        raise ValueError(
            f"the {split} data has a column twice; got {', '.join(names)}; expected one of each name"
        )
    columns = zip(names, (table.iloc[:, place] for place in range(len(names))), strict=True)
    return datasets.Dataset(pyarrow.table({name: _column(values, name, split) for name, values in columns}))


def _column(series: pandas.Series, name: str, split: str) -> pyarrow.Array:
    values = series.astype(object).where(series.notna(), None).tolist()
    kinds = {type(value) for value in values if value is not None}
    if str in kinds and kinds <= {str, int, float, bool}:
        values = [None if value is None else str(value) for value in values]
    try:
        return pyarrow.array(values, from_pandas=True)
    except (pyarrow.ArrowException, TypeError, OverflowError) as error:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"column {name!r} of the {split} data cannot be read; got values of type {found} ({reason}); expected "
            "text, numbers or lists of them; leave the column out"
        ) from error
