"""`hf-lora resize`, `add` and `extract`: adapters made from other adapters, and from a full fine-tuning."""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Mapping
from dataclasses import asdict
from math import hypot
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lora.cli.shared import ADAPTER, add_command, new_directory

if TYPE_CHECKING:
    from hf_lora.adapters.extract import Change, Extraction
    from hf_lora.adapters.values import Adapter

_COST = ("module", "old rank", "new rank", "kept energy", "relative error")


def register(commands: Any) -> None:
    """Add the commands."""
    words = "write an adapter at a lower rank, the best approximation"
    parser = add_command(commands, resize, words, *ADAPTER, "output_dir", "json")
    _add_budget(parser, required=True)

    words = "write the weighted sum, or the average, of adapters of one base"
    parser = add_command(commands, add, words, "output_dir", "json")
    parser.add_argument("--adapters", required=True, nargs="+", help="adapter directories or Hub ids")
    parser.add_argument(
        "--weights", nargs="+", type=float, help="a number for each adapter, also negative (default: 1 each)"
    )
    parser.add_argument("--average", action="store_true", help="divide the weights by their sum")
    _add_budget(parser, required=False)

    words = "write what a full fine-tuning changed as an adapter"
    parser = add_command(commands, extract, words, "output_dir", "json")
    parser.add_argument("--base", required=True, help="the pretrained model: Hub id or directory")
    parser.add_argument("--base_revision", help="branch, tag or commit of the pretrained model")
    parser.add_argument("--finetuned", required=True, help="the fine-tuned classifier: Hub id or directory")
    parser.add_argument("--finetuned_revision", help="branch, tag or commit of the fine-tuned classifier")
    _add_budget(parser, required=True)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--all_linear", action="store_true", help="every linear layer outside the head (the default)"
    )
    which.add_argument("--projections", help="only these attention projections: letters of qkvo")
    parser.add_argument(
        "--keep_vectors",
        action=BooleanOptionalAction,
        default=True,
        help="carry changed biases and LayerNorms exactly (default: yes)",
    )


def _add_budget(parser: ArgumentParser, *, required: bool) -> None:
    budget = parser.add_mutually_exclusive_group(required=required)
    budget.add_argument("--rank", type=int, help="the highest rank of a module")
    budget.add_argument(
        "--energy",
        type=float,
        help="the share of the squared singular values that each module keeps, such as 0.9",
    )


def resize(options: Namespace) -> None:
    """An adapter at a lower rank, and what that cost by module."""
    from hf_lora.adapters import arithmetic, directory, hub, values
    from hf_lora.cli.tables import print_table

    output = new_directory(options.output_dir)
    arithmetic.check_budget(options.rank, options.energy)
    files = directory.read_adapter(hub.adapter_directory(options.adapter, revision=options.revision))
    old = values.Adapter.from_files(files)
    new, cost = arithmetic.resize(old, options.rank, options.energy)
    values.write_adapter(output, new, [files])
    modules = {name: asdict(entry) for name, entry in cost.items()}
    report = {**_sizes(output, new), "old_lora_parameters": old.lora_parameters, "modules": modules}
    if options.json:
        print(json.dumps(report))
        return
    print_table(f"{options.adapter} at a lower rank", _COST, _rows(modules))
    print(f"{_sizes_in_words(report)}; before: {old.lora_parameters:,} LoRA parameters")


