"""The command lines of `inspect` and `report`: light, without torch, for `hf-lora --help`."""

from __future__ import annotations

from typing import Any

from hf_lora.cli.common_arguments import add_adapter, add_labelled_data, add_speed

MODULE = "hf_lora.cli.insight_commands"


def add_insight_commands(commands: Any) -> None:
    """Add the two parsers to what `ArgumentParser.add_subparsers` returned.

    The options say in `module` where the function called `command` is.
    """
    inspect = commands.add_parser("inspect", help="tell what each update of an adapter does to its weight")
    add_adapter(inspect)
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
    add_adapter(report)
    report.add_argument("--output", required=True, help="the page to write: FILE.html or FILE.md")
    add_labelled_data(report)
    report.add_argument(
        "--mistakes", type=int, default=12, help="how many of the worst mistakes to show (default: 12)"
    )
    add_speed(report)
    for parser in (inspect, report):
        parser.set_defaults(module=MODULE)
