"""What `hf-lora curve` does, taking the parsed options and the arguments of its runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hf_lora._files import write_text
from hf_lora.cli.tables import print_table
from hf_lora.recipe.learning_curve import CurveRuns, measured_split
from hf_lora.recipe.learning_curve_plot import check_picture, plot_curve
from hf_lora.recipe.output import reserved
from hf_lora.recipe.run_series import choose_metric
from hf_lora.recipe.series_progress import can_draw, list_runs, tell, train_missing

REPORT, PICTURE = "curve.json", "curve.png"


def curve(options: argparse.Namespace) -> int:
    """Train what is not done, then the table and the picture."""
    plan = CurveRuns(
        options.train_argv, output=Path(options.output_dir), shots=options.shots, seeds=options.seeds
    )
    picture = plan.output / PICTURE if options.plot is None else Path(options.plot)
    check_picture(picture)
    if options.dry_run:
        facts = [{"of each label": run.setting.name, "seed": run.seed} for run in plan.runs]
        list_runs(plan, facts, as_object=options.json)
        return 0
    with reserved(plan.output):
        # The first draw is the smallest: whether it can be divided is known before anything is trained.
        data = plan.data_of(plan.runs[0])
        metric, split = choose_metric(options.metric, data.problem_type), measured_split(data)
        tell(f"{plan.runs[0]}:\n{data.report}")
        train_missing(plan, f"{'test' if split == 'test' else 'eval'}_{metric}")
        result = plan.curve(metric)
        report = result.as_json()
        write_text(plan.output / REPORT, json.dumps(report, indent=2) + "\n")
        if drawn := can_draw():
            plot_curve(result, picture)
    if options.json:
        print(json.dumps(report))
        return 0
    title = f"{metric} on {result.measured_on:,} {split} examples of {result.data}, {result.seeds_in_words}"
    print_table(title, *result.table())
    print(f"written: {plan.output / REPORT}{f' and {picture}' if drawn else ''}")
    return 0
