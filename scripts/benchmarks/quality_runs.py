"""Runs of `hf-lora train` in processes of their own, some at the same time, and a results file written after each."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from data_sets import BASE, QualitySet
from harness import add_output_arguments, machine, write_json

Run = dict[str, float]
# What all runs of a results file have in common.
CONDITIONS = ("threads", "jobs", "few_shot", "model")


def hf_lora_run(data_set: QualitySet, seed: int, flags: Sequence[str] = ()) -> Run:
    """`hf-lora train` on MiniLM with its defaults, but for `flags`: otherwise seed and files are all it is told."""
    files = [part for name, path in data_set.files().items() for part in (f"--{name}", path)]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "hf_lora.cli.main",
            "train",
            "--model_name_or_path",
            BASE,
            *files,
            *flags,
        ]
        command += ["--seed", str(seed), "--output_dir", folder, "--disable_tqdm", "true"]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"hf-lora train failed on {data_set.name}: {run.stderr.splitlines()[-1:]}")
        metrics = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
    parts = ("warm_start_runtime", "train_runtime", "evaluation_runtime", "refit_runtime")
    return {
        "accuracy": metrics["test_accuracy"],
        "loss": metrics["test_loss"],
        "f1": metrics["test_f1_macro"],
        "probe": metrics["test_accuracy_probe"],
        "majority": metrics["test_accuracy_majority"],
        "calibration_error": metrics["test_calibration_error"],
        "calibration_error_uncalibrated": metrics["test_calibration_error_uncalibrated"],
        "seconds": sum(metrics.get(part, 0.0) for part in parts),
        "trained": metrics["trainable_parameters"],
        "share_trained": metrics["trainable_parameters"] / metrics["total_parameters"],
        "steps": metrics.get("global_step", 0),
    }


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what both quality benchmarks take: data, sets, threads and the results file."""
    add_output_arguments(parser, plot=False)
    parser.add_argument(
        "--data", type=Path, help="folder of data sets: NAME/train.csv and NAME/test.csv in each"
    )
    parser.add_argument("--sets", nargs="+", help="only these data sets")
    parser.add_argument("--threads", type=int, help="threads of a run (default: all cores)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at the same time (default: 1); see --threads"
    )


def prepare(options: argparse.Namespace) -> None:
    """Check `--data` and `--jobs`, and set what the processes of the runs inherit. Raises SystemExit for bad ones."""
    if options.data is not None and not options.data.is_dir():
        raise SystemExit(f"--data is no folder; got {str(options.data)!r}")
    if options.jobs < 1:
        raise SystemExit(f"--jobs is not usable; got {options.jobs}; expected at least 1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)


def chosen_sets(options: argparse.Namespace, sets: Iterable[str], names: Iterable[str]) -> list[str]:
    """`--sets`, or those of `names` that are there. Raises SystemExit where one is not, or none is left."""
    there = list(sets)
    chosen = options.sets or [name for name in names if name in there]
    unknown = set(chosen) - set(there)
    if unknown or not chosen:
        raise SystemExit(
            f"no such data; got {sorted(unknown) or chosen}; there are {', '.join(there)}; see --data"
        )
    return chosen


def fill(
    options: argparse.Namespace, orders: Iterable[tuple[str, str, int]], run: Callable[[str, str, int], Run]
) -> dict[str, Any]:
    """What the results file has already, and those of `orders`, (data set, side, number), that are missing in it.

    `run` is called from `--jobs` threads. A run that fails ends it, after the runs that are under way; all that
    are done are kept. Raises SystemExit for a file of runs with another number of threads or jobs, whose seconds
    are not comparable, of examples or another encoder; and where runs are missing in a file of another machine or
    other versions.
    """
    result: dict[str, Any] = {
        "machine": machine(),
        **{what: getattr(options, what, None) for what in CONDITIONS},
        "runs": {},
    }
    path = None if options.json in (None, "-") else Path(options.json)
    known: dict[str, Any] = {}
    if path is not None and path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        for what in CONDITIONS:
            if known.get(what) != result[what]:
                raise SystemExit(f"{path} has runs with {what}={known.get(what)}; got {result[what]}")
        result["runs"] = known["runs"]
    missing = []
    for name, side, number in orders:
        if str(number) not in result["runs"].get(name, {}).get(side, {}):
            missing.append((name, side, number))
    if known and missing:
        _check_machine(path, known["machine"], result["machine"])
    elif known:
        result["machine"] = known["machine"]
    for name, side, _ in missing:
        result["runs"].setdefault(name, {}).setdefault(side, {})
    lock = Lock()

    def run_and_keep(name: str, side: str, number: int) -> None:
        figures = run(name, side, number)
        with lock:
            result["runs"][name][side][str(number)] = figures
            print(f"{name}, {side}, {number}: {figures}", file=sys.stderr, flush=True)
            if path is not None:
                write_json(str(path), result)

    pool = ThreadPoolExecutor(options.jobs)
    try:
        for started in [pool.submit(run_and_keep, *order) for order in missing]:
            started.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return result


def _check_machine(path: Path | None, known: dict[str, Any], here: dict[str, Any]) -> None:
    """The threads of the benchmark's own process say nothing: those of its runs are among the conditions."""
    other = [what for what in here if what != "threads" and known.get(what) != here[what]]
    if other:
        made, got = (", ".join(f"{what}={values.get(what)!r}" for what in other) for values in (known, here))
        raise SystemExit(
            f"the runs in {path} were made with {made}; got {got}; give the new ones another --json"
        )
