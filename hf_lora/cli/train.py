"""`hf-lora train`: from flags and YAML to a run, and what a person sees of it."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lora._choices import option
from hf_lora.cli.shared import Parser
from hf_lora.recipe import options as known
from hf_lora.recipe.options import FROM_DATA, Option, all_options, options_of

if TYPE_CHECKING:
    from transformers import HfArgumentParser

    from hf_lora.recipe.settings import Recipe

_WIDTH, _COLUMN = 100, 32
# What accelerate's launcher takes besides its file, and overrides in it.
LAUNCH = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")


@dataclass(frozen=True, kw_only=True)
class TerminalOptions:
    """The terminal."""

    quiet: bool = option(False, help="Print the results alone, as plain lines.")
    dry_run: bool = option(False, help="Print the settings and the modules to adapt, and stop.")


_HELP = """\
usage: hf-lora train [CONFIG.yaml] --model_name_or_path M (--train_file F | --dataset_name D) --output_dir O [options]

Fine-tune a pretrained encoder with LoRA on a text classification data set.

examples:
  hf-lora train --model_name_or_path bert-base-uncased --train_file reviews.csv --output_dir runs/reviews
  hf-lora train --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --train_file train.csv \\
      --test_file test.csv --few_shot 32 --output_dir runs/few
"""
_MORE = """
A YAML file holds the same names as keys; flags override it.
hf-lora train --help_all lists all options, those of transformers.TrainingArguments included.
Set HF_LORA_TRACEBACK=1 to see where an error comes from."""


def register(commands: Any) -> None:
    """Name the command in `hf-lora --help`; its hundreds of flags are parsed here."""
    commands.add_parser("train", help="fine-tune a model and export the adapter", add_help=False)


def answered(argv: Sequence[str]) -> bool:
    """Print the help that is asked for, if any. Raises ValueError for an unknown flag. Quick: nothing is loaded."""
    if not argv or {"-h", "--help"} & set(argv):
        print(help_text())
    elif "--help_all" in argv:
        print(full_help())
    else:
        check_flags(argv)
        return False
    return True


def run(argv: Sequence[str]) -> None:
    """Train as the command line says."""
    from transformers.utils import logging as transformers_logging

    from hf_lora.cli.display import display_of, show_results
    from hf_lora.recipe.finetune import Finetuning
    from hf_lora.recipe.settings import Recipe
    from hf_lora.training.distributed import leave

    transformers_logging.disable_progress_bar()
    settings = parse_settings(argv)
    quiet, dry = settings.pop("quiet"), settings.pop("dry_run")
    recipe = Recipe.from_settings(settings)
    if dry:
        dry_run(recipe)
        return
    with display_of(quiet=quiet) as display:
        result = Finetuning(recipe, progress=display).run()
    if recipe.args.process_index == 0:
        show_results(result, plain=quiet or not sys.stdout.isatty())
    leave()


def check_flags(argv: Sequence[str], also: Iterable[str] = ()) -> None:
    """Raise ValueError, with the nearest known one, for an unknown flag: before anything heavy is imported.

    also: flags that the caller knows.
    """
    flags = [word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    ours = [entry.name for entry in options_of(TerminalOptions)]
    # --no_x switches off what is on by default.
    names = [flag for flag in flags if not flag.startswith("no_")]
    known.check_names(names, also=[*also, *ours, *LAUNCH, "accelerate_config", "help_all"], prefix="--")


def parse_settings(argv: Sequence[str]) -> dict[str, Any]:
    """Every option by its name, from `[CONFIG.yaml] --flags`; a flag overrides the file.

    Raises ValueError, in one line, for unknown or unusable flags and for a bad file.
    """
    parser, argv = make_parser(), list(argv)
    if argv and not argv[0].startswith("-"):
        settings = read_yaml(Path(argv[0]))
        # None has no spelling on the command line: it becomes the default.
        parser.set_defaults(**{key: None for key, value in settings.items() if value is None})
        argv = [*_flags(settings, parser), *argv[1:]]
    return vars(parser.parse_args(argv))


def make_parser() -> HfArgumentParser:
    """The parser of `hf-lora train`: our options and all of TrainingArguments."""
    from transformers import HfArgumentParser

    from hf_lora.training.arguments import LoRATrainingArguments

    class TrainingParser(HfArgumentParser, Parser):
        """transformers' parser, whose mistakes are told as ours are."""

    ours = [
        *(all_options()[title] for title in ("model", "data", "LoRA", "run")),
        options_of(TerminalOptions),
    ]
    groups = [*map(_flag_class, ours), LoRATrainingArguments]
    parser = TrainingParser(groups, prog="hf-lora train", allow_abbrev=False)  # type: ignore[misc, arg-type]
    parser.set_defaults(**known.training_defaults())
    for action in parser._actions:
        action.required |= action.dest == "output_dir"
        if action.dest == "resume_from_checkpoint":
            action.nargs, action.const = "?", "last"
    return parser