def add(options: Namespace) -> None:
    """The weighted sum of adapters, or with `average` their average."""
    from hf_lora.adapters import arithmetic, directory, hub, values
    from hf_lora.cli.tables import print_columns, print_table

    output = new_directory(options.output_dir)
    weights = options.weights or [1.0] * len(options.adapters)
    is_cut = (options.rank, options.energy) != (None, None)
    if is_cut:
        arithmetic.check_budget(options.rank, options.energy)
    sources = [directory.read_adapter(hub.adapter_directory(adapter)) for adapter in options.adapters]
    arithmetic.check_combinable(sources)
    new = arithmetic.combine(
        [values.Adapter.from_files(files) for files in sources], weights, average=options.average
    )
    modules: dict[str, dict[str, Any]] = {name: {"rank": entry.rank} for name, entry in new.factors.items()}
    title, names = "their sum", ["module", "rank"]
    if is_cut:
        new, cost = arithmetic.resize(new, options.rank, options.energy)
        modules = {name: asdict(entry) for name, entry in cost.items()}
        title, names = "their sum at a lower rank", list(_COST)
    values.write_adapter(output, new, sources)
    shares = arithmetic.head_shares(weights) if new.whole or options.average else []
    report = {
        **_sizes(output, new),
        "adapters": list(options.adapters),
        "weights": shares if options.average else list(weights),
        "whole_tensor_weights": shares if new.whole else [],
        "modules": modules,
    }
    if options.json:
        print(json.dumps(report))
        return
    columns = {"adapter": options.adapters, "weight of its updates": report["weights"]}
    if new.whole:
        columns["weight of its head"] = shares
    print_columns("adapters", columns)
    print_table(title, names, _rows(modules))
    if new.whole:
        print(f"head: the weighted mean of {len(sources)} heads ({len(new.whole)} whole tensors)")
    print(_sizes_in_words(report))


def extract(options: Namespace) -> None:
    """What a full fine-tuning changed as an adapter of its base model, and what of it is left out."""
    from hf_lora.adapters.directory import save_adapter
    from hf_lora.adapters.extract import extract_finetuned
    from hf_lora.cli.tables import print_table

    output = new_directory(options.output_dir)
    names = ("finetuned_revision", "projections", "rank", "energy", "keep_vectors")
    chosen = {name: getattr(options, name) for name in names}
    found = extract_finetuned(options.base, options.finetuned, revision=options.base_revision, **chosen)
    save_adapter(found.model, output, tokenizer=found.tokenizer)
    extraction = found.extraction
    report = {**_sizes(output, extraction.adapter), **_extraction_report(extraction)}
    if options.json:
        print(json.dumps(report))
        return
    columns = ("module", "rank", "kept energy", "relative error", "relative change")
    print_table(f"{options.finetuned} on {options.base}", columns, _rows(report["modules"]))
    _print_changes("carried exactly", extraction.carried)
    _print_changes("LEFT OUT: changed by the fine-tuning, and not in the adapter", extraction.left_out)
    if extraction.left_out and options.projections:
        print("without --projections the other linear layers are extracted too")
    print(f"{100 * report['kept_energy']:.1f}% of all changes outside the head are in the adapter")
    print(_sizes_in_words(report))


def _sizes(output: Path, adapter: Adapter) -> dict[str, Any]:
    from hf_lora.adapters.directory import TENSORS

    size = (output / TENSORS).stat().st_size
    return {"output_dir": str(output), "lora_parameters": adapter.lora_parameters, "bytes": size}


def _sizes_in_words(report: Mapping[str, Any]) -> str:
    return (
        f"{report['lora_parameters']:,} LoRA parameters, {report['bytes']:,} bytes in {report['output_dir']}"
    )


def _rows(modules: Mapping[str, Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    return [(name, *values.values()) for name, values in modules.items()]


def _extraction_report(extraction: Extraction) -> dict[str, Any]:
    covered = extraction.covered
    return {
        "kept_energy": extraction.kept_energy,
        "modules": {
            name: {
                "rank": entry.new_rank,
                "kept_energy": entry.kept_energy,
                "relative_error": entry.relative_error,
                "relative_change": covered[name].relative,
            }
            for name, entry in extraction.truncations.items()
        },
        "carried": {name: change.relative for name, change in extraction.carried.items()},
        "left_out": {name: change.relative for name, change in extraction.left_out.items()},
    }


def _print_changes(title: str, changes: Mapping[str, Change]) -> None:
    """Changes of tensors as a table; tensors of the same name in all blocks share a row."""
    from hf_lora.adapters.extract import Change
    from hf_lora.cli.tables import print_table

    groups: dict[str, list[Change]] = {}
    for name, change in changes.items():
        groups.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), []).append(change)
    rows = []
    for name, group in groups.items():
        moved, size = (hypot(*(getattr(change, what) for change in group)) for what in ("moved", "size"))
        rows.append((name, len(group), Change(moved, size).relative))
    if rows:
        print_table(title, ("tensor", "tensors", "relative change"), rows)
