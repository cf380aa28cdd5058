"""`hf-lora train --accelerate_config NAME ...`: the same command once more, in every process of a cluster."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# What accelerate's launcher takes besides its file, and overrides in it.
OVERRIDES = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")


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
    for name in OVERRIDES:
        parser.add_argument(f"--{name}")
    options, rest = parser.parse_known_args(list(argv))
    given = {name: value for name in OVERRIDES if (value := getattr(options, name)) is not None}
    if options.accelerate_config is None:
        if given:
            raise ValueError(
                f"--{next(iter(given))} is for the launcher; got no --accelerate_config; "
                f"expected a file or one of {', '.join(names())}"
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


def names() -> list[str]:
    """The short names of the configurations that come with the package."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _file(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    if name not in names():
        raise ValueError(
            f"no such accelerate configuration; got {name!r}; expected a file or one of {', '.join(names())}"
        )
    return _folder() / f"{name}.yaml"


def _folder() -> Path:
    """Where the configurations are: beside this file when installed, in `scripts` of a checkout."""
    here = Path(__file__).parents[1]
    installed = here / "accelerate_configs"
    return installed if installed.is_dir() else here.parent / "scripts" / "accelerate"
