"""Generated parts of pages: a line `<!-- generated: NAME -->` of a page is replaced by Markdown made from the source.

Options come from their dataclasses, commands from their own --help, model types from the table of architectures,
benchmark tables from scripts/benchmarks/results.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterable
from dataclasses import MISSING
from importlib import import_module
from typing import Any

import tables
from tables import Row

import hf_lora
from hf_lora.lora.architectures import ARCHITECTURES, Projection

MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
COMMANDS = {
    "Use an adapter": ("predict", "evaluate", "info"),
    "Look into an adapter": ("inspect", "report"),
    "Share an adapter": ("push", "merge", "export"),
    "Change adapters": ("resize", "add", "extract"),
    "Compare settings": ("sweep", "curve"),
    "Prepare": ("targets",),
}


def option_topics() -> list[tuple[str, list[tuple[str, str, Any, str]]]]:
    """(topic, [(name, type, default, help)]) of every option of `hf-lora train`."""
    from hf_lora.cli.train import TerminalOptions
    from hf_lora.recipe.options import all_options, options_of

    topics = {**all_options(), "terminal": tuple(options_of(TerminalOptions))}
    return [
        (title[0].upper() + title[1:], [(o.name, _kind(o.type), o.default, o.help) for o in entries])
        for title, entries in topics.items()
    ]


def _kind(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)).removesuffix(" | None")


def options() -> Iterable[str]:
    """The options of `hf-lora train` by topic, each with a link of its own."""
    for topic, entries in option_topics():
        yield f"\n## {topic}\n\n```{{program}} hf-lora train\n```"
        for name, kind, default, help_text in entries:
            shown = "" if default in (None, MISSING) else f"\n\n*Default:* `{default}`"
            text = " ".join(str(help_text).split())
            yield f"\n````{{option}} --{name} <{kind}>\n{text}{shown}\n````"


def commands() -> Iterable[str]:
    """What `hf-lora COMMAND --help` prints, for every command but train."""
    for topic, names in COMMANDS.items():
        yield f"\n## {topic}\n"
        for name in names:
            yield f"### hf-lora {name}\n\n```text\n{help_of(name)}\n```\n"


def help_of(command: str) -> str:
    """The help of a command, 88 columns wide."""
    from hf_lora.cli.main import main

    os.environ["COLUMNS"] = "90"
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([command, "--help"])
    return out.getvalue().rstrip()


# Names that `hf_lora` itself does not have stand with their modules.
API = {
    "Train": (
        "finetune",
        "FinetuneResult",
        "recipe.results.SplitResult",
        "recipe.results.Scores",
        "FinetuneOptions",
        "recipe.progress.Progress",
    ),
    "Compare settings": ("recipe.sweep.sweep", "recipe.sweep.learning_curve"),
    "Train with a loop of your own": (
        "load_classifier",
        "LoRATrainer",
        "LoRATrainingArguments",
        "start_head",
        "start_lora",
    ),
    "Predict": ("TextClassifier", "AdapterBank", "bank.finetuned.FinetunedReport"),
    "LoRA in a model": (
        "LoRAConfig",
        "inject_lora",
        "remove_lora",
        "merge_lora",
        "unmerge_lora",
        "lora_disabled",
        "lora_layers",
        "lora_parameters",
        "head_parameters",
        "trainable_parameter_count",
    ),
    "Adapters": ("save_adapter", "load_adapter", "push_adapter"),
}


def api() -> Iterable[str]:
    """Every public name, by topic; those that no topic names come last."""
    known = {name for names in API.values() for name in names}
    others = tuple(name for name in hf_lora.__all__ if name not in known and not name.startswith("__"))
    for topic, names in {**API, **({"Others": others} if others else {})}.items():
        yield f"\n## {topic}\n"
        for name in names:
            yield from _documented(name)


def _documented(name: str) -> Iterable[str]:
    module, _, short = f"hf_lora.{name}".rpartition(".")
    kind = "class" if isinstance(getattr(import_module(module), short), type) else "function"
    # The fields of the one are on the page of options, the methods of the other are Trainer's.
    inherited = {
        "LoRATrainingArguments": "(output_dir, **options)",
        "LoRATrainer": "(model, args, **options)",
    }
    yield f"\n### {short}\n"
    yield f"```{{eval-rst}}\n.. auto{kind}:: hf_lora.{name}{inherited.get(name, '')}"
    yield "   :members:\n```\n" if kind == "class" and name not in inherited else "```\n"
    if name in ("FinetuneOptions", "LoRATrainingArguments"):
        yield "The fields are {doc}`options`.\n"


def models() -> Iterable[str]:
    """The known model types, those with the same modules in one row."""
    rows: dict[Row, list[str]] = {}
    for model_type in sorted(ARCHITECTURES):
        architecture = ARCHITECTURES.get(model_type)
        inputs = [place for role in "qkv" for place in architecture.projections(role)]
        cells = (architecture.reason or _suffixes(inputs), _suffixes(architecture.o) or "none")
        rows.setdefault(cells, []).append(f"`{model_type}`")
    header = ("model types", "q, k, v", "o")
    yield from tables.markdown(header, ((" ".join(types), *cells) for cells, types in rows.items()))


def _suffixes(places: Iterable[Projection]) -> str:
    """The names of the modules, each once."""
    return "<br>".join(dict.fromkeys(f"`{place.suffix}`" for place in places))


GENERATORS = {"options": options, "commands": commands, "api": api, "models": models, **tables.TABLES}


def expand(text: str) -> str:
    """The page with its markers replaced. Raises KeyError for an unknown name."""
    return MARKER.sub(lambda match: "\n".join(GENERATORS[match.group(1)]()), text)


ITEM = re.compile(r"([a-z_]+(?:, [a-z_]+)*): (.+)")
NEXT_ITEM = re.compile(r"(?<=[.]) (?=[a-z_]+: )")


def with_lists(lines: list[str]) -> list[str]:
    """A docstring whose paragraphs `name: meaning` are items of a list, as reStructuredText wants them."""
    found: list[str] = []
    for line in lines:
        in_item = bool(found) and found[-1].startswith("* ")
        if ITEM.fullmatch(line):
            found += ["", f"* {line}"]
        elif in_item and line and (line.startswith("    ") or not found[-1].endswith(".")):
            found[-1] += f" {line.strip()}"
        else:
            found += ["", line] if in_item and line else [line]
    return [part for line in found for part in _items(line)]


def _items(line: str) -> list[str]:
    """An item, with those that follow it in the same paragraph; another line as it is."""
    if not line.startswith("* "):
        return [line]
    items = [ITEM.fullmatch(part) for part in NEXT_ITEM.split(line[2:])]
    return [
        f"* {', '.join(f'``{name}``' for name in item.group(1).split(', '))}: {item.group(2)}"
        for item in items
        if item is not None
    ]


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""

    def replace(app: Any, docname: str, source: list[str]) -> None:
        if MARKER.search(source[0]):
            source[0] = expand(source[0])
            app.env.note_reread()  # its text comes from other files

    def listed(app: Any, what: str, name: str, entry: Any, options: Any, lines: list[str]) -> None:
        lines[:] = with_lists(lines)

    app.connect("source-read", replace)
    app.connect("autodoc-process-docstring", listed)
    return {"parallel_read_safe": True}
