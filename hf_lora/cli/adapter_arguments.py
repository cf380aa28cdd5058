"""The command lines of `resize`, `add`, `extract` and `push`: light, without torch, for `hf-lora --help`."""

from __future__ import annotations

import argparse
from typing import Any

MODULE = "hf_lora.cli.adapter_commands"


def add_adapter_commands(commands: Any) -> None:
    """Add the parsers to what `ArgumentParser.add_subparsers` returned.

    The options say in `module` where the function called `command` is.
    """
    resize = commands.add_parser("resize", help="write an adapter at a lower rank, the best approximation")
    resize.add_argument("--adapter", required=True, help="adapter directory or Hub id")
    resize.add_argument("--revision", help="branch, tag or commit of the adapter on the Hub")
    _add_budget(resize, required=True)
    _add_output(resize)

    add = commands.add_parser("add", help="write the weighted sum, or the average, of adapters of one base")
    add.add_argument("--adapters", required=True, nargs="+", help="adapter directories or Hub ids")
    add.add_argument(
        "--weights", nargs="+", type=float, help="a number for each adapter, also negative (default: 1 each)"
    )
    add.add_argument("--average", action="store_true", help="divide the weights by their sum")
    _add_budget(add, required=False)
    _add_output(add)

    extract = commands.add_parser("extract", help="write what a full fine-tuning changed as an adapter")
    extract.add_argument("--base", required=True, help="the pretrained model: Hub id or local directory")
    extract.add_argument("--base_revision", help="branch, tag or commit of the pretrained model")
    extract.add_argument("--finetuned", required=True, help="the fine-tuned classifier: Hub id or directory")
    extract.add_argument("--finetuned_revision", help="branch, tag or commit of the fine-tuned classifier")
    _add_budget(extract, required=True)
    which = extract.add_mutually_exclusive_group()
    which.add_argument(
        "--all_linear",
        action="store_true",
        help="every linear layer outside the head (default: full fine-tuning changes them all alike)",
    )
    which.add_argument("--projections", help="only these attention projections: letters of qkvo")
    extract.add_argument(
        "--keep_vectors",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="carry changed biases and LayerNorms exactly (default: yes)",
    )
    _add_output(extract)
    for parser in (resize, add, extract):
        parser.set_defaults(module=MODULE)
    _add_push(commands)


def _add_push(commands: Any) -> None:
    push = commands.add_parser("push", help="push an adapter to the Hub: its own files, and nothing else")
    push.add_argument("--adapter", required=True, help="adapter directory")
    push.add_argument("--repo_id", required=True, help="user/name of the repository, made if it is missing")
    push.add_argument("--private", action="store_true", help="make the repository private")
    push.add_argument("--revision", help="branch to push to, made if it is missing (default: main)")
    push.add_argument("--create_pr", action="store_true", help="open a pull request; main stays as it is")
    push.add_argument("--commit_message", help="what the commit says (default: Upload LoRA adapter)")
    push.add_argument("--json", action="store_true", help="print one JSON object in place of a table")
    push.set_defaults(module="hf_lora.cli.hub_commands")


def _add_budget(parser: argparse.ArgumentParser, *, required: bool) -> None:
    budget = parser.add_mutually_exclusive_group(required=required)
    budget.add_argument("--rank", type=int, help="the highest rank of a module")
    budget.add_argument(
        "--energy",
        type=float,
        help="the share of the squared singular values that each module keeps, such as 0.9",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", required=True, help="where the adapter goes; must not exist")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of tables")
