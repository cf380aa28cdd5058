"""What the fitted temperature is worth on other texts: the test loss with it, and without it, by number of examples.

For each data set, number of training examples and seed one `hf_lora.finetune`, which holds out a fifth of them, fits
the temperature there, and retrains on all. The results file is written after every run, and the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pandas
from data_sets import BASE, QualitySet, quality_sets
from harness import machine, report, write_json
from quality_runs import add_run_arguments, chosen_sets, prepare
from scipy.special import log_softmax

import hf_lora

HEADER = ("data", "examples", "runs", "temperatures", "loss at 1", "with it", "difference")


def losses(logits: np.ndarray, answers: np.ndarray, temperature: float) -> dict[str, float]:
    """The temperature, and the mean log-loss of the test texts without and with it."""
    chosen = {"at_1": 1.0, "calibrated": temperature}
    found = {name: -log_softmax(logits / value, axis=1) for name, value in chosen.items()}
    rows = np.arange(len(answers))
    return {"temperature": temperature, **{n: float(loss[rows, answers].mean()) for n, loss in found.items()}}


def measure(data: QualitySet, examples: int, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """One run: drawn training examples, and the losses on the first texts of the test file."""
    train = pandas.read_csv(data.train_file).sample(examples, random_state=seed).reset_index(drop=True)
    test = pandas.read_csv(data.test_file).head(options.test_samples)
    with tempfile.TemporaryDirectory() as output:
        result = hf_lora.finetune(
            BASE, train=train, output_dir=output, seed=seed, max_seq_length=options.max_seq_length
        )
        classifier = result.classifier  # read from there
    answers = [classifier.info.labels.index(str(label)) for label in test["label"]]
    logits = classifier.logits(list(test["text"])).numpy().astype(np.float64)
    return losses(logits, np.array(answers), classifier.info.temperature or 1.0)


def rows(runs: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    """A row for each data set and number of examples: means over the seeds, and the paired difference."""
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for key, run in runs.items():
        name, examples, _ = key.split("/")
        groups.setdefault((name, examples), []).append(run)
    table = []
    for (name, examples), several in groups.items():
        gains = [run["calibrated"] - run["at_1"] for run in several]
        error = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
        temperatures = [run["temperature"] for run in several]
        table.append(
            (
                name,
                examples,
                str(len(several)),
                f"{min(temperatures):.2f} to {max(temperatures):.2f}",
                *(f"{mean(run[side] for run in several):.4f}" for side in ("at_1", "calibrated")),
                f"{mean(gains):+.4f} ± {error:.4f}",
            )
        )
    return table


def main(argv: list[str] | None = None) -> None:
    """Run what is missing in the results file and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_arguments(parser)
    parser.add_argument("--examples", type=int, nargs="+", default=[100, 400, 1000])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--test_samples", type=int, default=500)
    parser.add_argument("--max_seq_length", type=int, default=48)
    options = parser.parse_args(argv)
    prepare(options)
    known = Path(options.json) if options.json not in (None, "-") else None
    result: dict[str, Any] = {"machine": machine(), "runs": {}}
    if known is not None and known.is_file():
        result = json.loads(known.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as work:
        sets = quality_sets(options.data, Path(work))
        for seed in range(options.seeds):
            for name in chosen_sets(options, sets, sets):
                for examples in options.examples:
                    key = f"{name}/{examples}/{seed}"
                    if key not in result["runs"]:
                        result["runs"][key] = measure(sets[name], examples, seed, options)
                        if known is not None:
                            write_json(options.json, result)
    report(options)("calibration", HEADER, rows(result["runs"]))
    write_json(options.json, result)


if __name__ == "__main__":
    main()
