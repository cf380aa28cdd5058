"""The MNIST demonstration of LoRA: train a small network on all digits, then adapt it to a few of them.

Two networks of the usual write-ups, on the same injector as everything else. After one epoch LoRA goes into
every linear layer, the rest is frozen, and only the chosen digits are shown. Errors are counted before,
after, and with LoRA disabled, which must give back the original counts.

    python scripts/mnist_mlp.py --network rich --form parametrization --output rich.json --plot rich.png
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mnist_data import Images, load_mnist
from torch import Tensor, nn
from tqdm import tqdm

from hf_lora import (
    LoRAConfig,
    inject_lora,
    lora_disabled,
    lora_layers,
    lora_parameters,
    merge_lora,
    trainable_parameter_count,
    unmerge_lora,
)
from hf_lora._files import write_text
from hf_lora.cli.tables import print_table
from hf_lora.lora.config import BIAS_MODES, FORMS
from hf_lora.lora.inject import base_parameters

BATCH_SIZE = 10
LEARNING_RATE = 1e-3


def digits_network() -> nn.Module:
    """784-256-128-10, three linear layers and one ReLU after the last; 235,146 parameters."""
    return nn.Sequential(nn.Linear(784, 256), nn.Linear(256, 128), nn.Linear(128, 10), nn.ReLU())


def rich_network() -> nn.Module:
    """784-1000-2000-10 with ReLU between layers; 2,807,010 parameters."""
    return nn.Sequential(
        nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 2000), nn.ReLU(), nn.Linear(2000, 10)
    )


@dataclass(frozen=True)
class Experiment:
    """A network, how its images are normalized, what it is adapted to, and what the write-up published."""

    network: Any
    mean: float
    std: float
    rank: int
    chosen: tuple[int, ...]
    batches: int
    published: str
    published_wrong: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Errors before and after, by digit, where the write-up gives them."""


EXPERIMENTS = {
    "digits": Experiment(
        digits_network, 0.1301, 0.3081, 2, (2, 3, 5, 8, 9), 200, "accuracy 0.891 before, 0.683 / 0.780 after"
    ),
    "rich": Experiment(
        rich_network, 0.1307, 0.3081, 1, (9,), 100, "accuracy 0.951 before, 0.905 after", {9: (116, 6)}
    ),
}


