"""What a person sees of a run: what was understood, one bar a stage, one line an evaluation, the results."""

from __future__ import annotations

import logging
import shlex
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from hf_lora._text import printable
from hf_lora.cli.tables import print_class_errors, print_table
from hf_lora.recipe.progress import Lines, Progress, evaluation_line
from hf_lora.recipe.results import FinetuneResult, SplitResult

_COLUMN = 11


class Terminal(Progress):
    """Facts as aligned lines, stages as bars that vanish when they end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Bars | None = None

    def fact(self, topic: str, text: str) -> None:
        """A line, or a few that are indented."""
        lines = textwrap.wrap(printable(text), max(40, self._console.width) - _COLUMN) or [""]
        for index, line in enumerate(lines):
            self._print(("" if index else topic).ljust(_COLUMN) + line)

    def begin(self, stage: str) -> None:
        """A new bar."""
        self.end()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, console=self._console, transient=True)
        self._bars.add_task(stage, total=None)
        self._bars.start()

    def advance(self, done: int, total: int) -> None:
        """Move the bar."""
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], completed=done, total=total or None)

    def end(self) -> None:
        """Take the bar away."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = None

    def evaluated(self, epoch: float, metrics: Mapping[str, float]) -> None:
        """One line."""
        self.end()
        self._print(evaluation_line(epoch, metrics))

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Once(logging.Handler):
    """Shows each warning once, where it does not disturb a bar."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console, self._seen = console, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(printable(record.getMessage()).split())
        if text not in self._seen:
            self._seen.add(text)
            level = "error" if record.levelno >= logging.ERROR else "warning"
            self._console.print(f"{level}: {text}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def display_of(*, quiet: bool) -> Iterator[Progress]:
    """The display of a run: bars on a terminal, plain lines elsewhere, nothing but warnings if `quiet`."""
    console = Console(stderr=not sys.stdout.isatty(), highlight=False)
    handler = _Once(console)
    root = logging.getLogger()
    root.addHandler(handler)
    display: Progress = Progress()
    if not quiet:
        display = Terminal(console) if console.is_terminal and sys.stdout.isatty() else Lines(_line)
    try:
        yield display
    finally:
        display.end()
        root.removeHandler(handler)


def _line(text: str) -> None:
    print(printable(text), flush=True)


def show_results(result: FinetuneResult, *, plain: bool = False) -> None:
    """Print what a run has measured on the test split, else on validation, what it cost, and what to do next.

    plain: lines without tables.
    """
    split, measured = result.judged
    refitted = "refit_examples" in result.metrics and split == "validation"
    title = f"{split}, measured before retraining" if refitted else split
    columns, rows = _scores(measured, result.info.task.baseline)
    if plain:
        for name, *values in rows:
            pairs = zip(columns[1:], values, strict=True)
            shown = ", ".join(f"{side} {value:.4f}" for side, value in pairs if value is not None)
            print(f"{title}: {name}: {shown}")
    else:
        print_table(title, columns, rows)
        if measured.class_errors:
            print_class_errors(measured.class_errors, "in metrics.json")
    for topic, text in _facts(result):
        print(f"{topic}: {text}" if plain else f"{topic.ljust(_COLUMN)}{text}")


def _scores(measured: SplitResult, baseline: str) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Columns and rows of a split's table."""
    sides = {
        "with adapter": measured.adapter,
        "encoder without adapter": measured.disabled,
        "thresholds of 0.5": measured.uncalibrated,
        "linear probe": measured.probe,
        baseline: measured.baseline,
    }
    hidden = ("loss", "calibration_error", "preparation_time")
    names = [name for name in measured.adapter if not name.endswith(hidden)]
    shown = {title: side for title, side in sides.items() if any(name in side for name in names)}
    return ("metric", *shown), [(name, *(side.get(name) for side in shown.values())) for name in names]


def _facts(result: FinetuneResult) -> Iterator[tuple[str, str]]:
    metrics = result.metrics
    if "calibration_error" in result.validation.adapter:
        yield "calibrated", calibration_fact(result)
    spent = [f"{metrics['warm_start_runtime']:.1f} s start", f"{metrics['train_runtime']:.1f} s training"]
    if "refit_runtime" in metrics:
        spent.append(f"{metrics['refit_runtime']:.1f} s retraining")
    work = f"{metrics['global_step']} steps; {metrics['peak_memory_mb']:.0f} MB of memory"
    yield "time", f"{', '.join(spent)}; {work}"
    output = str(result.output_dir)
    yield "adapter", f"{printable(output)} ({metrics['adapter_bytes'] / 1024:.0f} KiB)"
    yield "next", f'hf-lora predict --adapter {shlex.quote(output)} "a text"'


def calibration_fact(result: FinetuneResult) -> str:
    """The temperature with the calibration errors before and after it, in one line."""
    if result.info.temperature is None:
        return "no: that takes a validation split of at least 20 texts"
    split, measured = result.judged
    before, after = measured.uncalibrated.calibration_error, measured.adapter.calibration_error
    return (
        f"temperature {result.info.temperature:.3f}; calibration error {before:.4f} -> {after:.4f} ({split})"
    )
