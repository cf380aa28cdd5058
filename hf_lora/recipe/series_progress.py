"""What `hf-lora sweep` and `hf-lora curve` tell while they train."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from hf_lora.cli.tables import print_table
from hf_lora.recipe.run_series import METRICS, RunSeries


def train_missing(plan: RunSeries[Any], key: str) -> None:
    """Train the runs that are not done, each with a line of what it has measured under `key` of its metrics."""
    # All are looked at first, so that a directory in use is told before hours are spent.
    done = [run for run in plan.runs if plan.is_done(run)]
    missing = [run for run in plan.runs if run not in done]
    if done:
        tell(f"{len(done)} of {len(plan.runs)} runs are done already")
    seconds: list[float] = []
    try:
        for number, run in enumerate(missing, 1 + len(done)):
            begin = time.perf_counter()
            metrics = plan.train(run)
            seconds.append(time.perf_counter() - begin)
            left = fmean(seconds) * (len(plan.runs) - number)
            score, name = metrics.get(key, float("nan")), key.partition("_")[2]
            tell(
                f"{number} of {len(plan.runs)}: {run}: {name} {score:.4f}, {seconds[-1]:.1f} s; {_duration(left)} left"
            )
    except (KeyboardInterrupt, SystemExit):
        finished = sum((run.directory / METRICS).is_file() for run in plan.runs)
        tell(f"stopped with {finished} of {len(plan.runs)} runs done; the same command goes on")
        raise


def list_runs(plan: RunSeries[Any], facts: Sequence[Mapping[str, Any]], *, as_object: bool) -> None:
    """Print the runs and what is done of them; facts: what is said of each besides."""
    rows = [
        {**fact, "state": run.state, "directory": str(run.directory)}
        for run, fact in zip(plan.runs, facts, strict=True)
    ]
    if as_object:
        print(json.dumps(rows))
    else:
        print_table(f"{len(rows)} runs", list(rows[0]), [list(row.values()) for row in rows])


def can_draw() -> bool:
    """Whether matplotlib is installed; if not, a line says so."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    tell("no picture, since matplotlib is not installed; pip install matplotlib, and give the command again")
    return False


def tell(text: str) -> None:
    """Progress is for people: it does not mix with what --json prints."""
    print(text, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min"
    )
