"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_lora._text import MANY_LABELS, in_words, printable


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows under a title; numbers are right-aligned, floats have four decimals, None is empty.

    Where the output is no terminal, lines are as long as they need to be.
    """
    rows = [list(row) for row in rows]
    table = Table(title=printable(title), title_justify="left")
    for index, column in enumerate(columns):
        numeric = all(isinstance(row[index], int | float | None) for row in rows)
        table.add_column(printable(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 1_000_000
    console.print(table)


def print_columns(title: str, columns: Mapping[str, Sequence[Any]]) -> None:
    """Print columns, by their names, as `print_table` prints rows; a column without any value is left out."""
    kept = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    print_table(title, list(kept), zip(*kept.values(), strict=True))


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """Print names and values; what is None is left out."""
    print_table(title, ("what", "value"), in_words(facts))


def print_class_errors(errors: Mapping[str, Mapping[str, int]], whole: str) -> None:
    """Print errors by class, with the adapter and without, as `class_errors_beside` counts them.

    With more than `MANY_LABELS` labels only those with the most errors; `whole` says where all of them are.
    """
    shown = list(errors.items())
    if len(shown) > MANY_LABELS:
        shown = sorted(shown, key=lambda entry: -entry[1]["wrong"])[:MANY_LABELS]
    rows = [(label, row["support"], row["wrong"], row["wrong_disabled"]) for label, row in shown]
    print_table("errors by class", ("label", "examples", "wrong", "wrong without adapter"), rows)
    if len(shown) < len(errors):
        print(f"the {len(shown)} of {len(errors):,} labels with the most errors; all of them are {whole}")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else printable(str(value))
