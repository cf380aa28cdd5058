"""The results of the bank's benchmark as tables, for the terminal and the site, and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Result = Mapping[str, Any]
Row = tuple[str, ...]
OTHERS = ("peft", "merged copies")


class Table(NamedTuple):
    """A table: its title, the names of its columns, and its rows."""

    title: str
    columns: Row
    rows: list[Row]


def by_precision(result: Result) -> dict[str, list[Any]]:
    """The passes of each precision."""
    found: dict[str, list[Any]] = {}
    for row in result["passes"]:
        found.setdefault(row["precision"], []).append(row)
    return found


def overhead(row: Result) -> float:
    """The bank's CPU time over that of the encoder without adapters."""
    return float(row["ratios"]["plain"]["bank"])


def lines(rows: Iterable[Result]) -> dict[int, dict[int, float]]:
    """By tokens, and in them by adapters, the bank's time over that of the encoder without adapters."""
    found: dict[int, dict[int, float]] = {}
    for row in rows:
        found.setdefault(row["tokens"], {})[row["adapters"]] = overhead(row)
    return found


def passes_table(result: Result) -> Table:
    """The bank's time over that of the encoder without adapters."""
    found = {precision: lines(rows) for precision, rows in by_precision(result).items()}
    columns = [(precision, tokens) for precision, of in found.items() for tokens in of]
    sizes = sorted({row["adapters"] for row in result["passes"]})
    return Table(
        "CPU time of a pass over that of the encoder without adapters",
        ("adapters", *(f"{precision}, {tokens} tokens" for precision, tokens in columns)),
        [
            (f"{size:,}", *(f"{found[precision][tokens][size]:.2f}" for precision, tokens in columns))
            for size in sizes
        ],
    )


def peers_table(result: Result) -> Table:
    """The same for others that can mix adapters of two labels."""
    return Table(
        "CPU time by others, fp32, 32 tokens, over that of the encoder without adapters",
        (
            "adapters",
            *("bank", *OTHERS, "bank / peft"),
            "from texts: one TextClassifier after the other / bank",
            "largest difference of a logit, bank",
        ),
        [
            (
                str(row["adapters"]),
                *(f"{row['ratios']['plain'][side]:.2f}" for side in ("bank", *OTHERS)),
                f"{row['ratios']['peft']['bank']:.2f}",
                f"{row['predict']['ratios']['bank']['one TextClassifier after the other']:.2f}",
                f"{row['differences']['bank']:.1g}",
            )
            for row in result["peers"]
        ],
    )


def predictions_table(result: Result) -> Table:
    """Whole predictions, from texts to answers."""
    sides = list(result["predictions"][0]["seconds"])
    return Table(
        "from texts to answers",
        (
            *("precision", "adapters in the bank", *(f"{side}: texts a second" for side in sides)),
            *(f"{side}: CPU time over {sides[0]}" for side in sides[1:]),
        ),
        [
            (
                row["precision"],
                f"{row['adapters']:,}",
                *(f"{row['texts'] / row['seconds'][side]['median']:.0f}" for side in sides),
                *(f"{row['ratios'][sides[0]][side]:.2f}" for side in sides[1:]),
            )
            for row in result["predictions"]
        ],
    )


def memory_table(result: Result) -> Table:
    """Resident memory of processes with a bank."""
    found: dict[str, dict[int, Any]] = {}
    for row in result["memory"]:
        found.setdefault(row["precision"], {})[row["adapters"]] = row
    sizes = sorted({row["adapters"] for row in result["memory"]})
    return Table(
        "resident memory of a process with a bank (MB)",
        ("precision", *(f"{size:,} adapters" for size in sizes)),
        [(name, *(f"{of[size]['resident_mb']:,.0f}" for size in sizes)) for name, of in found.items()],
    )


def adding_table(result: Result) -> Table:
    """Adding an adapter, and what a prediction meanwhile takes."""
    return Table(
        "adding the last adapter to a bank, alone and beside another thread's batches of 32 texts (ms)",
        (
            *("precision", "adapters", "adding, median", "longest", "adding beside batches, median"),
            *("a batch alone, median", "longest", "a batch beside adding, median", "longest"),
        ),
        [
            (
                *(row["precision"], f"{row['adapters']:,}"),
                *(f"{row['ms']['alone'][what]:.1f}" for what in ("median", "max")),
                f"{row['ms']['beside batches']['median']:.1f}",
                *(
                    f"{row['batch_ms'][when][what]:.0f}"
                    for when in ("alone", "beside adding")
                    for what in ("median", "max")
                ),
            )
            for row in result["adding"]
        ],
    )


def fan_out_table(result: Result) -> Table:
    """One text by many classifiers."""
    return Table(
        "one text by many classifiers, fp32: CPU time over that of one classifier",
        ("adapted blocks", "tokens", "classifiers", "logits", "answers", "answers of all (ms)"),
        [
            (
                *(row["blocks"], str(row["tokens"]), str(row["classifiers"])),
                *(f"{row[level]['ratios']['one']['all']:.1f}" for level in ("logits", "answers")),
                f"{row['answers']['cpu_ms']['all']['median']:.0f}",
            )
            for row in result["fan_out"]
        ],
    )


class Target(NamedTuple):
    """What is wanted of a figure: at most `most`."""

    what: str
    got: float
    most: float
    unit: str = ""


def targets(result: Result) -> list[dict[str, Any]]:
    """Every target with its figure and whether it is met."""
    return [{**target._asdict(), "met": target.got <= target.most} for target in _targets(result)]


