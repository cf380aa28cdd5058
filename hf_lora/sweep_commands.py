"""What `hf-lora sweep` does, taking the parsed options and the arguments of its runs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from statistics import fmean

from hf_lora.atomic import write_text
from hf_lora.run_directory import reserved
from hf_lora.sweep import METRICS, Run, Sweep
from hf_lora.sweep_results import Choice, Result, as_json, choose, plot, table_rows
from hf_lora.tables import print_table

REPORT, PICTURE = "sweep.json", "sweep.png"


def sweep(options: argparse.Namespace) -> int:
    """Train what is not done, then the table, the picture, and the smallest setting that is good enough."""
    plan = Sweep(
        options.train_argv,
        output=Path(options.output_dir),
        ranks=options.ranks,
        projections=options.projections,
        seeds=options.seeds,
    )
    if options.dry_run:
        return _list(plan, as_object=options.json)
    # Before anything is trained: a projection that the model does not have is a mistake of the command line.
    _ = plan.lora_parameters
    with reserved(plan.output):
        metric = plan.metric(options.metric)
        _tell(str(plan.data.report))
        _train_all(plan, metric)
        examples = len(plan.data.splits["validation"])
        results = plan.results(metric)
        choice = choose(results, metric, examples)
        report = as_json(results, choice, metric, examples)
        write_text(plan.output / REPORT, json.dumps(report, indent=2) + "\n")
        drawn = _draw(results, choice, metric, plan.output / PICTURE)
    if options.json:
        print(json.dumps(report))
        return 0
    title = f"{metric} on {examples:,} validation examples, {len(plan.seeds)} seeds"
    print_table(title, *table_rows(results, choice))
    print(f"noise: {choice.noise.value:.4f}, {choice.noise.rule}")
    print(f"best: {_told(choice.best)}")
    print(f"smallest within noise of it: {_told(choice.smallest)}")
    chosen = next(run for run in plan.runs if _is_of(run, choice.smallest))
    print(f"its adapter of the first seed: {chosen.directory}")
    print(f"written: {plan.output / REPORT}{f' and {plan.output / PICTURE}' if drawn else ''}")
    return 0


def _list(plan: Sweep, *, as_object: bool) -> int:
    counts = plan.lora_parameters
    columns = ("rank", "projections", "seed", "LoRA parameters", "state", "directory")
    rows = [
        (r.setting.rank, r.setting.projections, r.seed, counts[r.setting], r.state, str(r.directory))
        for r in plan.runs
    ]
    if as_object:
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows]))
        return 0
    print_table(f"{len(rows)} runs", columns, rows)
    return 0


def _train_all(plan: Sweep, metric: str) -> None:
    # All are looked at first, so that a directory in use is told before hours are spent.
    done = [run for run in plan.runs if plan.is_done(run)]
    missing = [run for run in plan.runs if run not in done]
    if done:
        _tell(f"{len(done)} of {len(plan.runs)} runs are done already")
    seconds: list[float] = []
    try:
        for number, run in enumerate(missing, 1 + len(done)):
            begin = time.perf_counter()
            metrics = plan.train(run)
            seconds.append(time.perf_counter() - begin)
            left = fmean(seconds) * (len(plan.runs) - number)
            score = metrics.get(f"eval_{metric}", float("nan"))
            _tell(
                f"{number} of {len(plan.runs)}: {run}: {metric} {score:.4f}, {seconds[-1]:.1f} s; "
                f"{_duration(left)} left"
            )
    except (KeyboardInterrupt, SystemExit):
        finished = sum((run.directory / METRICS).is_file() for run in plan.runs)
        _tell(f"stopped with {finished} of {len(plan.runs)} runs done; the same command goes on")
        raise


def _draw(results: list[Result], choice: Choice, metric: str, path: Path) -> bool:
    """Whether there is a picture now; without matplotlib there is none, and a line that says so."""
    if importlib.util.find_spec("matplotlib") is None:
        _tell(
            "no picture, since matplotlib is not installed; pip install matplotlib, and give the command again"
        )
        return False
    plot(results, choice, metric, path)
    return True


def _told(result: Result) -> str:
    spread = "" if result.spread is None else f" (spread {result.spread:.4f})"
    return f"{result.name}: {result.mean:.4f}{spread}, {result.trainable_parameters:,} trainable parameters"


def _is_of(run: Run, result: Result) -> bool:
    return (run.setting.rank, run.setting.projections) == (result.rank, result.projections)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min"
    )


def _tell(text: str) -> None:
    """Progress is for people: it does not mix with what --json prints."""
    print(text, file=sys.stderr, flush=True)
