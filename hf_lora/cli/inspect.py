"""`hf-lora info`, `targets`, `inspect` and `report`: what an adapter is, learned, and gets wrong."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lora._text import json_line
from hf_lora.cli.shared import ADAPTER, CLASSIFIER, LABELLED, SPEED, add_command, evaluated

if TYPE_CHECKING:
    from hf_lora.adapters.directory import AdapterFiles
    from hf_lora.insight.inspect import Comparison, Update

# The ranks whose energy the table shows; JSON has all of them.
_ENERGY_RANKS = (1, 2, 4, 8, 16, 32)
# Names of columns, and the places in the JSON that they show.
_NORMS = {
    "rank": "rank",
    "norm": "norm",
    "effective rank": "effective_rank",
    "stable rank": "stable_rank",
    "norm / W": "relative_norm",
    "amplification": "factor",
}
_AMPLIFICATION = {
    "directions": "directions",
    "norm of ΔW": "update",
    "norm of W": "weight",
    "W in those of ΔW": "in_update",
    "W in its own": "in_weight",
    "W in random ones": "in_random",
}
_SUMMARY = {
    "updates": "count",
    "norm": "norm",
    "mean effective rank": "effective_rank",
    "mean norm / W": "relative",
    "mean amplification": "factor",
}
_SIMILARITY = {"φ(1,1)": "first", "φ(r,r)": "all", "random": "all_random"}


def register(commands: Any) -> None:
    """Add the commands."""
    add_command(commands, info, "tell what an adapter is", *ADAPTER, "json")

    parser = add_command(commands, targets, "tell which modules q, k, v and o mean in a model", "json")
    parser.add_argument("--model_name_or_path", required=True, help="Hub id or directory")
    parser.add_argument("--model_revision", help="branch, tag or commit of the model")
    parser.add_argument("--lora_rank", type=int, default=8, help="rank to count parameters for (default: 8)")
    parser.add_argument("--lora_projections", default="qkvo", help="letters of qkvo (default: qkvo)")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run code from the model's repository"
    )

    words = "tell what each update of an adapter does to its weight"
    parser = add_command(commands, inspect, words, *CLASSIFIER, "json")
    parser.add_argument(
        "--directions", type=int, help="leading directions to measure amplification in (default: all)"
    )
    parser.add_argument("--other", help="a second adapter, to compare subspaces with: directory or Hub id")
    parser.add_argument("--other_revision", help="branch, tag or commit of the second adapter on the Hub")
    parser.add_argument(
        "--directions_of",
        choices=("factors", "update"),
        default="factors",
        help="compare the directions of A and of B, as in the LoRA paper, or of their product "
        "(default: factors)",
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw heat maps; needs matplotlib")

    words = "write one page about an adapter, as HTML"
    parser = add_command(commands, report, words, *CLASSIFIER, *LABELLED, *SPEED)
    parser.add_argument("--output", required=True, metavar="FILE.html", help="the page to write")
    parser.add_argument(
        "--mistakes", type=int, default=12, help="how many of the worst mistakes to show (default: 12)"
    )


def info(options: Namespace) -> None:
    """What an adapter is, from its files alone: the base model is not loaded."""
    from hf_lora.cli.tables import print_facts, print_table
    from hf_lora.insight.report import describe

    facts = describe(_read(options.adapter, options.revision))
    if options.json:
        print(json_line(facts))
        return
    norms, metrics = facts.pop("delta_norms"), facts.pop("metrics")
    print_facts("adapter", facts)
    measured = [(name, value) for name, value in metrics.items() if isinstance(value, int | float)]
    if measured:
        print_table("measured in training", ("metric", "value"), measured)
    print_table("norms of the updates", ("module", "Frobenius norm of scaling * B A"), norms.items())


def _read(adapter: str, revision: str | None) -> AdapterFiles:
    from hf_lora.adapters.directory import read_adapter
    from hf_lora.adapters.hub import adapter_directory

    return read_adapter(adapter_directory(adapter, revision=revision))


def targets(options: Namespace) -> None:
    """The modules that each role means in a model, and what adapting them costs; no weights are loaded."""
    from hf_lora.cli.tables import print_table
    from hf_lora.lora.architectures import ROLE_NAMES
    from hf_lora.lora.config import LoRAConfig
    from hf_lora.lora.inject import inject_lora, injection, trainable_parameter_count
    from hf_lora.models.loading import meta_classifier

    name = options.model_name_or_path
    model = meta_classifier(
        name, revision=options.model_revision, trust_remote_code=options.trust_remote_code
    )
    inject_lora(model, LoRAConfig(rank=options.lora_rank, projections=options.lora_projections))
    count = trainable_parameter_count(model)
    roles: dict[str, list[str]] = {role: [] for role in options.lora_projections}
    for target in injection(model).targets:
        for role in str(target.role):
            roles[role].append(target.name)
    found = {
        "model_type": model.config.model_type,
        "roles": roles,
        "head": list(injection(model).head),
        "rank": options.lora_rank,
        "lora_parameters": count.lora,
        "total_parameters": count.total,
        "share": count.lora / (count.total - count.lora),
    }
    if options.json:
        print(json.dumps(found))
        return
    rows = [(f"{role} ({ROLE_NAMES[role]})", len(names), "\n".join(names)) for role, names in roles.items()]
    print_table(f"{name}: {found['model_type']}", ("role", "modules", "names"), rows)
    print(f"head: {', '.join(found['head'])}")
    share = f"{100 * found['share']:.2f}% of the model"
    print(f"LoRA at rank {options.lora_rank}: {count.lora:,} parameters ({share})")


def inspect(options: Namespace) -> None:
    """What each update does: norm, ranks, energy, amplification; beside another adapter, shared subspaces."""
    from hf_lora.insight.inspect import compare, layer_names, summarize, updates_of
    from hf_lora.insight.page import can_draw

    if options.directions is not None and options.directions < 1:
        raise ValueError(
            f"directions is not usable; got {options.directions}; expected at least 1, such as 4"
        )
    if options.plot is not None and not can_draw():
        raise ValueError(
            "--plot needs matplotlib, which is not installed; try `pip install 'hf-lora[plots]'`"
        )
    updates, config, notes = _updates(options)
    found: dict[str, Any] = {
        "adapter": str(options.adapter),
        "modules": list(map(_as_json, updates)),
        "by_role": summarize(updates, [update.role_name for update in updates]),
        "by_layer": summarize(updates, layer_names(updates)),
    }
    compared: list[Comparison] = []
    if options.other is not None:
        others, other_notes = updates_of(_read(options.other, options.other_revision), config)
        compared = compare(updates, others, options.directions_of)
        notes += [f"of the other adapter: {note}" for note in other_notes]
        if len(compared) < max(len(updates), len(others)):
            notes.append(
                f"only updates that both adapters have are compared: {len(compared)} of {len(updates)} "
                f"here and {len(others)} in the other"
            )
        found |= {"other": str(options.other), "directions_of": options.directions_of}
        found["similarity"] = [
            {"module": entry.update.module, "role": entry.update.role, **entry.sides} for entry in compared
        ]
    found["notes"] = notes
    if options.json:
        print(json_line(found))
    else:
        _print_inspection(found, updates, [entry.update for entry in compared])
    if options.plot is not None:
        from hf_lora.insight.plots import plot_inspection

        beside = "" if options.other is None else f" beside {Path(options.other).name}"
        plot_inspection(f"{Path(options.adapter).name}{beside}", updates, compared, Path(options.plot))


def _updates(options: Namespace) -> tuple[list[Update], Any, list[str]]:
    """The updates, the base's configuration, and notes; without a base model no amplification and no configuration."""
    from hf_lora.insight.inspect import amplify, updates_of
    from hf_lora.serving.loading import load_trained

    files = _read(options.adapter, options.revision)
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
        return updates, None, notes
    updates, notes = updates_of(files, model.config)
    amplify(updates, model, options.directions)
    return updates, model.config, notes


