"""What `hf-lora sweep` does, taking the parsed options and the arguments of its runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hf_lora._files import write_text
from hf_lora.cli.tables import print_table
from hf_lora.recipe.output import reserved
from hf_lora.recipe.run_series import Run
from hf_lora.recipe.series_progress import can_draw, list_runs, tell, train_missing
from hf_lora.recipe.sweep import Setting, Sweep
from hf_lora.recipe.sweep_results import Result, as_json, choose, plot, table_rows

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
        tell(str(plan.data.report))
        train_missing(plan, f"eval_{metric}")
        examples = len(plan.data.splits["validation"])
        results = plan.results(metric)
        choice = choose(results, metric, examples)
        report = as_json(results, choice, metric, examples)
        write_text(plan.output / REPORT, json.dumps(report, indent=2) + "\n")
        if drawn := can_draw():
            plot(results, choice, metric, plan.output / PICTURE)
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
    facts = [
        {
            "rank": run.setting.rank,
            "projections": run.setting.projections,
            "seed": run.seed,
            "LoRA parameters": plan.lora_parameters[run.setting],
        }
        for run in plan.runs
    ]
    list_runs(plan, facts, as_object=as_object)
    return 0


def _told(result: Result) -> str:
    spread = "" if result.spread is None else f" (spread {result.spread:.4f})"
    return f"{result.name}: {result.mean:.4f}{spread}, {result.trainable_parameters:,} trainable parameters"


def _is_of(run: Run[Setting], result: Result) -> bool:
    return (run.setting.rank, run.setting.projections) == (result.rank, result.projections)
