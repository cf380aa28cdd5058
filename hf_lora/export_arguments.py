"""The command line of `export`: light, without torch, for `hf-lora --help`."""

from __future__ import annotations

import argparse
from typing import Any

MODULE = "hf_lora.export_commands"
FORMATS = ("onnx", "safetensors-merged")


def add_export_commands(commands: Any) -> None:
    """Add the parser to what `ArgumentParser.add_subparsers` returned.

    The options say in `module` where the function called `command` is.
    """
    export = commands.add_parser(
        "export", help="write base and adapter for other tools: ONNX, or a transformers checkpoint"
    )
    export.add_argument("--adapter", required=True, help="adapter directory or Hub id")
    export.add_argument("--revision", help="branch, tag or commit of the adapter on the Hub")
    export.add_argument("--base", help="another place of the base model than the one the adapter names")
    export.add_argument(
        "--skip_base_check",
        action="store_true",
        help="use a base model whose weights differ from those trained on",
    )
    export.add_argument(
        "--format",
        choices=FORMATS,
        default="onnx",
        help="onnx: a graph for onnxruntime, in fp32; safetensors-merged: what `hf-lora merge` writes (default: onnx)",
    )
    export.add_argument("--output_dir", required=True, help="where the files go; must not exist")
    export.add_argument("--int8", action="store_true", help="with onnx: also a file with weights of 8 bits")
    _add_labelled_data(export)
    export.add_argument("--json", action="store_true", help="print one JSON object in place of tables")
    export.set_defaults(module=MODULE)


def _add_labelled_data(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("labelled data to measure the exported files on, with onnx")
    data.add_argument("--test_file", help="file or folder with texts and labels")
    data.add_argument("--dataset_name", help="Hub data set with a test split, in place of --test_file")
    data.add_argument("--dataset_config_name", help="configuration of the Hub data set")
    data.add_argument("--text_column", help="column of the text (default: as in training)")
    data.add_argument("--text_pair_column", help="column of the second text of a pair")
    data.add_argument("--label_column", help="column of the label")
    data.add_argument("--encoding", default="utf-8", help="character encoding of the file (default: utf-8)")
    data.add_argument("--max_test_samples", type=int, help="use only the first N examples")
