"""The command lines of `sweep` and `curve`: light, without torch, for `hf-lora --help`."""

from __future__ import annotations

import argparse
from typing import Any

_TRAIN = "Every argument of hf-lora train works here too, for all runs: hf-lora train --help lists them. "


def add_sweep_commands(commands: Any) -> None:
    """Add the parsers to what `ArgumentParser.add_subparsers` returned.

    The options say in `module` where the function called `command` is. What these parsers do not know is for
    `hf-lora train`, and belongs into `train_argv`.
    """
    sweep = commands.add_parser(
        "sweep",
        help="train ranks, projections and seeds, and find the smallest setting that is as good as the best",
        usage="hf-lora sweep [CONFIG.yaml] --output_dir O [--ranks R,R] [--projections P,P] [--seeds N] [options]",
        description="Train every pair of a rank and a set of projections with every seed, all on the same split of "
        "the data, and print mean, spread, parameters and seconds. A run that is done is used as it is; a sweep "
        "that was stopped goes on with the same command.",
        epilog=f"{_TRAIN}--seed is the first seed and the one that the data are split with.",
        # `--seed` is an argument of the runs and no abbreviation of `--seeds`.
        allow_abbrev=False,
    )
    sweep.add_argument("--ranks", default="1,2,4,8", help="ranks, with commas between (default: 1,2,4,8)")
    sweep.add_argument(
        "--projections",
        default="q,v,qv,qkvo",
        help="sets of projections, with commas between (default: q,v,qv,qkvo)",
    )
    sweep.add_argument(
        "--metric",
        help="what is compared, measured on the validation data: accuracy, f1_macro, loss, ... "
        "(default: accuracy, or pearson for a regression)",
    )
    _add_series(sweep, each="setting", files="sweep.json and sweep.png", module="hf_lora.cli.sweep_commands")
    curve = commands.add_parser(
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
    curve.add_argument(
        "--shots",
        default="8,32,128,all",
        help="examples of each label, with commas between; all: the whole training data (default: 8,32,128,all)",
    )
    curve.add_argument(
        "--metric",
        help="what is drawn: accuracy, f1_macro, loss, ... (default: accuracy, or pearson for a regression)",
    )
    curve.add_argument("--plot", help="the picture: .png, .svg or .pdf (default: curve.png in --output_dir)")
    _add_series(
        curve, each="size", files="curve.json and curve.png", module="hf_lora.cli.learning_curve_commands"
    )


def _add_series(parser: argparse.ArgumentParser, *, each: str, files: str, module: str) -> None:
    """Add what all commands have that train a series of runs."""
    parser.add_argument("--seeds", type=int, default=3, help=f"runs of each {each} (default: 3)")
    parser.add_argument("--output_dir", required=True, help=f"where runs, {files} go")
    parser.add_argument(
        "--dry_run", action="store_true", help="list the runs and what is done of them, and stop"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of tables")
    parser.set_defaults(module=module, train_argv=[])