def _as_json(update: Update) -> dict[str, Any]:
    spectrum, found = update.spectrum, update.amplification
    return {
        "module": update.module,
        "layer": update.layer,
        "role": update.role,
        "shape": [len(update.B), update.A.shape[1]],
        "rank": len(update.A),
        "norm": spectrum.norm,
        "effective_rank": spectrum.effective_rank,
        "stable_rank": spectrum.stable_rank,
        "singular_values": spectrum.values,
        "energy": [spectrum.energy(rank) for rank in range(1, 1 + len(update.A))],
        "amplification": found and {**asdict(found), "factor": found.factor, "relative_norm": found.relative},
    }


def _print_inspection(found: dict[str, Any], updates: list[Update], compared: list[Update]) -> None:
    """Print what the JSON has as tables. compared: the updates of the similarities."""
    from hf_lora._text import printable
    from hf_lora.cli.tables import print_columns
    from hf_lora.insight.inspect import layer_names

    def places(updates: list[Update]) -> dict[str, list[Any]]:
        return {"layer": layer_names(updates), "role": [update.role_name for update in updates]}

    def values(entries: list[dict[str, Any]], columns: dict[str, str]) -> dict[str, list[Any]]:
        return {name: [entry.get(key) for entry in entries] for name, key in columns.items()}

    modules = [{**module, **(module["amplification"] or {})} for module in found["modules"]]
    print_columns(f"{found['adapter']}: updates", places(updates) | values(modules, _NORMS))
    if any(module["amplification"] for module in modules):
        title = "amplification: norms of U' W V in the leading directions"
        print_columns(title, places(updates) | values(modules, _AMPLIFICATION))
    spectra = [update.spectrum for update in updates]
    shown = [rank for rank in _ENERGY_RANKS if rank < max((len(update.A) for update in updates), default=0)]
    energy = {str(rank): [spectrum.energy(rank) for spectrum in spectra] for rank in shown}
    needed = {f"rank for {share:.0%}": [entry.rank_for(share) for entry in spectra] for share in (0.9, 0.99)}
    print_columns("energy kept at rank", places(updates) | energy | needed)
    for what in ("role", "layer"):
        print_columns(f"by {what}", values(found[f"by_{what}"], {what: "name", **_SUMMARY}))
    if compared:
        phi: dict[str, list[Any]] = {}
        for side in "AB":
            sides = [entry[side] for entry in found["similarity"]]
            phi |= values(sides, {f"{side} {name}": key for name, key in _SIMILARITY.items()})
        of = "A and B" if found["directions_of"] == "factors" else "ΔW"
        title = f"subspaces shared with {found['other']}: φ of the directions of {of}"
        print_columns(title, places(compared) | phi)
    for note in found["notes"]:
        print(printable(f"note: {note}"))


def report(options: Namespace) -> None:
    """One page about an adapter, from its own files and, where labelled data are given, from measurements."""
    from hf_lora._files import write_text
    from hf_lora.insight.page import NO_CHARTS, can_draw, render
    from hf_lora.insight.report import collect

    output = Path(options.output)
    if output.suffix != ".html":
        raise ValueError(f"output is not usable; got {options.output!r}; expected FILE.html")
    if options.mistakes < 0:
        raise ValueError(f"mistakes is not usable; got {options.mistakes}; expected 0 or more")
    files = _read(options.adapter, options.revision)
    known: dict[str, Any] = {}
    if source := options.test_file or options.dataset_name:
        options.adapter = files.directory
        classifier, data, results = evaluated(options, mistakes=options.mistakes)
        truncated = data.report.truncated["test"]
        cut = f", {truncated:,} of them cut to the longest input" if truncated else ""
        known = {"model": classifier.model, "evaluation": results, "setting": classifier.setting}
        known["measured_on"] = f"{Path(source).name}{cut}"
    write_text(output, render(collect(files, **known)))
    print(f"wrote {output}")
    if not can_draw():
        print(f"without {NO_CHARTS}")
