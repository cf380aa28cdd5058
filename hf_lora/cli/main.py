"""The command `hf-lora`, and `train` once more in every process of a cluster.

Light, so that `--help` is quick: a command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hf_lora._choices import nearest
from hf_lora.cli import change, inspect, predict, share, sweep, train
from hf_lora.cli.shared import Parser
from hf_lora.cli.train import LAUNCH
from hf_lora.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, or 2 after a mistake of the user, which is told in one line.

    SIGTERM exits with 143, as an exception does: nothing half-written stays.
    """
    with _exiting_on_sigterm():
        return _run(list(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    try:
        if argv[:1] == ["train"]:
            return _train(argv[1:])
        options = _options(argv)
        _quiet_libraries()
        options.run(options)
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get("HF_LORA_TRACEBACK"):
            raise
        if _first_to_fail():
            from hf_lora._text import one_line

            print(f"hf-lora: {_process()}{one_line(error)}", file=sys.stderr)
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
    parser = Parser(
        prog="hf-lora",
        description="LoRA fine-tuning for BERT-style text classifiers.",
        epilog="Set HF_LORA_TRACEBACK=1 to see where an error comes from.",
    )
    parser.add_argument("--version", action="version", version=f"hf-lora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for module in (train, predict, inspect, share, change, sweep):
        module.register(commands)
    return parser


def _train(argv: list[str]) -> int:
    if train.answered(argv):
        return 0
    launch, argv = take_launch_options(argv)
    if launch is not None:
        return relaunched(launch, argv)
    train.run(argv)
    return 0


@dataclass(frozen=True)
class Launch:
    """A configuration of accelerate, and what stands in its place on this machine, as flags."""

    config: Path
    overrides: tuple[str, ...]


def take_launch_options(argv: Sequence[str]) -> tuple[Launch | None, list[str]]:
    """Split the command line of `train` into what is for the launcher and what is for the run.

    None where no configuration is named, or where this is a launched process already.
    Raises ValueError for a name that is neither a file nor one of ours, and for the launcher's flags without one.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--accelerate_config")
    for name in LAUNCH:
        parser.add_argument(f"--{name}")
    options, rest = parser.parse_known_args(list(argv))
    given = {name: value for name in LAUNCH if (value := getattr(options, name)) is not None}
    if options.accelerate_config is None:
        if given:
            raise ValueError(
                f"--{next(iter(given))} is for the launcher; got no --accelerate_config; "
                f"expected a file or one of {', '.join(launch_names())}"
            )
        return None, rest
    overrides = tuple(word for name, value in given.items() for word in (f"--{name}", value))
    return Launch(_file(options.accelerate_config), overrides), rest


def relaunched(launch: Launch, argv: Sequence[str]) -> int:
    """Run `hf-lora train argv` through `accelerate launch`: in place of this process, or returns its exit code."""
    if "LOCAL_RANK" in os.environ:
        raise ValueError(
            "--accelerate_config starts processes; got it in one that a launcher has started; "
            "leave it out, or call hf-lora without a launcher"
        )
    module = [sys.executable, "-m", "accelerate.commands.launch"]
    command = [
        *module,
        "--config_file",
        str(launch.config),
        *launch.overrides,
        "-m",
        "hf_lora.cli.main",
        "train",
        *argv,
    ]
    if os.name == "posix":
        # In its place, so that whoever stops this process stops the launcher, and with it all others.
        sys.stdout.flush()
        os.execv(command[0], command)
    return subprocess.run(command).returncode


def launch_names() -> list[str]:
    """The short names of the configurations that come with the package."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _file(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    if name not in launch_names():
        raise ValueError(
            f"no such accelerate configuration; got {name!r}; expected a file or one of "
            f"{', '.join(launch_names())}{nearest(name, launch_names())}"
        )
    return _folder() / f"{name}.yaml"


def _folder() -> Path:
    """Where the configurations are: beside this file when installed, in `scripts` of a checkout."""
    here = Path(__file__).parents[1]
    installed = here / "accelerate_configs"
    return installed if installed.is_dir() else here.parent / "scripts" / "accelerate"


class _Exit:
    """A handler of signals that exits; training takes its place to save a checkpoint first."""

    gives_way = True

    def __call__(self, number: int, frame: object) -> None:
        sys.exit(128 + number)


@contextmanager
def _exiting_on_sigterm() -> Iterator[None]:
    unhandled = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not unhandled or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, _Exit())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _options(argv: list[str]) -> argparse.Namespace:
    """The parsed options. `sweep` and `curve` pass options that they do not know on to `train`."""
    parser = make_parser()
    options, others = parser.parse_known_args(argv)
    if "train_argv" in options:
        options.train_argv = others
    elif others:
        near = nearest(others[0].lstrip("-"), vars(options), prefix="--")
        parser.error(f"unrecognized arguments: {' '.join(others)}{near}")
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
