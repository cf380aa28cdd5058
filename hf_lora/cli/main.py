"""The command `hf-lora`. Light, so that `--help` is quick: a command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from hf_lora.cli import change, inspect, predict, share, sweep, train
from hf_lora.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, or 2 after a mistake of the user, which is told in one line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["train"]:
            return train.run(argv[1:])
        options = _options(argv)
        _quiet_libraries()
        options.run(options)
        return 0
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
        return 1  # another process of this run failed first and said why
    except KeyboardInterrupt:
        print("hf-lora: interrupted", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command but `train`, which has hundreds of options of its own."""
    parser = argparse.ArgumentParser(
        prog="hf-lora",
        description="LoRA fine-tuning for BERT-style text classifiers.",
        epilog="Set HF_LORA_TRACEBACK=1 to see where an error comes from.",
    )
    parser.add_argument("--version", action="version", version=f"hf-lora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for module in (train, predict, inspect, share, change, sweep):
        module.register(commands)
    return parser


def _options(argv: list[str]) -> argparse.Namespace:
    """The parsed options. `sweep` and `curve` pass options that they do not know on to `train`."""
    parser = make_parser()
    options, others = parser.parse_known_args(argv)
    if "train_argv" in options:
        options.train_argv = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return options


def _first_to_fail() -> bool:
    """Whether this process tells the error: a run of several processes gives one message."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    from hf_lora.training.distributed import first_to_fail

    return first_to_fail()


def _process() -> str:
    """The name of this process among several."""
    return f"process {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def _quiet_libraries() -> None:
    """Switch off progress bars of model loading: programs read the output of these commands."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
