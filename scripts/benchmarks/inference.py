"""Prediction: TextClassifier and its ONNX export against transformers' pipeline, merged and with peft unmerged.

    python scripts/benchmarks/inference.py --json inference.json

The texts are sentences of BBC News, the model is MiniLM. The sides live in one process and take turns. Peak
memory is measured in processes of their own, on few texts and on many. The labels of all sides are compared.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from data_sets import BASE, bbc_sentences
from harness import (
    add_output_arguments,
    in_process,
    machine,
    paired,
    peak_mb,
    report,
    reset_peak,
    resident_mb,
    summary,
    write_json,
)

from hf_lora import LoRAConfig, TextClassifier, load_classifier, lora_layers, remove_lora, save_adapter
from hf_lora.models.loading import load_base
from hf_lora.serving.export import export_onnx
from hf_lora.serving.onnx import MODEL, MODEL_INT8, load_onnx

Classify = Callable[[list[str]], list[dict[str, Any]]]

REFERENCE = "pipeline, merged"
BATCH = 32


def hf_lora_side(adapter: str, precision: str) -> Classify:
    """As `hf-lora predict` does it."""
    return TextClassifier.from_pretrained(adapter, precision=precision).predict  # type: ignore[return-value]


def pipeline_side(adapter: str) -> Classify:
    """The merged model as a plain transformers one, in fp32 as it was trained, in a pipeline."""
    classifier = TextClassifier.from_pretrained(adapter, precision="fp32")
    remove_lora(classifier.model)
    return _pipeline(classifier.model, classifier)


def peft_side(adapter: str) -> Classify:
    """peft with its adapter beside the weights, in a pipeline."""
    classifier = TextClassifier.from_pretrained(adapter)
    info = classifier.info
    base, _ = load_base(str(info.base_model.name_or_path), info.labels)
    return _pipeline(peft.PeftModel.from_pretrained(base, adapter).eval().base_model.model, classifier)


def onnx_side(adapter: str, file: str) -> Classify:
    """An export of the adapter on onnxruntime."""
    classifier = TextClassifier.from_pretrained(adapter, precision="fp32", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        done = export_onnx(classifier, Path(folder) / "export", int8=file == MODEL_INT8)
        return load_onnx(done.directory, file=file).predict  # type: ignore[return-value]


def _pipeline(model: Any, classifier: TextClassifier) -> Classify:
    classify = transformers.pipeline(
        "text-classification", model=model, tokenizer=classifier.tokenizer, batch_size=BATCH
    )
    length = classifier.info.max_length
    return lambda texts: list(classify(texts, truncation=True, max_length=length))


def make_adapter(directory: Path) -> Path:
    """An adapter with a random update whose head tells the topics of sentences: by the nearest mean output."""
    rows = bbc_sentences(500)
    topics = sorted({topic for _, topic in rows})
    model, tokenizer = load_classifier(BASE, topics, LoRAConfig(), max_length=128)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    pooled: list[torch.Tensor] = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    with torch.inference_mode():
        for start in range(0, len(rows), BATCH):
            texts = [text for text, _ in rows[start : start + BATCH]]
            model.eval()(
                **tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
            )
    outputs, own = torch.cat(pooled), torch.tensor([topics.index(topic) for _, topic in rows])
    means = torch.stack([outputs[own == index].mean(0) for index in range(len(topics))])
    # The nearest mean m to x has the greatest m x - |m|^2 / 2; the factor makes clear cases likely ones.
    model.classifier.weight.data = 20 * means
    model.classifier.bias.data = -10 * means.pow(2).sum(1)
    return save_adapter(model, directory / "adapter", tokenizer=tokenizer)


def speed(adapter: str, texts: list[str], rounds: int) -> dict[str, Any]:
    """Texts per second of each side with the ratio to the reference, and how far the sides agree."""
    sides: dict[str, Classify] = {
        "hf_lora": hf_lora_side(adapter, "auto"),
        "hf_lora, fp32": hf_lora_side(adapter, "fp32"),
        REFERENCE: pipeline_side(adapter),
        "pipeline, peft": peft_side(adapter),
        "onnxruntime": onnx_side(adapter, MODEL),
        "onnxruntime, int8": onnx_side(adapter, MODEL_INT8),
    }
    results: dict[str, list[dict[str, Any]]] = {}

    def timed(name: str) -> Callable[[], float]:
        def texts_per_second() -> float:
            start = time.perf_counter()
            results[name] = sides[name](texts)
            return len(texts) / (time.perf_counter() - start)

        return texts_per_second

    for side in sides.values():
        side(texts[: 2 * BATCH])
    figures = summary(paired({name: timed(name) for name in sides}, rounds), reference=REFERENCE)
    expected = results[REFERENCE]
    for name, given in results.items():
        pairs = list(zip(given, expected, strict=True))
        figures[name]["same_label"] = sum(a["label"] == b["label"] for a, b in pairs) / len(pairs)
        same = [abs(a["score"] - b["score"]) for a, b in pairs if a["label"] == b["label"]]
        figures[name]["largest_score_difference"] = max(same, default=0.0)
    return figures


def memory(side: str, adapter: str, count: int) -> dict[str, float]:
    """Megabytes of this process with the model loaded, and the most while it classified `count` sentences."""
    texts = [text for text, _ in bbc_sentences(count)]
    classify = hf_lora_side(adapter, "auto") if side == "hf_lora" else pipeline_side(adapter)
    classify(texts[:1])
    # Freed memory that is still resident would hide what is needed.
    gc.collect()
    before = resident_mb()
    reset_peak()
    start = time.perf_counter()
    classify(texts)
    return {"loaded_mb": before, "peak_mb": peak_mb(), "seconds": time.perf_counter() - start}


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_output_arguments(parser, plot=False)
    parser.add_argument("--adapter", help="adapter directory (default: one with a random update)")
    parser.add_argument("--texts", type=int, default=600, help="sentences for the speed (default: 600)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--many", type=int, default=10_000, help="sentences for the memory (default: 10000)")
    parser.add_argument("--memory", choices=("hf_lora", "pipeline"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.memory:
        print(json.dumps(memory(options.memory, options.adapter, options.many)))
        return
    torch.manual_seed(0)
    table = report(options)
    with tempfile.TemporaryDirectory() as folder:
        adapter = options.adapter or str(make_adapter(Path(folder)))
        texts = [text for text, _ in bbc_sentences(options.texts)]
        classifier = TextClassifier.from_pretrained(adapter)
        tokens = [len(ids) for ids in classifier.tokenizer(texts)["input_ids"]]
        result: dict[str, Any] = {
            "machine": machine(),
            "setting": classifier.setting,
            "texts": len(texts),
            "mean_tokens": sum(tokens) / len(tokens),
            "texts_per_second": speed(adapter, texts, options.rounds),
            "memory": [
                {"side": side, "texts": count, **in_process(_memory_command(side, adapter, count))}
                for side, count in (
                    ("hf_lora", options.many // 10),
                    ("hf_lora", options.many),
                    ("pipeline", options.many // 10),
                )
            ],
        }
    table(
        f"{len(texts)} sentences of {result['mean_tokens']:.0f} tokens ({result['setting']})",
        ("side", "texts per second", f"to {REFERENCE}", "same label", "largest difference of a score"),
        [
            (
                name,
                *(f"{row['median']:.0f}", f"{row['ratio']:.2f}", f"{row['same_label']:.4f}"),
                f"{row['largest_score_difference']:.2g}",
            )
            for name, row in result["texts_per_second"].items()
        ],
    )
    table(
        "memory of the process (MB)",
        ("side", "texts", "model loaded", "peak", "seconds"),
        [
            (row["side"], row["texts"], *(f"{row[key]:.0f}" for key in ("loaded_mb", "peak_mb", "seconds")))
            for row in result["memory"]
        ],
    )
    write_json(options.json, result)


def _memory_command(side: str, adapter: str, count: int) -> list[str]:
    return [sys.executable, __file__, "--memory", side, "--adapter", adapter, "--many", str(count)]


if __name__ == "__main__":
    main()