def train(model: nn.Module, data: Images, *, batches: int | None, what: str, seed: int) -> None:
    """One epoch, or its first `batches` batches, of Adam on whatever requires a gradient."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))
    starts = range(0, len(order), BATCH_SIZE)[:batches]
    for start in tqdm(starts, desc=what, unit=" batches", file=sys.stderr):
        rows = order[start : start + BATCH_SIZE]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.images[rows]), data.labels[rows]).backward()
        optimizer.step()


@torch.no_grad()
def wrong_by_digit(model: nn.Module, data: Images) -> list[int]:
    """How many images of each digit are classified wrongly, ten integers."""
    wrong = model(data.images).argmax(-1) != data.labels
    return torch.bincount(data.labels[wrong], minlength=10).tolist()


def pretrain(name: str, data: Images, seed: int) -> nn.Module:
    """The network of an experiment after one epoch on all digits."""
    torch.manual_seed(seed)
    model = EXPERIMENTS[name].network()
    train(model, data, batches=None, what="all digits", seed=seed)
    return model


def adapt(
    name: str, model: nn.Module, training: Images, test: Images, *, config: LoRAConfig, source: str, seed: int
) -> dict[str, Any]:
    """Inject, fine-tune on the chosen digits, count; returns what is written as JSON. Changes `model`.

    Raises RuntimeError, naming it, if a statement about LoRA that must hold does not.
    """
    experiment = EXPERIMENTS[name]
    original = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before = wrong_by_digit(model, test)
    torch.manual_seed(seed)
    inject_lora(model, config)
    count = trainable_parameter_count(model)
    identical = _enabled_equals_disabled(model, test)
    chosen = training.only(experiment.chosen)
    what = f"rank {config.rank}, digits {', '.join(map(str, experiment.chosen))}"
    train(model, chosen, batches=experiment.batches, what=what, seed=seed)
    after = wrong_by_digit(model, test)
    with lora_disabled(model):
        disabled = wrong_by_digit(model, test)
    frozen = base_parameters(model)
    tested = torch.bincount(test.labels, minlength=10).tolist()
    result = {
        "network": name,
        "form": config.form,
        "rank": config.rank,
        "bias": config.bias,
        "chosen": list(experiment.chosen),
        "parameters": sum(tensor.numel() for tensor in original.values()),
        "lora_parameters": count.lora,
        "trained_parameters": count.trainable,
        "total_parameters": count.total,
        "lora_shapes": {key: list(parameter.shape) for key, parameter in lora_parameters(model).items()},
        **{f"wrong_{when}": wrong for when, wrong in _by_time(before, after, disabled)},
        **{
            f"accuracy_{when}": 1 - sum(wrong) / sum(tested)
            for when, wrong in _by_time(before, after, disabled)
        },
        "accuracy_chosen": _accuracies(before, after, tested, experiment.chosen),
        "accuracy_others": _accuracies(before, after, tested, tuple(set(range(10)) - set(experiment.chosen))),
        "tested": tested,
        "start_identical": identical,
        "frozen_unchanged": all(torch.equal(original[key], frozen[key]) for key in original),
        "effective_weights_exact": _effective_weights_are_exact(model, original),
        "data": source,
        "seed": seed,
    }
    check(result)
    return result


def check(result: dict[str, Any]) -> None:
    """Raise RuntimeError, naming it, for a statement about LoRA that does not hold."""
    statements = {
        "before fine-tuning, enabled and disabled give identical outputs": result["start_identical"],
        "the frozen weights are bit-identical to the originals": result["frozen_unchanged"],
        "the effective weight is W + BA * scaling": result["effective_weights_exact"],
        "disabled gives back the original errors": result["wrong_disabled"] == result["wrong_before"],
        "the errors on the chosen digits fall": result["accuracy_chosen"]["after"]
        > result["accuracy_chosen"]["before"],
        "the overall accuracy falls": result["accuracy_after"] < result["accuracy_before"],
    }
    broken = [statement for statement, holds in statements.items() if not holds]
    if broken:
        raise RuntimeError("does not hold: " + "; ".join(broken))


def show(result: dict[str, Any]) -> None:
    """Print the errors by digit and what happened, in words and numbers."""
    experiment = EXPERIMENTS[result["network"]]
    rows = [
        (
            f"{digit}{' (chosen)' if digit in experiment.chosen else ''}",
            result["tested"][digit],
            result["wrong_before"][digit],
            result["wrong_after"][digit],
            result["wrong_disabled"][digit],
            *experiment.published_wrong.get(digit, (None, None)),
        )
        for digit in range(10)
    ]
    columns = ("digit", "tested", "before", "after", "disabled", "published before", "published after")
    print_table("images classified wrongly", columns, rows)
    share = 100 * result["lora_parameters"] / result["parameters"]
    chosen, others = result["accuracy_chosen"], result["accuracy_others"]
    print(
        f"LoRA of rank {result['rank']} adds {result['lora_parameters']:,} parameters to {result['parameters']:,} "
        f"({share:.3g} %); {result['trained_parameters']:,} were trained.\n"
        f"On the chosen digits accuracy rises from {chosen['before']:.4f} to {chosen['after']:.4f}; on the others, "
        f"which it forgets, it falls from {others['before']:.4f} to {others['after']:.4f}.\n"
        f"Over all digits it falls from {result['accuracy_before']:.4f} to {result['accuracy_after']:.4f}; with LoRA "
        f"disabled it is {result['accuracy_disabled']:.4f} again, digit for digit. Published: {experiment.published}."
    )


def _enabled_equals_disabled(model: nn.Module, data: Images) -> bool:
    with torch.no_grad():
        enabled = model(data.images)
        with lora_disabled(model):
            return torch.equal(enabled, model(data.images))


@torch.no_grad()
def _effective_weights_are_exact(model: nn.Module, original: dict[str, Tensor]) -> bool:
    """Whether merging puts W + (B A) * scaling into every layer, W being the weight before injection."""
    layers = lora_layers(model)
    expected = {
        name: original[f"{name}.weight"] + (layer.lora_B @ layer.lora_A) * layer.scaling
        for name, layer in layers.items()
    }
    merge_lora(model)
    exact = all(torch.equal(layer.frozen_weight, expected[name]) for name, layer in layers.items())
    unmerge_lora(model)
    return exact


def _by_time(before: list[int], after: list[int], disabled: list[int]) -> list[tuple[str, list[int]]]:
    return [("before", before), ("after", after), ("disabled", disabled)]


def _accuracies(
    before: list[int], after: list[int], tested: list[int], digits: tuple[int, ...]
) -> dict[str, float]:
    total = sum(tested[digit] for digit in digits)
    return {
        "before": 1 - sum(before[digit] for digit in digits) / total,
        "after": 1 - sum(after[digit] for digit in digits) / total,
    }


def main() -> int:
    """Run the demonstration from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--network", choices=list(EXPERIMENTS), default="digits", help="default: digits")
    parser.add_argument("--form", choices=FORMS, default="parametrization", help="default: parametrization")
    parser.add_argument("--data_dir", help="directory with IDX (.gz or not) or npz files; default: the Hub")
    parser.add_argument("--bias", choices=BIAS_MODES, default="none", help="biases to train (default: none)")
    parser.add_argument(
        "--ranks", help="try several ranks, such as 1,2,4,8; the plot then shows accuracy by rank"
    )
    parser.add_argument("--seed", type=int, default=42, help="default: 42")
    parser.add_argument("--output", help="write the result as JSON; a list with --ranks")
    parser.add_argument("--plot", help="write a PNG: errors by digit, or accuracy by rank with --ranks")
    options = parser.parse_args()
    if options.plot and find_spec("matplotlib") is None:
        parser.error(
            "--plot needs matplotlib, which is not installed; pip install 'hf-lora[mnist]' brings it"
        )
    experiment = EXPERIMENTS[options.network]
    try:
        ranks = [int(rank) for rank in options.ranks.split(",")] if options.ranks else [experiment.rank]
        configs = [
            LoRAConfig(
                rank=rank,
                alpha=1,
                init="normal",
                target_modules="all-linear",
                form=options.form,
                bias=options.bias,
            )
            for rank in ranks
        ]
        training, test, source = load_mnist(options.data_dir, mean=experiment.mean, std=experiment.std)
    except ValueError as error:
        parser.error(str(error))
    print(f"data: {source}")
    base = pretrain(options.network, training, options.seed)
    results = []
    for config in configs:
        model = copy.deepcopy(base)
        results.append(
            adapt(options.network, model, training, test, config=config, source=source, seed=options.seed)
        )
        show(results[-1])
    if options.output:
        written = results if options.ranks else results[0]
        write_text(Path(options.output), json.dumps(written, indent=2) + "\n")
    if options.plot:
        from mnist_plots import plot_errors, plot_ranks

        if options.ranks:
            plot_ranks(results, Path(options.plot))
        else:
            plot_errors(results[0], Path(options.plot))
    return 0


if __name__ == "__main__":
    sys.exit(main())
