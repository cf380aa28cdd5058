"""Benchmark tables, made from the result files in scripts/benchmarks/results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import bank_report
import calibration as calibration_runs

RESULTS = Path(__file__).parents[2] / "scripts" / "benchmarks" / "results"
Row = tuple[str, ...]


def markdown(header: Row, rows: Iterable[Row]) -> Iterator[str]:
    """The lines of a Markdown table."""
    for row in (header, ("---",) * len(header), *rows):
        yield f"| {' | '.join(row)} |"


def results(name: str) -> dict[str, Any]:
    """The result file of that name."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def spread(values: Iterable[float]) -> str:
    """Mean, then least and greatest below it."""
    values = list(values)
    return _spread(mean(values), min(values), max(values))


def _spread(of_all: float, least: float, greatest: float) -> str:
    return f"{of_all:.4f}<br><small>{least:.4f} - {greatest:.4f}</small>"


def published(of: Mapping[str, float] | None) -> str:
    """The same for runs of which only these are known."""
    return _spread(of["mean"], of["least"], of["greatest"]) if of else "-"


def _runs(side: Mapping[str, Mapping[str, float]], what: str) -> list[float]:
    return [run[what] for run in side.values()]


def quality() -> Iterator[str]:
    """Accuracy on the test file by data set and method."""
    full = results("full_finetuning")["accuracy"]
    header = ("data", "hf_lora", "linear probe", "peft", "full fine-tuning", "majority class")
    yield from markdown(
        header,
        (
            (
                name,
                spread(_runs(sides["hf_lora"], "accuracy")),
                spread(_runs(sides["hf_lora"], "probe")),
                spread(_runs(sides["peft"], "accuracy")),
                published(full.get(name)),
                f"{mean(_runs(sides['hf_lora'], 'majority')):.4f}",
            )
            for name, sides in results("quality")["runs"].items()
        ),
    )


def summary() -> Iterator[str]:
    """The table of README.md: mean accuracies and the share of peft's time."""
    full = results("full_finetuning")["accuracy"]
    header = ("data", "hf_lora", "linear probe", "peft", "full fine-tuning", "majority class", "time")
    yield from markdown(
        header,
        (
            (
                name,
                *(f"{mean(_runs(sides['hf_lora'], what)):.3f}" for what in ("accuracy", "probe")),
                f"{mean(_runs(sides['peft'], 'accuracy')):.3f}",
                f"{full[name]['mean']:.3f}",
                f"{mean(_runs(sides['hf_lora'], 'majority')):.3f}",
                _cost(name, sides)[3],
            )
            for name, sides in results("quality")["runs"].items()
        ),
    )


def cost() -> Iterator[str]:
    """Seconds, parameters and calibration by data set."""
    header = ("data", "hf_lora", "peft", "ratio", "parameters trained", "calibration error before", "after")
    yield from markdown(header, (_cost(*entry) for entry in results("quality")["runs"].items()))


def _cost(name: str, sides: Mapping[str, Any]) -> Row:
    own, peft = sides["hf_lora"], sides["peft"]
    return (
        name,
        f"{mean(_runs(own, 'seconds')):.0f} s",
        f"{mean(_runs(peft, 'seconds')):.0f} s",
        f"{mean(own[seed]['seconds'] / peft[seed]['seconds'] for seed in own if seed in peft):.2f}",
        f"{mean(_runs(own, 'share_trained')):.2%}",
        f"{mean(_runs(own, 'calibration_error_uncalibrated')):.4f}",
        f"{mean(_runs(own, 'calibration_error')):.4f}",
    )


def packaged() -> Iterator[str]:
    """Accuracy on the data sets of scripts/benchmarks/package_data.py."""
    yield from markdown(
        ("data", "hf_lora", "linear probe", "peft", "majority class", "time, hf_lora / peft"),
        (
            (
                name,
                *(published(of[side]) for side in ("hf_lora", "probe", "peft")),
                f"{of['majority']:.4f}",
                f"{of['time_ratio']:.2f}",
            )
            for name, of in results("quality_packaged")["sets"].items()
        ),
    )


SETTINGS = ("setting", "accuracy", "defaults", "difference (points)", "loss", "defaults", "runs")