# By precision and tokens, what a pass may take against the encoder without adapters.
_PASSES = {
    **{("fp32", tokens): most for tokens, most in ((16, 1.2), (32, 1.08), (128, 1.08))},
    **{("bf16", tokens): most for tokens, most in ((16, 1.2), (32, 1.1), (128, 1.1))},
}
_FAN_OUT = {32: 13.0, 128: 20.0}
_MANY, _ALL = 1000, 64


def _targets(result: Result) -> Iterator[Target]:
    """Those for what was measured."""
    for row in _with_many(result["passes"]):
        told = f"{_MANY:,} adapters, {row['tokens']} tokens, {row['precision']}"
        most = _PASSES[row["precision"], row["tokens"]]
        yield Target(f"{told}, against the encoder without adapters", overhead(row), most)
    for row in result["peers"]:
        if row["adapters"] == 32:
            yield Target("32 adapters, against peft", row["ratios"]["peft"]["bank"], 0.8)
    for row in _with_many(result["memory"]):
        yield Target(f"{_MANY:,} adapters, {row['precision']}, resident", row["resident_mb"], 1200, "MB")
    for row in result["predictions"]:
        got = row["ratios"]["TextClassifier, merged"]["bank, one adapter"]
        yield Target(f"one adapter alone, {row['precision']}, against TextClassifier", got, 1.1)
    for row in result["fan_out"]:
        if row["blocks"] != "all six" and row["classifiers"] == _ALL:
            told = f"{_ALL} classifiers of {row['blocks']} blocks, {row['tokens']} tokens, against one"
            yield Target(told, row["logits"]["ratios"]["one"]["all"], _FAN_OUT[row["tokens"]])
    for row in _with_many(result["adding"]):
        told = f"to a bank of {_MANY:,}, {row['precision']}"
        alone, beside = (row["batch_ms"][when] for when in ("alone", "beside adding"))
        yield Target(f"adding {told}", row["ms"]["alone"]["median"], 30, "ms")
        waited = max(0.0, beside["max"] / alone["median"] - 1)
        yield Target(f"longest wait of a batch for adding {told}", waited, 1, "batches")


def _with_many(rows: Iterable[Result]) -> list[Result]:
    return [row for row in rows if row["adapters"] == _MANY]


def targets_table(result: Result) -> Table:
    """The targets."""
    return Table(
        "targets",
        ("what", "measured", "at most", "met"),
        [
            (
                row["what"],
                *(_shown(row[which], row["unit"]) for which in ("got", "most")),
                "yes" if row["met"] else "no",
            )
            for row in result["targets"]
        ],
    )


def _shown(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if unit == "MB" else f"{value:.3g} {unit}".rstrip()


TABLES: dict[str, Callable[[Result], Table]] = {
    "passes": passes_table,
    "peers": peers_table,
    "predictions": predictions_table,
    "memory": memory_table,
    "adding": adding_table,
    "fan_out": fan_out_table,
    "targets": targets_table,
}


def print_tables(
    result: Result, table: Callable[[str, Sequence[str], Iterable[Sequence[Any]]], None]
) -> None:
    """Print all tables."""
    for make in TABLES.values():
        table(*make(result))


def told(result: Result) -> str:
    """What was on, in a few sentences."""
    of, machine = result["settings"], result["machine"]
    rounds = ", ".join(f"{count} at {tokens}" for tokens, count in of["rounds"].items())
    rough = "A quick run: the figures are rough. " if of["quick"] else ""
    return (
        f"{rough}{of['model']}, rank {of['rank']} on {of['projections']}, {of['labels']} labels, heads: {of['heads']}. "
        f"{of['sequences']} sequences a pass, threads: {of['threads']}. Medians of rounds in which the sides take "
        f"turns ({rounds} tokens). {machine['cpu']}, {machine['cores']} cores, "
        f"{', '.join(machine['bf16_instructions']) or 'no bf16'}; torch {machine['torch'].split('+')[0]}, "
        f"transformers {machine['transformers']}, peft {machine['peft']}."
    )


def plot(result: Result, path: str) -> None:
    """A panel for each precision: the bank's time by adapters; in the first one peft's and merged copies' too."""
    from matplotlib.figure import Figure

    from hf_lora.insight.plots import ACCENT, BAD, GRID, INK, MUTED

    found = by_precision(result)
    figure = Figure(figsize=(5.2 * len(found), 4.2), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for panel, (precision, rows) in zip(panels, found.items(), strict=True):
        for (tokens, values), strength in zip(sorted(lines(rows).items()), (0.4, 0.7, 1), strict=False):
            label = f"bank, {tokens} tokens"
            panel.plot(*zip(*values.items(), strict=True), "o-", color=ACCENT, alpha=strength, label=label)
        if panel is panels[0]:
            for side, color, mark in zip(OTHERS, (BAD, INK), ("s--", "^--"), strict=True):
                values = {row["adapters"]: row["ratios"]["plain"][side] for row in result["peers"]}
                panel.plot(*zip(*values.items(), strict=True), mark, color=color, label=f"{side}, 32 tokens")
        panel.axhline(1, color=MUTED, linewidth=1)
        panel.set_xscale("log")
        sizes = sorted({row["adapters"] for row in rows})
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
        panel.minorticks_off()
        panel.set_title(precision, color=INK)
        panel.set_xlabel("adapters in the bank", color=INK)
        panel.tick_params(colors=INK)
        panel.grid(color=GRID)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, labelcolor=INK, fontsize=9, loc="upper right")
    panels[0].set_ylabel("CPU time / encoder without adapters", color=INK)
    panels[0].set_ylim(bottom=0.9)
    figure.suptitle(
        f"{result['settings']['sequences']} sequences, each with a random adapter of the bank",
        color=INK,
    )
    figure.savefig(path, dpi=150)
