"""What `hf-lora inspect` and `report` do. One function each, taking the parsed options."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_lora._files import write_text
from hf_lora._text import printable
from hf_lora.adapters.directory import AdapterFiles, read_adapter
from hf_lora.adapters.hub import adapter_directory
from hf_lora.cli.labelled import classifier_of, labelled_data, logits_beside, references_of, texts_of
from hf_lora.cli.tables import print_table
from hf_lora.insight.inspect import (
    Comparison,
    Summary,
    Update,
    amplifications,
    base_weights,
    compare,
    grid_of,
    layer_name,
    several_stacks,
    summarize,
    updates_of,
)
from hf_lora.insight.judgement import judge
from hf_lora.insight.pages import TEMPLATES, render
from hf_lora.insight.report import Measured, Report, collect
from hf_lora.insight.spectra import Amplification
from hf_lora.lora.inject import trainable_parameter_count
from hf_lora.serving.classifier import load_trained

# The ranks whose energy the table shows; JSON has all of them.
_ENERGY_RANKS = (1, 2, 4, 8, 16, 32)


@dataclass
class _Inspected:
    """What was found out; `amplified` has an entry for each update, None where the base is not known."""

    updates: list[Update]
    amplified: list[Amplification | None]
    notes: list[str]
    config: Any = None
    compared: list[Comparison] = field(default_factory=list)


def inspect(options: argparse.Namespace) -> int:
    """What each update does: norm, ranks, energy, amplification; beside another adapter, shared subspaces."""
    if options.directions is not None and options.directions < 1:
        raise ValueError(
            f"directions is not usable; got {options.directions}; expected at least 1, such as 4"
        )
    if options.plot is not None:
        _check_matplotlib()
    files = read_adapter(adapter_directory(options.adapter, revision=options.revision))
    found = _inspected(files, options)
    if options.other is not None:
        other = read_adapter(adapter_directory(options.other, revision=options.other_revision))
        others, notes = updates_of(other, found.config)
        found.compared = compare(found.updates, others, options.directions_of)
        found.notes += [f"of the other adapter: {note}" for note in notes]
        if len(found.compared) < max(len(found.updates), len(others)):
            found.notes.append(
                f"only updates that both adapters have are compared: {len(found.compared)} of {len(found.updates)} "
                f"here and {len(others)} in the other"
            )
    if options.json:
        print(json.dumps(_as_json(options, found), ensure_ascii=False))
    else:
        _print_inspection(options, found)
    if options.plot is not None:
        _plot(options, found)
    return 0


def report(options: argparse.Namespace) -> int:
    """One page about an adapter, from its own files and, where a labelled file is given, from measurements."""
    output = Path(options.output)
    if output.suffix not in TEMPLATES:
        raise ValueError(
            f"output is not usable; got {options.output!r}; expected FILE{' or FILE'.join(TEMPLATES)}"
        )
    if options.mistakes < 0:
        raise ValueError(f"mistakes is not usable; got {options.mistakes}; expected 0 or more")
    given = options.test_file or options.dataset_name
    options.adapter = adapter_directory(options.adapter, revision=options.revision)
    files = read_adapter(options.adapter)
    collected = _measured_report(files, options, str(given)) if given else collect(files)
    write_text(output, render(collected, output.suffix))
    print(f"wrote {output}")
    return 0


def _measured_report(files: AdapterFiles, options: argparse.Namespace, source: str) -> Report:
    """The report of an adapter on labelled data, read and computed as `hf-lora evaluate` does."""
    classifier = classifier_of(options, precision=options.precision)
    data = labelled_data(options, classifier)
    texts = texts_of(data)
    enabled, disabled = logits_beside(classifier, texts, options.batch_size)
    judgement = judge(
        classifier.info,
        [text if isinstance(text, str) else " / ".join(text) for text in texts],
        references_of(data),
        enabled,
        disabled,
        mistakes=options.mistakes,
    )
    count = trainable_parameter_count(classifier.model)
    return collect(
        files,
        measured=Measured(
            judgement,
            data.problem_type,
            data.labels,
            source=Path(source).name,
            setting=classifier.setting,
            truncated=data.report.truncated["test"],
        ),
        count=(count.trainable, count.total),
        weights=base_weights(classifier.model),
        config=classifier.model.config,
    )


def _inspected(files: AdapterFiles, options: argparse.Namespace) -> _Inspected:
    """The updates, and their amplification where the base model can be had; what is missing is in the notes."""
    try:
        model, _, _ = load_trained(files.directory, base=options.base, check_base=not options.skip_base_check)
    except (ValueError, OSError) as error:
        if options.base is not None:
            raise
        updates, notes = updates_of(files)
        reason = " ".join(str(error).split())
        notes.append(
            f"amplification and norms relative to W are left out, since they need the base model: {reason}"
        )
        return _Inspected(updates, [None] * len(updates), notes)
    updates, notes = updates_of(files, model.config)
    return _Inspected(
        updates, amplifications(updates, base_weights(model), options.directions), notes, model.config
    )


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            "--plot needs matplotlib, which is not installed; try `pip install 'hf-lora[plots]'`"
        ) from None


def _plot(options: argparse.Namespace, found: _Inspected) -> None:
    # Pictures are the only part that needs matplotlib.
    from hf_lora.insight.plots import Panel, plot_inspection

    panels = [
        Panel("norm of ΔW", [update.spectrum.norm for update in found.updates]),
        Panel("effective rank of ΔW", [update.spectrum.effective_rank for update in found.updates]),
    ]
    if any(found.amplified):
        percents = [100 * entry.relative if entry and entry.relative else None for entry in found.amplified]
        panels.insert(1, Panel("norm of ΔW, in % of that of W", percents))
        panels.append(
            Panel("amplification factor", [entry.factor if entry else None for entry in found.amplified])
        )
    title = Path(options.adapter).name
    if options.other is not None:
        title += f" beside {Path(options.other).name}"
    plot_inspection(title, grid_of(found.updates), panels, found.compared, Path(options.plot))


def _print_inspection(options: argparse.Namespace, found: _Inspected) -> None:
    updates, amplified = found.updates, found.amplified
    several = several_stacks(updates)
    places = [(layer_name(update, several), update.role_name) for update in updates]
    known = any(amplified)
    rows = [
        (
            *place,
            update.rank,
            update.spectrum.norm,
            update.spectrum.effective_rank,
            update.spectrum.stable_rank,
        )
        + ((entry and entry.relative, entry and entry.factor) if known else ())
        for place, update, entry in zip(places, updates, amplified, strict=True)
    ]
    columns = ("layer", "role", "rank", "norm", "effective rank", "stable rank")
    print_table(
        f"{options.adapter}: updates", columns + (("norm / W", "amplification") if known else ()), rows
    )
    if known:
        _print_amplification(places, amplified)
    ranks = [rank for rank in _ENERGY_RANKS if rank < max(update.rank for update in updates)]
    print_table(
        "energy kept at rank",
        ("layer", "role", *map(str, ranks), "rank for 90%", "rank for 99%"),
        [
            (*place, *map(update.spectrum.energy, ranks), *map(update.spectrum.rank_for, (0.9, 0.99)))
            for place, update in zip(places, updates, strict=True)
        ],
    )
    _print_summary("role", summarize(updates, amplified, lambda update: update.role_name))
    _print_summary("layer", summarize(updates, amplified, lambda update: layer_name(update, several)))
    if found.compared:
        _print_comparison(options, found.compared, several)
    for note in found.notes:
        print(printable(f"note: {note}"))


def _print_amplification(
    places: Iterable[tuple[str, str]], amplified: Iterable[Amplification | None]
) -> None:
    rows = [
        (
            *place,
            entry.directions,
            entry.update,
            entry.weight,
            entry.in_update,
            entry.in_weight,
            entry.in_random,
        )
        for place, entry in zip(places, amplified, strict=True)
        if entry is not None
    ]
    columns = (
        "directions",
        "norm of ΔW",
        "norm of W",
        "W in those of ΔW",
        "W in its own",
        "W in random ones",
    )
    print_table("amplification: norms of U' W V in the leading directions", ("layer", "role", *columns), rows)


def _print_summary(what: str, summaries: Sequence[Summary]) -> None:
    known = any(entry.factor is not None for entry in summaries)
    rows = [
        (entry.name, entry.count, entry.norm, entry.effective_rank)
        + ((entry.relative, entry.factor) if known else ())
        for entry in summaries
    ]
    columns = (what, "updates", "norm", "mean effective rank")
    print_table(f"by {what}", columns + (("mean norm / W", "mean amplification") if known else ()), rows)


def _print_comparison(options: argparse.Namespace, compared: Sequence[Comparison], several: bool) -> None:
    rows = [
        (
            layer_name(entry.update, several),
            entry.update.role_name,
            *(value for side in entry.sides.values() for value in list(side.values())[:3]),
        )
        for entry in compared
    ]
    columns = [f"{side} {what}" for side in "AB" for what in ("φ(1,1)", "φ(r,r)", "random")]
    of = "A and B" if options.directions_of == "factors" else "ΔW"
    print_table(
        f"subspaces shared with {options.other}: φ of the directions of {of}",
        ("layer", "role", *columns),
        rows,
    )


def _as_json(options: argparse.Namespace, found: _Inspected) -> dict[str, Any]:
    several = several_stacks(found.updates)
    modules = [
        {
            "module": update.module,
            "layer": update.layer,
            "role": update.role,
            "shape": [len(update.B), update.A.shape[1]],
            "rank": update.rank,
            "norm": update.spectrum.norm,
            "effective_rank": update.spectrum.effective_rank,
            "stable_rank": update.spectrum.stable_rank,
            "singular_values": list(update.spectrum.values),
            "energy": [update.spectrum.energy(rank) for rank in range(1, 1 + update.rank)],
            "amplification": entry
            and {**asdict(entry), "factor": entry.factor, "relative_norm": entry.relative},
        }
        for update, entry in zip(found.updates, found.amplified, strict=True)
    ]
    summaries = {
        "by_role": summarize(found.updates, found.amplified, lambda update: update.role_name),
        "by_layer": summarize(found.updates, found.amplified, lambda update: layer_name(update, several)),
    }
    report: dict[str, Any] = {"adapter": str(options.adapter), "modules": modules}
    report |= {name: [asdict(entry) for entry in entries] for name, entries in summaries.items()}
    if options.other is not None:
        report["other"] = str(options.other)
        report["directions_of"] = options.directions_of
        report["similarity"] = [
            {"module": entry.update.module, "role": entry.update.role, **entry.sides}
            for entry in found.compared
        ]
    return {**report, "notes": found.notes}
