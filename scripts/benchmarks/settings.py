"""What the defaults of `hf-lora train` are worth: other settings against them, by folds of the training files.

The test files are not looked at, so that `quality.py` can measure on them what was chosen here. A fold
is one part of four as the test and the others as the training file; all settings get the same folds and seeds,
and are compared fold by fold. Every setting is compared with the same runs of the defaults: one that was lucky makes
all of them look bad, so that small differences need `--repeats`, of the defaults above all. `--few_shot` asks the
same of a few examples, `--model` of another encoder. The results file is written after every run, and the same
command goes on.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from data_sets import FOLDS, fold, quality_sets
from harness import report, write_json
from quality_runs import Run, add_run_arguments, chosen_sets, fill, hf_lora_run, prepare

# On one fold: the runs of a setting, and those of the defaults.
Pair = tuple[list[Run], list[Run]]

DEFAULTS = "defaults"
# What each setting changes, as a user would say it.
SETTINGS: dict[str, str] = {
    DEFAULTS: "",
    "rate 5e-4": "--learning_rate 5e-4",
    "rate 1e-3": "--learning_rate 1e-3",
    "rate 2e-3": "--learning_rate 2e-3",
    "rate 4e-3": "--learning_rate 4e-3",
    "rank 2": "--lora_rank 2",
    "rank 2, rate 1e-3": "--lora_rank 2 --learning_rate 1e-3",
    "rank 2, rate 4e-3": "--lora_rank 2 --learning_rate 4e-3",
    "rank 32": "--lora_rank 32",
    "rank 32, rate 1e-3": "--lora_rank 32 --learning_rate 1e-3",
    "rank 32, rate 4e-3": "--lora_rank 32 --learning_rate 4e-3",
    "2 epochs": "--num_train_epochs 2",
    "3 epochs": "--num_train_epochs 3",
    "4 epochs": "--num_train_epochs 4",
    "6 epochs": "--num_train_epochs 6",
    "batches of 16": "--per_device_train_batch_size 16",
    "batches of 16, 3 epochs": "--per_device_train_batch_size 16 --num_train_epochs 3",
    "random order": "--train_sampling_strategy random",
    "no smoothing": "--label_smoothing_factor 0",
    "smoothing 0.2": "--label_smoothing_factor 0.2",
    "LoRA dropout 0.1": "--lora_dropout 0.1",
    "no warm-up": "--warmup_steps 0",
    "cosine": "--lr_scheduler_type cosine",
    "beta2 0.98": "--adam_beta2 0.98",
    "weight decay 0.1": "--weight_decay 0.1",
    "random A": "--lora_init kaiming",
    "random A, 4 epochs": "--lora_init kaiming --num_train_epochs 4",
    "biases": "--lora_bias all",
    "head rate 5e-4": "--head_learning_rate 5e-4",
    "head rate 8e-3": "--head_learning_rate 8e-3",
    "LoRA+ 8": "--lora_plus_ratio 8",
    "all layers, rank 4": "--lora_target_modules all-linear --lora_rank 4 --lora_alpha 8",
    "head as fitted": "--head_penalty 1",
    "random head": "--head_init random",
    "three layers": "--pooling mean_layers",
    "linear probe": "--lora_rank 0",
    "linear probe, last layer": "--lora_rank 0 --pooling mean",
    "native head": "--pooling native",
    "native head, rate 1e-3": "--pooling native --learning_rate 1e-3",
    "native random head": "--pooling native --head_init random",
    "no refit": "--refit never",
    "refit": "--refit always",
    "early stopping": "--early_stopping_patience 1",
    "6 epochs, early stopping": "--num_train_epochs 6 --early_stopping_patience 1",
    "balanced": "--class_weights balanced",
}
HEADER = (
    "setting",
    "data",
    "accuracy",
    "defaults",
    "difference",
    "F1",
    "defaults",
    "loss",
    "defaults",
    "time",
    "folds",
    "runs",
)


def main() -> None:
    """Run what is missing, print the differences, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="settings: " + "; ".join(SETTINGS)
    )
    add_run_arguments(parser)
    parser.add_argument("--folds", type=int, default=FOLDS, choices=range(1, FOLDS + 1), help="the first N")
    parser.add_argument(
        "--repeats", type=int, default=1, help="runs on each fold, with other seeds (default: 1)"
    )
    parser.add_argument("--model", help="another encoder than MiniLM: a directory or a Hub id")
    parser.add_argument("--few_shot", type=int, help="only this many training examples of each label")
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, metavar="SETTING", help="default: all; see below"
    )
    options = parser.parse_args()
    prepare(options)
    if options.repeats < 1:
        raise SystemExit(f"--repeats is not usable; got {options.repeats}; expected at least 1")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    report(options)("against the defaults, fold by fold", HEADER, rows(result))
    write_json(options.json, result)


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """What the results file has already, and the runs that are missing in it."""
    sets = quality_sets(options.data, work)
    names = chosen_sets(options, sets, sets)
    settings = [DEFAULTS, *(name for name in options.settings or SETTINGS if name != DEFAULTS)]
    folds = {
        (name, number): fold(sets[name], number, work) for name in names for number in range(options.folds)
    }
    given = {"few_shot": options.few_shot, "model_name_or_path": options.model}
    common = [
        part for flag, value in given.items() if value is not None for part in (f"--{flag}", str(value))
    ]
    # Run 5 is the second one on fold 1.
    numbers = [
        repeat * FOLDS + number for repeat in range(options.repeats) for number in range(options.folds)
    ]
    orders = ((name, setting, number) for setting in settings for number in numbers for name in names)

    def run(name: str, setting: str, number: int) -> Run:
        return hf_lora_run(folds[name, number % FOLDS], number + 1, [*SETTINGS[setting].split(), *common])

    return fill(options, orders, run)


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """For each setting its data sets, and below them all of them together.

    The difference of accuracy is in points, with the standard error of its mean over the folds. The runs of one
    fold count as their mean; how many runs there were is said last, of the setting and of the defaults.
    """
    by_setting: dict[str, dict[str, list[Pair]]] = {}
    for name, settings in result["runs"].items():
        known = _by_fold(settings.get(DEFAULTS, {}))
        for setting, runs in settings.items():
            pairs = [(found, known[number]) for number, found in _by_fold(runs).items() if number in known]
            if setting != DEFAULTS and pairs:
                by_setting.setdefault(setting, {})[name] = pairs
    found = []
    for setting, sets in by_setting.items():
        found += [_row(setting, name, pairs) for name, pairs in sets.items()]
        if len(sets) > 1:
            found.append(_row(setting, "all", [pair for pairs in sets.values() for pair in pairs]))
    return found


def _by_fold(runs: dict[str, Run]) -> dict[int, list[Run]]:
    found: dict[int, list[Run]] = {}
    for number, run in runs.items():
        found.setdefault(int(number) % FOLDS, []).append(run)
    return found


def _row(setting: str, name: str, pairs: list[Pair]) -> tuple[str, ...]:
    def by_fold(what: str) -> list[tuple[float, float]]:
        return [(mean(run[what] for run in runs), mean(run[what] for run in known)) for runs, known in pairs]

    def means(what: str) -> list[str]:
        return [f"{mean(values):.4f}" for values in zip(*by_fold(what), strict=True)]

    differences = [100 * (value - known) for value, known in by_fold("accuracy")]
    error = f" ± {stdev(differences) / len(differences) ** 0.5:.2f}" if len(differences) > 1 else ""
    return (
        setting,
        name,
        *means("accuracy"),
        f"{mean(differences):+.2f}{error}",
        *means("f1"),
        *means("loss"),
        f"{mean(value / known for value, known in by_fold('seconds')):.2f}",
        str(len(pairs)),
        ", ".join(str(sum(map(len, side))) for side in zip(*pairs, strict=True)),
    )


if __name__ == "__main__":
    main()