def _flag_class(options: Iterable[Option]) -> type:
    """A dataclass whose fields are options under their flags, for HfArgumentParser."""
    entries = []
    for entry in options:
        value = field(default=entry.default, metadata={"help": entry.help})
        entries.append((entry.name, entry.type, value))
    return make_dataclass("Flags", entries, kw_only=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a YAML file. Raises ValueError, in one line, if it is not a mapping of known names."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the configuration {str(path)!r}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} is no configuration; expected lines such as 'learning_rate: 1e-3'")
    also = [entry.name for entry in options_of(TerminalOptions)]
    known.check_names(map(str, values), f"key in {str(path)!r}: ", also=also)
    return values


def _flags(settings: dict[str, Any], parser: HfArgumentParser) -> list[str]:
    """The settings as command-line flags, so that both are checked by the same parser."""
    choices = {action.dest: action.choices or () for action in parser._actions}
    flags = []
    for key, value in settings.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif value is not None:
            if value is False and "no" in choices[key]:
                value = "no"  # YAML reads a bare `no` as false
            # One word, since a value of its own may start with a dash.
            flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def help_text() -> str:
    """The text of `hf-lora train --help`: the options that people use."""
    ours = {entry.name: entry for group in all_options().values() for entry in group}
    lines = _option_lines([*(ours[name] for name in known.COMMON), *options_of(TerminalOptions)])
    return "\n".join([_HELP, "options:", *lines, _MORE])


def full_help() -> str:
    """The text of `hf-lora train --help_all`: every option, by topic."""
    from hf_lora.training.arguments import LoRATrainingArguments

    lines, told = [_HELP.rstrip()], set()
    for title, entries in {**all_options(), "terminal": tuple(options_of(TerminalOptions))}.items():
        lines += ["", f"{title}:", *_option_lines(entries)]
        told |= {entry.name for entry in entries}
    others = [
        Option(
            each.name, each.name, LoRATrainingArguments, each.type, each.default, str(each.metadata["help"])
        )
        for each in fields(LoRATrainingArguments)
        if each.name not in told and "help" in each.metadata
    ]
    return "\n".join([*lines, "", "transformers.TrainingArguments:", *_option_lines(others), _MORE])


def _option_lines(entries: Iterable[Option]) -> Iterator[str]:
    for entry in entries:
        shown = "required" if entry.required else f"default: {getattr(entry.default, 'value', entry.default)}"
        left = entry.default is None or entry.default is MISSING or entry.name in FROM_DATA
        text = entry.help if left and not entry.required else f"{entry.help} ({shown})"
        flag = f"  --{entry.name}"
        words = textwrap.wrap(" ".join(text.split()), _WIDTH - _COLUMN)
        if len(flag) >= _COLUMN:
            yield flag
            flag = ""
        yield flag.ljust(_COLUMN) + words[0]
        yield from (" " * _COLUMN + line for line in words[1:])


def dry_run(recipe: Recipe) -> None:
    """Print the settings and the modules that would be adapted; no weights are loaded."""
    from hf_lora.lora.inject import inject_lora, trainable_parameter_count
    from hf_lora.models.loading import meta_classifier

    model = meta_classifier(recipe.model.model_name_or_path, **recipe.model.place)
    names = inject_lora(model, recipe.lora_config)
    left_open = {name: "from the data" for name in FROM_DATA if getattr(recipe.args, name) == 0}
    settings = {"lora": recipe.lora_config.to_dict(), "training": recipe.args.to_dict() | left_open}
    print(json.dumps(settings, indent=2, sort_keys=True))
    print("\n".join(names))
    print(f"{len(names)} modules; {trainable_parameter_count(model)} with a head of 2 labels")
