"""An adapter pushed to a Hub on this machine, loaded by its name in new processes with empty caches, predicts the same.

    python scripts/check_hub.py --adapter runs/demo

Through hf_lora, peft and `pipeline`, each compared with hf_lora on the directory. Exits with 1 for a difference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from harness import add_output_arguments, machine, report, write_json
from hub_repositories import folder_files
from hub_server import HubServer
from huggingface_hub.utils import disable_progress_bars
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.utils import logging as transformers_logging

from hf_lora.adapters.directory import AdapterFiles, read_adapter
from hf_lora.adapters.hub import adapter_contents, adapter_directory
from hf_lora.models.bundled import resolve_base
from hf_lora.serving.classifier import TextClassifier

NAME = "me/checked"
TOKEN = "hf_me"
TEXTS = (
    "The striker scored twice as the champions won the cup final.",
    "Shares fell sharply after the bank cut its profit forecast.",
    "The new phone has a faster processor and a better camera.",
    "The minister lost the vote in parliament by a single voice.",
    "Her second film opens the festival on Friday.",
)
# Merged or not, batched or not, a sum is rounded in another order; scores are between 0 and 1.
TOLERANCE = 1e-5
Scores = list[list[float]]


def main() -> int:
    """Run the comparison from the command line; exits with 1 if a prediction differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--adapter", default="runs/demo", help="adapter directory (default: runs/demo)")
    parser.add_argument("--text", nargs="+", default=list(TEXTS), help="texts to predict")
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)  # the way, the adapter and its base
    add_output_arguments(parser, plot=False)
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    if options.load:
        way, adapter, base = options.load
        print(json.dumps(WAYS[way](adapter, base, options.text)))
        return 0
    try:
        result = check(options.adapter, options.text)
    except ValueError as error:
        print(f"check_hub: {error}", file=sys.stderr)
        return 2
    table = report(options)
    table("the push", ("what", "value"), list(result["push"].items()))
    rows = [
        (way, f"{row['largest_difference']:.1e}", row["different_predictions"], f"{row['seconds']:.1f}")
        for way, row in result["ways"].items()
    ]
    title = f"{NAME} by name, new processes with empty caches, against {options.adapter}: {len(options.text)} texts"
    table(title, ("way", "largest difference of scores", "other predictions", "seconds"), rows)
    write_json(options.json, result)
    return 0 if result["equal"] else 1


def check(adapter: str, texts: Sequence[str]) -> dict[str, Any]:
    """Push the adapter, load it by name in every way, and compare the scores with the directory's."""
    files = read_adapter(adapter)
    base = base_directory(files)
    name = str(files.base_name) if not Path(str(files.base_name)).is_dir() else str(base)
    with HubServer() as hub, tempfile.TemporaryDirectory() as folder:
        if name != str(base):
            hub.publish(name, folder_files(base))
        home = Path(folder)
        pushed = command(
            hub,
            home / "push",
            "-m",
            "hf_lora.cli.main",
            "push",
            "--adapter",
            adapter,
            "--repo_id",
            NAME,
            "--json",
        )
        again = command(
            hub,
            home / "push",
            "-m",
            "hf_lora.cli.main",
            "push",
            "--adapter",
            adapter,
            "--repo_id",
            NAME,
            "--json",
        )
        if hub.repositories[NAME].files() != adapter_contents(Path(adapter)):
            raise ValueError("the repository does not hold the adapter's files, and nothing else")
        expected = torch.tensor(by_hf_lora(adapter, str(base), texts))
        ways = {}
        for way in WAYS:
            start = time.perf_counter()
            argv = (__file__, "--text", *texts, "--load", way, NAME, name)
            scores = torch.tensor(command(hub, home / way, *argv))
            seconds = time.perf_counter() - start
            ways[way] = {
                "largest_difference": (scores - expected).abs().max().item(),
                "different_predictions": int((scores.argmax(-1) != expected.argmax(-1)).sum()),
                "seconds": seconds,
            }
    push = {
        "files": len(pushed["files"]),
        "bytes": sum(pushed["files"].values()),
        "files of a repeated push": len(again["files"]),
    }
    equal = all(
        not row["different_predictions"] and row["largest_difference"] <= TOLERANCE for row in ways.values()
    )
    return {"equal": equal and not again["changed"], "push": push, "ways": ways, "machine": machine()}


def base_directory(files: AdapterFiles) -> Path:
    """Where the adapter's base model is on this machine: a directory, a package's copy, or the Hub's cache."""
    name = str(files.base_name)
    os.environ["HF_HUB_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    found = Path(resolve_base(name))
    if found.is_dir():
        return found
    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        raise ValueError(
            f"the base model {name!r} is not on this machine; expected it in the cache"
        ) from None


def command(hub: HubServer, home: Path, *argv: str) -> Any:
    """The JSON that a Python process prints, whose Hub is the server and whose cache is empty."""
    environment = {**os.environ, **hub.environment(TOKEN, home)}
    run = subprocess.run([sys.executable, *argv], env=environment, capture_output=True, text=True)
    if run.returncode:
        raise ValueError(f"{argv[:4]} failed; got {run.stderr.strip().splitlines()[-1:]}")
    return json.loads(run.stdout.splitlines()[-1])


def by_hf_lora(adapter: str, base: str, texts: Sequence[str]) -> Scores:
    """As `hf-lora predict` does, before calibration, which PEFT's files do not hold."""
    classifier = TextClassifier.from_pretrained(adapter, base=base, precision="fp32")
    return classifier.logits(texts).softmax(-1).tolist()


def by_peft(adapter: str, base: str, texts: Sequence[str]) -> Scores:
    """As the README's snippet for peft does."""
    labels = label_names(adapter)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels))
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    with torch.inference_mode():
        logits = model(**tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")).logits
    return logits.softmax(-1).tolist()


def by_pipeline(adapter: str, base: str, texts: Sequence[str]) -> Scores:
    """As the README's snippet for transformers does; `base` is what the adapter itself names."""
    labels = label_names(adapter)
    model = AutoModelForSequenceClassification.from_pretrained(
        adapter, num_labels=len(labels), id2label=dict(enumerate(labels))
    )
    classify = pipeline("text-classification", model=model, tokenizer=adapter)
    found = [{row["label"]: row["score"] for row in rows} for rows in classify(list(texts), top_k=None)]
    return [[row[label] for label in labels] for row in found]


def label_names(adapter: str) -> list[str]:
    """The labels in the order of the head's outputs."""
    info = read_adapter(adapter_directory(adapter)).info
    if info is None:
        raise ValueError(f"{adapter!r} has no hf_lora.json with its labels")
    return list(info.labels)


WAYS: dict[str, Callable[[str, str, Sequence[str]], Scores]] = {
    "hf_lora": by_hf_lora,
    "peft": by_peft,
    "pipeline": by_pipeline,
}

if __name__ == "__main__":
    sys.exit(main())
