"""The command line of `sweep`: light, without torch, for `hf-lora --help`."""

from __future__ import annotations

from typing import Any

MODULE = "hf_lora.sweep_commands"


def add_sweep_commands(commands: Any) -> None:
    """Add the parser to what `ArgumentParser.add_subparsers` returned.

    The options say in `module` where the function called `command` is. What this parser does not know is for
    `hf-lora train`, and belongs into `train_argv`.
    """
    sweep = commands.add_parser(
        "sweep",
        help="train ranks, projections and seeds, and find the smallest setting that is as good as the best",
        usage="hf-lora sweep [CONFIG.yaml] --output_dir O [--ranks R,R] [--projections P,P] [--seeds N] [options]",
        description="Train every pair of a rank and a set of projections with every seed, all on the same split of "
        "the data, and print mean, spread, parameters and seconds. A run that is done is used as it is; a sweep "
        "that was stopped goes on with the same command.",
        epilog="Every argument of hf-lora train works here too, for all runs: hf-lora train --help lists them. "
        "--seed is the first seed and the one that the data are split with.",
        # `--seed` is an argument of the runs and no abbreviation of `--seeds`.
        allow_abbrev=False,
    )
    sweep.add_argument("--ranks", default="1,2,4,8", help="ranks, with commas between (default: 1,2,4,8)")
    sweep.add_argument(
        "--projections",
        default="q,v,qv,qkvo",
        help="sets of projections, with commas between (default: q,v,qv,qkvo)",
    )
    sweep.add_argument("--seeds", type=int, default=3, help="runs of each setting (default: 3)")
    sweep.add_argument(
        "--metric",
        help="what is compared, measured on the validation data: accuracy, f1_macro, loss, ... "
        "(default: accuracy, or pearson for a regression)",
    )
    sweep.add_argument("--output_dir", required=True, help="where runs, sweep.json and sweep.png go")
    sweep.add_argument(
        "--dry_run", action="store_true", help="list the runs and what is done of them, and stop"
    )
    sweep.add_argument("--json", action="store_true", help="print one JSON object in place of tables")
    sweep.set_defaults(module=MODULE, train_argv=[])