def _setting(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["setting"],
        f"{row['accuracy']:.4f}",
        f"{row['accuracy_defaults']:.4f}",
        f"{row['points']:+.2f} ± {row['standard_error']:.2f}",
        f"{row['loss']:.4f}",
        f"{row['loss_defaults']:.4f}",
        str(row["runs"]),
    )


def settings_table(name: str) -> Iterator[str]:
    """One table of settings against the defaults."""
    yield from markdown(SETTINGS, map(_setting, results("settings")["tables"][name]["rows"]))


def few_examples() -> Iterator[str]:
    """Settings against the defaults with 8, 32 and 128 examples of each label."""
    rows = results("settings")["few_examples"]
    header = ("examples of each label", *SETTINGS, "linear probe")
    yield from markdown(
        header, ((str(row["examples_per_label"]), *_setting(row), f"{row['probe']:.4f}") for row in rows)
    )


def speed() -> Iterator[str]:
    """Seconds and memory against peft and others."""
    yield from markdown(
        ("what", "hf_lora", "other", "compared with", "hf_lora / other"),
        (
            (
                row["what"],
                f"{row['hf_lora']:,} {row['unit']}",
                f"{row['other']:,} {row['unit']}",
                row["against"],
                f"{row['hf_lora'] / row['other']:.2f}",
            )
            for row in results("speed")["rows"]
        ),
    )


def one_epoch() -> Iterator[str]:
    """Accuracy of the runs whose speed is measured."""
    yield from markdown(
        ("data", "hf_lora", "peft"),
        (
            (row["data"], f"{row['hf_lora']:.4f}", f"{row['peft']:.4f}")
            for row in results("speed")["accuracy"]["rows"]
        ),
    )


def mnist() -> Iterator[str]:
    """The MNIST demonstration."""
    header = ("network", "LoRA parameters", "accuracy before", "after", "LoRA disabled")
    yield from markdown(
        (*header, "wrong on the chosen digits", "published accuracy"),
        (
            (
                name,
                f"{run['lora_parameters']:,} of {run['parameters']:,}",
                *(f"{run[what]:.4f}" for what in ("before", "after", "disabled")),
                f"{run['wrong_before']} to {run['wrong_after']}",
                run["published"],
            )
            for name, run in results("mnist")["runs"].items()
        ),
    )


def checks() -> Iterator[str]:
    """What the checks of one adapter found."""
    yield from markdown(
        ("check", "result"),
        ((row["what"], row["result"]) for row in results("checks")["rows"]),
    )


def machine() -> Iterator[str]:
    """The machine of the quality benchmark, in one sentence."""
    of = results("quality")["machine"]
    yield (
        f"Machine: {of['cpu']}, {of['cores']} cores, {', '.join(of['bf16_instructions']) or 'no bf16'}, no GPU; "
        f"torch {of['torch'].split('+')[0]}, transformers {of['transformers']}, peft {of['peft']}."
    )


def bank_table(name: str) -> Iterator[str]:
    """One table of the bank's benchmark, as its script prints it."""
    table = bank_report.TABLES[name](results("bank"))
    yield from markdown(table.columns, table.rows)


def bank_settings() -> Iterator[str]:
    """What was on in the bank's benchmark."""
    yield bank_report.told(results("bank"))


def calibration() -> Iterator[str]:
    """The test loss without and with the fitted temperature, as its script prints it."""
    yield from markdown(calibration_runs.HEADER, calibration_runs.rows(results("calibration")["runs"]))


TABLES = {
    "calibration": calibration,
    "quality": quality,
    "summary": summary,
    "cost": cost,
    "packaged": packaged,
    "few_examples": few_examples,
    "speed": speed,
    "one_epoch": one_epoch,
    "mnist": mnist,
    "checks": checks,
    "machine": machine,
    "bank_settings": bank_settings,
    **{f"bank_{name}": partial(bank_table, name) for name in bank_report.TABLES},
    **{
        name: partial(settings_table, name)
        for name in (
            "settings",
            "settings_with_dropout",
            "settings_with_fitted_head",
            "probe_layers",
            "mpnet",
        )
    },
}
