"""Loading: an adapter onto a loaded BERT-base against peft, a whole classifier, and how quickly things start.

    python scripts/benchmarks/load.py --json load.json

Paired: the sides take turns. The base has BERT-base's shape and random weights, the files are in the page
cache, and every turn gets a fresh copy of the model.
"""

from __future__ import annotations

import argparse
import copy
import gc
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from data_sets import BASE
from harness import add_output_arguments, in_process, machine, paired, report, summary, timed, write_json
from sides import peft_config
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from hf_lora import (
    LoRAConfig,
    TextClassifier,
    inject_lora,
    load_adapter,
    load_classifier,
    lora_layers,
    save_adapter,
)
from hf_lora.models.bundled import resolve_base

RANK = 8
LABELS = ("negative", "positive")
# What a process prints of itself: the seconds that importing hf_lora takes after transformers.
IMPORTS = """
import json, time
import transformers
start = time.perf_counter()
import hf_lora
print(json.dumps(time.perf_counter() - start))
"""


def onto_a_model(base: nn.Module, adapter: str, rounds: int) -> dict[str, Any]:
    """Seconds to load an adapter onto `base` and to put a new one into it, ours against peft's."""
    config = LoRAConfig(rank=RANK)
    theirs = peft_config(r=RANK)
    sides: dict[str, dict[str, Callable[[Any], object]]] = {
        "load": {
            "hf_lora": lambda model: load_adapter(model, adapter),
            "peft": lambda model: peft.PeftModel.from_pretrained(model, adapter),
        },
        "inject": {
            "hf_lora": lambda model: inject_lora(model, config),
            "peft": lambda model: peft.get_peft_model(model, theirs),
        },
    }

    def on_a_copy(act: Callable[[Any], object]) -> Callable[[], float]:
        def seconds() -> float:
            model = copy.deepcopy(base)
            gc.collect()
            start = time.perf_counter()
            act(model)
            return time.perf_counter() - start

        return seconds

    result = {}
    for what, both in sides.items():
        for act in both.values():
            act(copy.deepcopy(base))
        times = paired({name: on_a_copy(act) for name, act in both.items()}, rounds)
        result[what] = summary(times, reference="peft")
    return result


def whole_classifier(adapter: str, rounds: int) -> dict[str, Any]:
    """Seconds from nothing but an imported library to a merged MiniLM classifier with its tokenizer."""

    def ours() -> object:
        return TextClassifier.from_pretrained(adapter)

    def theirs() -> object:
        base = AutoModelForSequenceClassification.from_pretrained(resolve_base(BASE), num_labels=len(LABELS))
        merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
        return merged.eval(), AutoTokenizer.from_pretrained(adapter)

    ours(), theirs()
    times = paired({"hf_lora": timed(ours), "transformers and peft": timed(theirs)}, rounds)
    return summary(times, reference="transformers and peft")


def starting(rounds: int) -> dict[str, Any]:
    """Seconds that whole processes take, and the import of hf_lora inside one that has transformers."""

    def process(*arguments: str) -> Callable[[], float]:
        return timed(
            lambda: subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        )

    sides = {
        "python -c pass": process("-c", "pass"),
        "hf-lora --help": process("-m", "hf_lora.cli.main", "--help"),
        "import transformers": process("-c", "import transformers"),
        "import transformers, hf_lora": process("-c", "import transformers, hf_lora"),
        "import hf_lora, after transformers": lambda: in_process([sys.executable, "-c", IMPORTS]),
    }
    for side in sides.values():
        side()
    return summary(paired(sides, rounds), reference="import transformers")


def random_adapter(model: nn.Module, directory: Path, tokenizer: Any = None) -> str:
    """Save the adapter of an injected model with a random update."""
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.02)
    return str(save_adapter(model, directory, tokenizer=tokenizer))


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_output_arguments(parser, plot=False)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each side (default: 15)")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # peft's modules draw warnings that say nothing here.
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    table = report(options)
    result: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        base = AutoModelForSequenceClassification.from_config(BertConfig(num_labels=len(LABELS))).eval()
        injected = copy.deepcopy(base)
        inject_lora(injected, LoRAConfig(rank=RANK))
        adapter = random_adapter(injected, Path(folder) / "bert_base")
        result |= onto_a_model(base, adapter, options.rounds)
        model, tokenizer = load_classifier(BASE, LABELS, LoRAConfig(rank=RANK))
        result["classifier"] = whole_classifier(
            random_adapter(model, Path(folder) / "minilm", tokenizer), options.rounds
        )
    result["starting"] = starting(options.rounds)
    titles = {
        "load": "an adapter onto a loaded BERT-base (ms)",
        "inject": "a new adapter into a loaded BERT-base (ms)",
        "classifier": "a merged MiniLM classifier from files (ms)",
        "starting": "processes (ms)",
    }
    for what, title in titles.items():
        table(
            title,
            ("side", "median", "least", "greatest", "ratio"),
            [
                (name, *(f"{1000 * row[key]:.1f}" for key in ("median", "min", "max")), f"{row['ratio']:.2f}")
                for name, row in result[what].items()
            ],
        )
    write_json(options.json, result)


if __name__ == "__main__":
    main()
