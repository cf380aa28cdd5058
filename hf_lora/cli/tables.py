"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from hf_lora._text import MANY_LABELS, in_words, printable

if TYPE_CHECKING:
    from hf_lora.insight.inspect import Comparison, Update
    from hf_lora.insight.spectra import Amplification

# The ranks whose energy `inspect` shows; its JSON has all of them.
_ENERGY_RANKS = (1, 2, 4, 8, 16, 32)
# Names of columns, and the attributes that they show.
_NORMS = {"norm": "norm", "effective rank": "effective_rank", "stable rank": "stable_rank"}
_RELATIVE = {"norm / W": "relative", "amplification": "factor"}
_AMPLIFICATION = {
    "directions": "directions",
    "norm of ΔW": "update",
    "norm of W": "weight",
    "W in those of ΔW": "in_update",
    "W in its own": "in_weight",
    "W in random ones": "in_random",
}
_SUMMARY = {
    "updates": "count",
    "norm": "norm",
    "mean effective rank": "effective_rank",
    "mean norm / W": "relative",
    "mean amplification": "factor",
}


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


def print_updates(adapter: str, updates: Sequence[Update], amplified: Sequence[Amplification | None]) -> None:
    """Print what each update of an adapter is and does to its weight."""
    places, spectra = _places(updates), [update.spectrum for update in updates]
    ranks = [update.rank for update in updates]
    values = _values(spectra, _NORMS) | _values(amplified, _RELATIVE)
    print_columns(f"{adapter}: updates", {**places, "rank": ranks, **values})
    if any(amplified):
        title = "amplification: norms of U' W V in the leading directions"
        print_columns(title, places | _values(amplified, _AMPLIFICATION))
    shown = [rank for rank in _ENERGY_RANKS if rank < max(ranks, default=0)]
    energy = {str(rank): [spectrum.energy(rank) for spectrum in spectra] for rank in shown}
    needed = {f"rank for {share:.0%}": [entry.rank_for(share) for entry in spectra] for share in (0.9, 0.99)}
    print_columns("energy kept at rank", {**places, **energy, **needed})


def print_summary(what: str, entries: Sequence[Mapping[str, Any]]) -> None:
    """Print what `summarize` returned for the updates by role or by layer."""
    columns = {what: "name", **_SUMMARY}
    print_columns(f"by {what}", {name: [entry[key] for entry in entries] for name, key in columns.items()})


def print_comparison(title: str, compared: Sequence[Comparison]) -> None:
    """Print how similar the subspaces of two adapters are."""
    phi = {
        f"{side} {name}": [entry.sides[side][key] for entry in compared]
        for side in "AB"
        for name, key in (("φ(1,1)", "first"), ("φ(r,r)", "all"), ("random", "all_random"))
    }
    print_columns(title, _places([entry.update for entry in compared]) | phi)


def _places(updates: Sequence[Update]) -> dict[str, list[Any]]:
    from hf_lora.insight.inspect import layer_names

    return {"layer": layer_names(updates), "role": [update.role_name for update in updates]}


def _values(entries: Sequence[Any], columns: Mapping[str, str]) -> dict[str, list[Any]]:
    """Attributes of the entries by the name of their column; None where an entry is None."""
    return {name: [getattr(entry, what, None) for entry in entries] for name, what in columns.items()}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else printable(str(value))
