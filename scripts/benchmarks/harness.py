"""What the benchmark scripts share: paired runs, medians, processes of their own, the machine, tables and JSON."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hf_lora.cli.tables import print_table

Table = Callable[[str, Sequence[str], Iterable[Sequence[Any]]], None]


def add_output_arguments(parser: argparse.ArgumentParser, *, plot: bool = True) -> None:
    """Add `--json` and, for scripts that draw, `--plot`."""
    parser.add_argument("--json", metavar="FILE", help="write the results there; - is standard output")
    if plot:
        parser.add_argument("--plot", metavar="FILE", help="draw the results into a PNG")


def report(options: argparse.Namespace) -> Table:
    """A function of title, columns and rows that prints a table: on standard error with `--json -`."""
    stream = sys.stderr if options.json == "-" else sys.stdout

    def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        with contextlib.redirect_stdout(stream):
            print_table(title, columns, rows)
        stream.flush()

    return table


def write_json(path: str | None, result: object) -> None:
    """Write `result` to a file, to standard output for "-", and nowhere for None."""
    text = json.dumps(result, indent=2, ensure_ascii=False)
    if path == "-":
        print(text)
    elif path is not None:
        Path(path).write_text(text + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """What the figures depend on, without the names of hosts, users and folders."""
    capabilities = torch.cpu.get_capabilities()
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_instructions": [name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        **{package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft")},
    }


def paired(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call the sides in turn, A B A B ..., and keep what each returns: seconds, or another figure.

    What disturbs the machine for a while then falls on all of them. Raises ValueError for less than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds is not usable; got {rounds}; expected at least 1")
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            figures[name].append(side())
    return figures


def timed(act: Callable[[], object]) -> Callable[[], float]:
    """A side for `paired`: the seconds that `act` takes, with garbage collected before."""

    def seconds() -> float:
        gc.collect()
        start = time.perf_counter()
        act()
        return time.perf_counter() - start

    return seconds


def summary(
    figures: Mapping[str, Sequence[float]], reference: str | None = None
) -> dict[str, dict[str, float]]:
    """Median, least and greatest of each side; with a `reference`, `ratio`: the median of the ratios to it.

    The ratios are those of the same round. Raises ValueError for sides of another number of rounds.
    """
    counts = {name: len(values) for name, values in figures.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"the rounds are not paired; got {counts}; expected the same number for all sides")
    result = {
        name: {"median": median(values), "min": min(values), "max": max(values)}
        for name, values in figures.items()
    }
    for name in result if reference is not None else ():
        pairs = zip(figures[name], figures[str(reference)], strict=True)
        result[name]["ratio"] = median(own / other for own, other in pairs)
    return result


def in_process(argv: Sequence[str], **environment: str) -> Any:
    """Run a command in a process of its own and return the JSON that is the last line of its output.

    For figures that the process's past would change: peak memory, first calls. `environment`: variables that
    are added. Raises RuntimeError for a command that fails or prints no JSON at the end.
    """
    run = subprocess.run(list(argv), capture_output=True, text=True, env={**os.environ, **environment})
    lines = run.stdout.splitlines()
    if run.returncode == 0 and lines:
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(lines[-1])
    raise RuntimeError(
        f"{' '.join(argv)} failed; got exit code {run.returncode}, last lines {lines[-1:]} and "
        f"{run.stderr.splitlines()[-1:]}; expected JSON at the end"
    )


def resident_mb() -> float:
    """Megabytes of this process in memory now."""
    return _memory("VmRSS")


def peak_mb() -> float:
    """The most megabytes this process had in memory, since it began or since `reset_peak`."""
    # Not ru_maxrss, which begins at the size of the process that started this one.
    return _memory("VmHWM")


def reset_peak() -> None:
    """Let `peak_mb` begin anew; without effect where the system cannot do that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _memory(field: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux: the peak is all there is, in bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def _cpu_name() -> str:
    # `platform.processor` knows it on few systems.
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
