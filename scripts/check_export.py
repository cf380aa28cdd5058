"""ONNX on real data: an exported adapter on onnxruntime against the merged model in torch, on BBC News' held-out part.

    python scripts/check_export.py --adapter runs/demo --json export.json

Logits, labels and accuracy are compared on all held-out articles; the sides take turns for the speed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from benchmark_data import bbc_folder
from benchmarks import add_output_arguments, machine, paired, report, summary, write_json

from hf_lora import TextClassifier
from hf_lora.data import DataConfig, prepare_data
from hf_lora.serving.export import TOLERANCE, export_onnx
from hf_lora.serving.onnx import MODEL, load_onnx

TORCH = "torch"


def speed(sides: dict[str, TextClassifier], texts: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Texts per second of each side, with the ratio to torch."""

    def side(classifier: TextClassifier) -> Callable[[], float]:
        def texts_per_second() -> float:
            start = time.perf_counter()
            classifier.logits(texts)
            return len(texts) / (time.perf_counter() - start)

        return texts_per_second

    for classifier in sides.values():
        classifier.logits(texts[:16])
    return summary(
        paired({name: side(classifier) for name, classifier in sides.items()}, rounds), reference=TORCH
    )


def check(adapter: str, train_file: str, rounds: int, timed_texts: int) -> dict[str, Any]:
    """Export, compare on the held-out texts, measure."""
    classifier = TextClassifier.from_pretrained(adapter, precision="fp32", device="cpu")
    config = DataConfig(train_file=train_file, max_length=classifier.info.max_length or 128)
    data = prepare_data(config, classifier.tokenizer)
    texts = list(data.texts["validation"][data.text_columns[0]])
    references = torch.tensor(data.splits["validation"]["labels"])
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = export_onnx(classifier, Path(folder) / "export", int8=True, texts=texts)
        seconds = time.perf_counter() - start
        sides = {TORCH: classifier} | {name: load_onnx(done.directory, file=name) for name in done.files}
        figures = speed(sides, texts[:timed_texts], rounds)
    accuracy = {name: (part.argmax(-1) == references).double().mean() for name, part in done.logits.items()}
    return {
        "machine": machine(),
        "texts": len(texts),
        "timed_texts": min(timed_texts, len(texts)),
        "export_seconds": seconds,
        "sides": {
            name: {
                "accuracy": accuracy[name].item(),
                **(asdict(done.files[name]) if name in done.files else {}),
                "texts_per_second": figures[name],
            }
            for name in sides
        },
    }


def main() -> int:
    """Run the comparison from the command line; exits with 1 if ONNX gives another label or is too far away."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_output_arguments(parser, plot=False)
    parser.add_argument("--adapter", default="runs/demo", help="adapter directory (default: runs/demo)")
    parser.add_argument("--train_file", help="the data it was trained on (default: BBC News)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--texts", type=int, default=128, help="texts for the speed (default: 128)")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    table = report(options)
    result = check(options.adapter, options.train_file or str(bbc_folder()), options.rounds, options.texts)
    table(
        f"{result['texts']} held-out texts; {result['machine']['threads']} threads; exported and compared in "
        f"{result['export_seconds']:.0f} s",
        ("side", "MB", "accuracy", "largest difference", "other labels", "texts per second", "to torch"),
        [_row(name, side) for name, side in result["sides"].items()],
    )
    write_json(options.json, result)
    exported = result["sides"][MODEL]
    return int(exported["changed_labels"] > 0 or exported["largest_logit_difference"] > TOLERANCE)


def _row(name: str, side: dict[str, Any]) -> tuple[Any, ...]:
    rate = side["texts_per_second"]
    exported = "bytes" in side
    return (
        name,
        f"{side['bytes'] / 1e6:.1f}" if exported else None,
        side["accuracy"],
        f"{side['largest_logit_difference']:.2g}" if exported else None,
        side.get("changed_labels"),
        f"{rate['median']:.1f}",
        f"{rate['ratio']:.2f}",
    )


if __name__ == "__main__":
    sys.exit(main())
