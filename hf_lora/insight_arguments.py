"""The command lines of `inspect` and `report`: light, without torch, for `hf-lora --help`."""

from __future__ import annotations

import argparse
from typing import Any

MODULE = "hf_lora.insight_commands"


def add_insight_commands(commands: Any) -> None:
    """Add the two parsers to what `ArgumentParser.add_subparsers` returned.

    The options say in `module` where the function called `command` is.
    """
    inspect = commands.add_parser("inspect", help="tell what each update of an adapter does to its weight")
    _add_adapter(inspect)
    inspect.add_argument(
        "--directions",
        type=int,
        help="leading directions to measure amplification in (default: all that the update has)",
    )
    inspect.add_argument("--other", help="a second adapter, to compare subspaces with: directory or Hub id")
    inspect.add_argument("--other_revision", help="branch, tag or commit of the second adapter on the Hub")
    inspect.add_argument(
        "--directions_of",
        choices=("factors", "update"),
        default="factors",
        help="compare the directions of A and of B, as in the LoRA paper, or those of their product "
        "(default: factors)",
    )
    inspect.add_argument("--plot", metavar="FILE.png", help="draw heat maps; needs matplotlib")
    inspect.add_argument("--json", action="store_true", help="print one JSON object in place of tables")

    report = commands.add_parser("report", help="write one page about an adapter: HTML or Markdown")
    _add_adapter(report)
    report.add_argument("--output", required=True, help="the page to write: FILE.html or FILE.md")
    report.add_argument("--test_file", help="file or folder with texts and labels to measure on")
    report.add_argument("--dataset_name", help="Hub data set with a test split, in place of --test_file")
    report.add_argument("--dataset_config_name", help="configuration of the Hub data set")
    report.add_argument("--text_column", help="column of the text (default: as in training)")
    report.add_argument("--text_pair_column", help="column of the second text of a pair")
    report.add_argument("--label_column", help="column of the label")
    report.add_argument("--encoding", default="utf-8", help="character encoding of the file (default: utf-8)")
    report.add_argument("--max_test_samples", type=int, help="use only the first N examples")
    report.add_argument(
        "--mistakes", type=int, default=12, help="how many of the worst mistakes to show (default: 12)"
    )
    report.add_argument(
        "--batch_size", type=int, help="texts at a time (default: as many as make 2,048 tokens)"
    )
    report.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of the encoder; auto is bf16 where the hardware multiplies it natively, else fp32 (default: auto)",
    )
    for parser in (inspect, report):
        parser.set_defaults(module=MODULE)


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, help="adapter directory or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of the adapter on the Hub")
    parser.add_argument("--base", help="another place of the base model than the one the adapter names")
    parser.add_argument(
        "--skip_base_check",
        action="store_true",
        help="use a base model whose weights differ from those trained on",
    )
