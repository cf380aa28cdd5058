"""`hf-lora sweep` and `hf-lora curve`: grids of training runs. Light, for `hf-lora --help`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lora.cli.shared import add_options

if TYPE_CHECKING:
    from hf_lora.recipe.grid import Grid
    from hf_lora.recipe.progress import Progress

_TRAIN = "Every argument of hf-lora train works here too, for all runs: hf-lora train --help lists them. "


def register(commands: Any) -> None:
    """Add the parsers of both commands. What they do not know is for the runs, and belongs into `train_argv`."""
    parser = commands.add_parser(
        "sweep",
        help="train ranks, projections and seeds, and find the smallest setting that is as good as the best",
        usage="hf-lora sweep [CONFIG.yaml] --output_dir O [--ranks R,R] [--projections P,P] [--seeds N] [options]",
        description="Train every pair of a rank and a set of projections with every seed, all on the same split of "
        "the data, compare them on its validation part, and print mean, spread, parameters and seconds. A run that "
        "is done is used as it is; a sweep that was stopped goes on with the same command.",
        epilog=f"{_TRAIN}--seed is the first seed and the one that the data are split with.",
        # `--seed` is an argument of the runs and no abbreviation of `--seeds`.
        allow_abbrev=False,
    )
    parser.add_argument(
        "--ranks", default="1,2,4,8", help="ranks, with commas between (default: %(default)s)"
    )
    parser.add_argument(
        "--projections",
        default="q,v,qv,qkvo",
        help="sets of projections, with commas between (default: %(default)s)",
    )
    _add_common(parser, sweep, each="setting", files="sweep.json and sweep.png")
    parser = commands.add_parser(
        "curve",
        help="train on 8, 32, 128, ... examples of each label, and plot accuracy against examples",
        usage="hf-lora curve [CONFIG.yaml] --output_dir O [--shots N,N,all] [--seeds N] [options]",
        description="Train every size with every seed, measure all on the same test data, and print and plot mean and "
        "spread, beside the linear probe and the majority class where the runs report them. A run that is done is "
        "used as it is; a curve that was stopped goes on with the same command.",
        epilog=f"{_TRAIN}--seed is the first seed. Each seed draws examples of its own, unless --split_seed fixes one "
        "draw for all; of one seed the smaller draws are parts of the larger ones. The validation part is held out "
        "of the draw; a validation file that is given stays whole. Measured are the test data, or the validation "
        "data where there are no test data; where there are only training data, a test part is held out first.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--shots",
        default="8,32,128,all",
        help="examples of each label, with commas between; all: the whole training data (default: %(default)s)",
    )
    parser.add_argument("--plot", help="the picture: .png, .svg or .pdf (default: curve.png in --output_dir)")
    _add_common(parser, curve, each="size", files="curve.json and curve.png")


def _add_common(parser: argparse.ArgumentParser, run: Any, *, each: str, files: str) -> None:
    words = "accuracy, f1_macro, loss, ... (default: accuracy, or pearson for a regression)"
    parser.add_argument("--metric", help=f"what is compared: {words}")
    parser.add_argument("--seeds", type=int, default=3, help=f"runs of each {each} (default: 3)")
    parser.add_argument("--output_dir", required=True, help=f"where runs, {files} go")
    parser.add_argument(
        "--dry_run", action="store_true", help="list the runs and what is done of them, and stop"
    )
    add_options(parser, "json")
    parser.set_defaults(run=run, train_argv=[])


def sweep(options: argparse.Namespace) -> None:
    """Train what is not done, then the table, the picture, and the smallest setting that is good enough."""
    from hf_lora.cli.tables import print_columns
    from hf_lora.recipe.sweep import lora_parameters, sweep_grid, train_grid
    from hf_lora.recipe.sweep_report import SIZE, Sweep, in_words

    settings, progress = _settings(options, Sweep)
    projections = [word.strip() for word in options.projections.split(",")]
    grid = sweep_grid(settings, _numbers(options.ranks), projections, options.seeds)
    if options.dry_run:
        counts = lora_parameters(grid)
        facts = [
            {**run.point.setting, "seed": run.seed, "LoRA parameters": counts[run.point.name]}
            for run in grid.runs
        ]
        return _list(grid, facts, as_json=options.json)
    found = train_grid(grid, options.metric, progress)
    if options.json:
        print(json.dumps(found.as_json()))
        return
    title = f"{found.metric} on {found.measured_on:,} validation examples, {len(found.seeds)} seeds"
    print_columns(title, found.table())
    print("noise: {:.4f}, {}".format(*found.noise))
    for topic, setting in (("best", found.best), ("smallest within noise of it", found.smallest)):
        spread = setting.lines["validation"].spread
        score = f"{setting.mean:.4f}" + ("" if spread is None else f" (spread {spread:.4f})")
        print(f"{topic}: {in_words(setting)}: {score}, {setting.facts[SIZE]:,} trainable parameters")
    print(f"its adapter of the first seed: {found.smallest.directory}")
    print(f"written: {' and '.join(map(str, found.files))}")


def curve(options: argparse.Namespace) -> None:
    """Train what is not done, then the table and the picture."""
    from hf_lora.cli.tables import print_columns
    from hf_lora.recipe.sweep import curve_grid, train_grid
    from hf_lora.recipe.sweep_report import Curve

    settings, progress = _settings(options, Curve)
    grid = curve_grid(settings, _numbers(options.shots), options.seeds)
    if options.dry_run:
        facts = [{"of each label": run.point.setting["shots"], "seed": run.seed} for run in grid.runs]
        return _list(grid, facts, as_json=options.json)
    found = train_grid(grid, options.metric, progress, options.plot and Path(options.plot))
    if options.json:
        print(json.dumps(found.as_json()))
        return
    examples = f"{found.measured_on:,} {found.split} examples of {found.data}"
    print_columns(f"{found.metric} on {examples}, {found.seeds_in_words}", found.table())
    print(f"written: {' and '.join(map(str, found.files))}")


def _settings(options: argparse.Namespace, kind: Any) -> tuple[dict[str, Any], Progress]:
    """The options of the runs that are given, and what is told of them."""
    from hf_lora._text import printable
    from hf_lora.cli.train import check_flags, parse_settings, read_yaml
    from hf_lora.recipe.progress import Lines, Progress
    from hf_lora.recipe.sweep import refuse

    argv = options.train_argv
    check_flags(argv, also=vars(options))
    names = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    names |= {name.removeprefix("no_") for name in names}
    if argv and not argv[0].startswith("-"):
        names |= read_yaml(Path(argv[0])).keys()
    refuse(names, kind)
    values = parse_settings([*argv, "--output_dir", options.output_dir])
    options.dry_run |= values.pop("dry_run")
    # Progress does not mix with what --json prints.
    lines = Lines(lambda text: print(printable(text), file=sys.stderr, flush=True))
    progress = Progress() if values.pop("quiet") else lines
    return {name: values[name] for name in {*names, "output_dir"} & values.keys()}, progress


def _numbers(text: str) -> list[Any]:
    """The words between commas: `all` as None, numbers as such; others stay, and are refused."""
    words = [word.strip() for word in text.split(",")]
    return [None if word == "all" else int(word) if word.isdecimal() else word for word in words]


def _list(grid: Grid[Any], facts: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print the runs and what is done of them. facts: what is said of each besides."""
    from hf_lora.cli.tables import print_columns

    rows = [
        {**fact, "state": run.state, "directory": str(run.directory)}
        for fact, run in zip(facts, grid.runs, strict=True)
    ]
    if as_json:
        print(json.dumps(rows))
    else:
        print_columns(f"{len(rows)} runs", {name: [row[name] for row in rows] for name in rows[0]})
