"""The `hf-lora` command: light, so that --help is quick; the work is imported when a subcommand runs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from hf_lora.cli.adapter_arguments import add_adapter_commands
from hf_lora.cli.common_arguments import add_adapter, add_labelled_data, add_speed
from hf_lora.cli.export_arguments import add_export_commands
from hf_lora.cli.insight_arguments import add_insight_commands
from hf_lora.cli.sweep_arguments import add_sweep_commands
from hf_lora.recipe.arguments import help_text
from hf_lora.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 2 for a user's mistake, told in one line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["train"]:
            return _train(argv[1:])
        options = _options(argv)
        _quiet_libraries()
        commands = import_module(getattr(options, "module", "hf_lora.cli.commands"))
        return getattr(commands, options.command)(options)
    except (ValueError, OSError) as error:
        if os.environ.get("HF_LORA_TRACEBACK"):
            raise
        if _first_to_fail():
            from hf_lora._text import printable

            print(f"hf-lora: {_process()}{printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except Exception:
        if _first_to_fail():
            raise
        return 1  # another process of this run has failed and said why; this one has only lost it
    except KeyboardInterrupt:
        print("hf-lora: interrupted", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    """The parser of every subcommand but `train`, which has hundreds of flags of its own."""
    parser = argparse.ArgumentParser(
        prog="hf-lora",
        description="LoRA fine-tuning for BERT-style text classifiers.",
        epilog="Set HF_LORA_TRACEBACK=1 to see where an error comes from.",
    )
    parser.add_argument("--version", action="version", version=f"hf-lora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="fine-tune a model and export the adapter", add_help=False)

    evaluate = commands.add_parser(
        "evaluate", help="measure an adapter, and the base model without it, on a file"
    )
    add_adapter(evaluate)
    add_labelled_data(evaluate)
    add_speed(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object in place of tables")

    predict = commands.add_parser("predict", help="classify texts; writes JSON lines")
    add_adapter(predict)
    predict.add_argument(
        "texts", nargs="*", metavar="TEXT", help="texts; without any, and no file: standard input"
    )
    predict.add_argument("--input_file", help="txt (one text per line), csv, tsv, jsonl or parquet; any size")
    predict.add_argument("--text_column", help="column of the text in the file (default: as in training)")
    predict.add_argument("--text_pair_column", help="column of the second text of a pair")
    predict.add_argument(
        "--encoding", default="utf-8", help="character encoding of the file (default: utf-8)"
    )
    predict.add_argument("--output_file", help="where to write (default: standard output)")
    add_speed(predict)

    merge = commands.add_parser("merge", help="write base and adapter as one plain transformers checkpoint")
    add_adapter(merge)
    merge.add_argument("texts", nargs="*", metavar="TEXT", help="texts to compare merged and unmerged on")
    merge.add_argument("--output_dir", required=True, help="where the checkpoint goes; must not exist")
    merge.add_argument("--input_file", help="more texts to compare on")
    merge.add_argument("--text_column", help="column of the text in the file")
    merge.add_argument("--text_pair_column", help="column of the second text of a pair")
    merge.add_argument("--encoding", default="utf-8", help="character encoding of the file (default: utf-8)")
    merge.add_argument("--json", action="store_true", help="print one JSON object")

    info = commands.add_parser("info", help="tell what an adapter is")
    info.add_argument("--adapter", required=True, help="adapter directory or Hub id")
    info.add_argument("--revision", help="branch, tag or commit of the adapter on the Hub")
    info.add_argument("--json", action="store_true", help="print one JSON object")

    targets = commands.add_parser("targets", help="tell which modules q, k, v and o mean in a model")
    targets.add_argument("--model_name_or_path", required=True, help="Hub id or local directory")
    targets.add_argument("--model_revision", help="branch, tag or commit of the model")
    targets.add_argument("--lora_rank", type=int, default=8, help="rank to count parameters for (default: 8)")
    targets.add_argument("--lora_projections", default="qkvo", help="letters of qkvo (default: qkvo)")
    targets.add_argument(
        "--trust_remote_code", action="store_true", help="run code from the model's repository"
    )
    targets.add_argument("--json", action="store_true", help="print one JSON object")
    add_adapter_commands(commands)
    add_export_commands(commands)
    add_insight_commands(commands)
    add_sweep_commands(commands)
    return parser


def _options(argv: list[str]) -> argparse.Namespace:
    """The parsed options; what those of `sweep` and `curve` do not know is for the runs that they train."""
    parser = make_parser()
    options, others = parser.parse_known_args(argv)
    if "train_argv" in options:
        options.train_argv = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return options


def _train(argv: list[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        print(help_text())
        return 0
    if "--help_all" in argv:
        from hf_lora.cli.parsing import make_parser as make_training_parser

        print(make_training_parser().format_help())
        return 0
    from hf_lora.cli.launch import relaunched, take_launch_options

    launch, argv = take_launch_options(argv)
    if launch is not None:
        return relaunched(launch, argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    from hf_lora.recipe.finetune import run_training
    from hf_lora.training.distributed import leave

    run_training(argv)
    leave()
    return 0


def _first_to_fail() -> bool:
    """Whether an error is this process's own to tell: one message for a run of several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    from hf_lora.training.distributed import first_to_fail

    return first_to_fail()


def _process() -> str:
    """Which process of several speaks."""
    return f"process {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def _quiet_libraries() -> None:
    """Keep progress bars of model loading out of commands whose output is read by programs."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
