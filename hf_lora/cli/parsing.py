"""Command line and YAML -> the dataclasses of a training run, through HfArgumentParser."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from hf_lora.recipe.arguments import (
    GROUPS,
    TRAINING_DEFAULTS,
    DataArguments,
    LoRAArguments,
    ModelArguments,
    RunArguments,
)
from hf_lora.training.arguments import LoRATrainingArguments

Parsed = tuple[ModelArguments, DataArguments, LoRAArguments, RunArguments, LoRATrainingArguments]


class TrainingParser(HfArgumentParser):
    """HfArgumentParser that tells a mistake in one line, without the usage of hundreds of flags."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError in place of printing and exiting."""
        raise ValueError(f"{message}; hf-lora train --help lists the arguments")


def make_parser() -> TrainingParser:
    """The parser of `hf-lora train`: our arguments and all of TrainingArguments."""
    parser = TrainingParser([*GROUPS, LoRATrainingArguments], prog="hf-lora train", allow_abbrev=False)
    parser.set_defaults(**TRAINING_DEFAULTS)
    actions = {action.dest: action for action in parser._actions}
    actions["output_dir"].required = True
    actions["resume_from_checkpoint"].nargs = "?"
    actions["resume_from_checkpoint"].const = "last"
    return parser


def parse_training(argv: list[str]) -> Parsed:
    """Parse `[CONFIG.yaml] --flags`; a flag overrides the file.

    Raises ValueError, in one line, for unknown or unusable flags and for a bad file.
    """
    parser = make_parser()
    if argv and not argv[0].startswith("-"):
        settings = read_yaml(Path(argv[0]))
        # None has no spelling on the command line: it becomes the default.
        parser.set_defaults(**{key: None for key, value in settings.items() if value is None})
        argv = [*_flags(settings, parser), *argv[1:]]
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a YAML file. Raises ValueError, in one line, if it is not a mapping of known names."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the configuration {str(path)!r}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} is no configuration; expected lines such as 'learning_rate: 1e-3'")
    unknown = sorted(str(key) for key in set(values) - option_names())
    if unknown:
        raise ValueError(
            f"{str(path)!r} has unknown keys; got {unknown}; hf-lora train --help lists the known ones"
        )
    return values


def option_names() -> set[str]:
    """Every name that `hf-lora train` knows."""
    return {entry.name for group in (*GROUPS, LoRATrainingArguments) for entry in dataclasses.fields(group)}


def _flags(settings: dict[str, Any], parser: HfArgumentParser) -> list[str]:
    """The settings as command-line flags, so that both are checked by the same parser."""
    choices = {action.dest: action.choices or () for action in parser._actions}
    return [
        flag
        for key, value in settings.items()
        if value is not None
        for flag in _flag(key, value, yaml_no="no" in choices[key])
    ]


def _flag(key: str, value: Any, *, yaml_no: bool) -> list[str]:
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    if yaml_no and value is False:
        return [f"--{key}=no"]  # YAML reads a bare `no` as false
    # One word, since a value of its own may start with a dash.
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]
