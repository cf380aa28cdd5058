"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_lora._text import printable

# Of more labels than these nobody reads a row for each between two other things.
MANY_LABELS = 20


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows under a title; numbers are right-aligned, floats have four digits, None is empty.

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


def print_class_errors(errors: Mapping[str, Mapping[str, int]], whole: str) -> None:
    """Print errors by class, with the adapter and with it disabled, as `class_errors_beside` counts them.

    Of more than `MANY_LABELS` labels so many, those with the most errors; `whole` says where all of them are.
    """
    shown = list(errors.items())
    if len(shown) > MANY_LABELS:
        shown = sorted(shown, key=lambda entry: -entry[1]["wrong"])[:MANY_LABELS]
    rows = [(label, row["support"], row["wrong"], row["wrong_disabled"]) for label, row in shown]
    print_table("errors by class", ("label", "examples", "wrong", "wrong, disabled"), rows)
    if len(shown) < len(errors):
        print(f"the {len(shown)} of {len(errors):,} labels with the most errors; all of them are {whole}")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else printable(str(value))
