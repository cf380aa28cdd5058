"""What `hf-lora resize`, `add` and `extract` do. One function each, taking the parsed options."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from math import hypot
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from hf_lora.adapters.arithmetic import Truncation, check_budget, check_combinable, combine, head_shares
from hf_lora.adapters.arithmetic import resize as resized
from hf_lora.adapters.directory import CONFIG, TENSORS, AdapterFiles, read_adapter, save_adapter
from hf_lora.adapters.extract import Change, Extraction, extract_adapter, inject_extraction, linear_modules
from hf_lora.adapters.hub import ADAPTER_FILES, adapter_directory
from hf_lora.adapters.info import FILE, AdapterInfo, BaseModel
from hf_lora.adapters.values import Adapter, contents, write_adapter
from hf_lora.cli.tables import print_table
from hf_lora.lora.head import find_head, fresh_modules
from hf_lora.models.bundled import resolve_base
from hf_lora.models.loading import load_base, load_tokenizer
from hf_lora.tasks import task_of

# Written anew, or true only of the adapter that was read: its card has its metrics.
_OWN_FILES = (CONFIG, TENSORS, FILE, "README.md")
_COST = ("module", "old rank", "new rank", "kept energy", "relative error")


def resize(options: argparse.Namespace) -> int:
    """An adapter at a lower rank, and what that cost by module."""
    output = _new_directory(options.output_dir)
    check_budget(options.rank, options.energy)
    files = read_adapter(adapter_directory(options.adapter, revision=options.revision))
    old = Adapter.from_files(files)
    new, cost = resized(old, options.rank, options.energy)
    _write(output, new, [files])
    report = {**_sizes(output, new), "old_lora_parameters": old.lora_parameters}
    if options.json:
        print(json.dumps({**report, "modules": {name: asdict(entry) for name, entry in cost.items()}}))
        return 0
    print_table(f"{options.adapter} at a lower rank", _COST, _cost_rows(cost))
    print(
        f"{new.lora_parameters:,} LoRA parameters after {old.lora_parameters:,}; "
        f"{report['bytes']:,} bytes in {output}"
    )
    return 0


def add(options: argparse.Namespace) -> int:
    """The weighted sum of adapters, or with `average` their average."""
    output = _new_directory(options.output_dir)
    weights = options.weights or [1.0] * len(options.adapters)
    if len(weights) != len(options.adapters):
        raise ValueError(
            f"expected one weight for each adapter; got {len(weights)} for {len(options.adapters)}"
        )
    if (options.rank, options.energy) != (None, None):
        check_budget(options.rank, options.energy)
    sources = [read_adapter(adapter_directory(adapter)) for adapter in options.adapters]
    check_combinable(sources)
    new = combine([Adapter.from_files(files) for files in sources], weights, average=options.average)
    cost: Mapping[str, Truncation] = {}
    if (options.rank, options.energy) != (None, None):
        new, cost = resized(new, options.rank, options.energy)
    _write(output, new, sources)
    shares = head_shares(weights) if new.whole or options.average else []
    report = {
        **_sizes(output, new),
        "adapters": list(options.adapters),
        "weights": shares if options.average else list(weights),
        "whole_tensor_weights": shares if new.whole else [],
    }
    if options.json:
        modules = {name: {"rank": entry.rank} for name, entry in new.factors.items()}
        costs = {name: asdict(entry) for name, entry in cost.items()}
        print(json.dumps({**report, "modules": costs or modules}))
        return 0
    columns = [options.adapters, report["weights"], *([shares] if new.whole else [])]
    names = ("adapter", "weight of its updates", "weight of its head")[: len(columns)]
    print_table("adapters", names, list(zip(*columns, strict=True)))
    if cost:
        print_table("their sum at a lower rank", _COST, _cost_rows(cost))
    else:
        print_table("their sum", ("module", "rank"), [(name, f.rank) for name, f in new.factors.items()])
    if new.whole:
        print(f"head: the weighted mean of {len(sources)} heads ({len(new.whole)} whole tensors)")
    print(f"{new.lora_parameters:,} LoRA parameters; {report['bytes']:,} bytes in {output}")
    return 0


def extract(options: argparse.Namespace) -> int:
    """What a full fine-tuning changed as an adapter of its base model, and what of it is left out."""
    output = _new_directory(options.output_dir)
    check_budget(options.rank, options.energy)
    tuned, labels, problem_type = _finetuned(options)
    base, missing = load_base(options.base, labels, problem_type=problem_type, revision=options.base_revision)
    if base.config.model_type != tuned.config.model_type:
        raise ValueError(
            f"the fine-tuned model is not one of this base; got a {tuned.config.model_type} in "
            f"{options.finetuned!r}; expected a {base.config.model_type} as {options.base!r}"
        )
    head = (*find_head(base), *fresh_modules(base, missing))
    extraction = extract_adapter(
        dict(base.named_parameters()),
        dict(tuned.named_parameters()),
        modules=linear_modules(base, projections=options.projections, head=head),
        rank=options.rank,
        energy=options.energy,
        head=head,
        keep_vectors=options.keep_vectors,
    )
    _save_extraction(base, extraction, AdapterInfo(tuple(labels), problem_type), options, output)
    report = {**_sizes(output, extraction.adapter), **_extraction_report(extraction)}
    if options.json:
        print(json.dumps(report))
        return 0
    rows = [(name, *values.values()) for name, values in report["modules"].items()]
    print_table(
        f"{options.finetuned} on {options.base}",
        ("module", "rank", "kept energy", "relative error", "relative change"),
        rows,
    )
    _print_changes("carried exactly", extraction.carried)
    if extraction.left_out:
        _print_changes("LEFT OUT: changed by the fine-tuning, and not in the adapter", extraction.left_out)
        if options.projections:
            print("without --projections the other linear layers are extracted too")
    print(
        f"{100 * report['kept_energy']:.1f}% of all that changed outside the head is in the adapter; "
        f"{extraction.adapter.lora_parameters:,} LoRA parameters; {report['bytes']:,} bytes in {output}"
    )
    return 0


def _new_directory(path: str) -> Path:
    output = Path(path)
    if output.exists():
        raise ValueError(f"output_dir exists; got {str(output)!r}; expected a new directory")
    return output


def _write(output: Path, new: Adapter, sources: Sequence[AdapterFiles]) -> None:
    patterns = [pattern for pattern in ADAPTER_FILES if pattern not in _OWN_FILES]
    folder = sources[0].directory
    copies = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    write_adapter(output, contents(new, sources), copies=sorted(copies))


def _sizes(output: Path, adapter: Adapter) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "lora_parameters": adapter.lora_parameters,
        "bytes": (output / TENSORS).stat().st_size,
    }


def _cost_rows(cost: Mapping[str, Truncation]) -> Iterable[tuple[Any, ...]]:
    return [(name, *asdict(entry).values()) for name, entry in cost.items()]


def _finetuned(options: argparse.Namespace) -> tuple[PreTrainedModel, list[str], str]:
    """The fine-tuned classifier, its labels in order, and its problem type."""
    revision = options.finetuned_revision
    config = AutoConfig.from_pretrained(resolve_base(options.finetuned, revision=revision), revision=revision)
    labels = [str(config.id2label[index]) for index in sorted(config.id2label)]
    problem_type = task_of(config.problem_type, len(labels)).name
    model, missing = load_base(options.finetuned, labels, problem_type=problem_type, revision=revision)
    if missing:
        raise ValueError(
            f"{options.finetuned!r} is no fine-tuned classifier; it has no weights for {sorted(missing)[0]!r}; "
            "expected a checkpoint with its classification head"
        )
    return model, labels, problem_type


def _save_extraction(
    base: PreTrainedModel,
    extraction: Extraction,
    info: AdapterInfo,
    options: argparse.Namespace,
    output: Path,
) -> None:
    revision = options.base_revision or getattr(base.config, "_commit_hash", None)
    info = replace(info, base_model=BaseModel(options.base, revision), projections=options.projections)
    inject_extraction(base, extraction, info)
    # The fine-tuned checkpoint may have no tokenizer of its own; then it was trained with the base's.
    source, at = options.base, options.base_revision
    if (Path(options.finetuned) / "tokenizer_config.json").is_file():
        source, at = options.finetuned, None
    save_adapter(base, output, tokenizer=load_tokenizer(source, revision=at))


def _extraction_report(extraction: Extraction) -> dict[str, Any]:
    kept = sum(
        extraction.covered[name].moved ** 2 * entry.kept_energy
        for name, entry in extraction.truncations.items()
    )
    kept += sum(change.moved**2 for change in extraction.carried.values())
    groups = (extraction.covered, extraction.carried, extraction.left_out)
    total = sum(change.moved**2 for group in groups for change in group.values())
    return {
        "kept_energy": kept / total if total else 1.0,
        "modules": {
            name: {
                "rank": entry.new_rank,
                "kept_energy": entry.kept_energy,
                "relative_error": entry.relative_error,
                "relative_change": extraction.covered[name].relative,
            }
            for name, entry in extraction.truncations.items()
        },
        "carried": {name: change.relative for name, change in extraction.carried.items()},
        "left_out": {name: change.relative for name, change in extraction.left_out.items()},
    }


def _print_changes(title: str, changes: Mapping[str, Change]) -> None:
    """Changes of tensors as a table, those of all blocks in one row."""
    groups: dict[str, list[Change]] = {}
    for name, change in changes.items():
        groups.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), []).append(change)
    rows = []
    for name, group in groups.items():
        together = Change(hypot(*(c.moved for c in group)), hypot(*(c.size for c in group)))
        rows.append((name, len(group), together.relative))
    if rows:
        print_table(title, ("tensor", "tensors", "relative change"), rows)
