"""The command line of `export`: light, without torch, for `hf-lora --help`."""

from __future__ import annotations

from typing import Any

from hf_lora.cli.common_arguments import add_adapter, add_labelled_data

MODULE = "hf_lora.cli.export_commands"
FORMATS = ("onnx", "safetensors-merged")


def add_export_commands(commands: Any) -> None:
    """Add the parser to what `ArgumentParser.add_subparsers` returned.

    The options say in `module` where the function called `command` is.
    """
    export = commands.add_parser(
        "export", help="write base and adapter for other tools: ONNX, or a transformers checkpoint"
    )
    add_adapter(export)
    export.add_argument(
        "--format",
        choices=FORMATS,
        default="onnx",
        help="onnx: a graph for onnxruntime, in fp32; safetensors-merged: what `hf-lora merge` writes (default: onnx)",
    )
    export.add_argument("--output_dir", required=True, help="where the files go; must not exist")
    export.add_argument("--int8", action="store_true", help="with onnx: also a file with weights of 8 bits")
    add_labelled_data(export.add_argument_group("labelled data to measure the exported files on, with onnx"))
    export.add_argument("--json", action="store_true", help="print one JSON object in place of tables")
    export.set_defaults(module=MODULE)
