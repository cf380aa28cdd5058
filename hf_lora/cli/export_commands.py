"""What `hf-lora export` does, in each format."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from hf_lora.adapters.info import AdapterInfo
from hf_lora.cli.commands import merge
from hf_lora.cli.export_arguments import FORMATS
from hf_lora.cli.labelled import classifier_of, labelled_data, references_of, texts_of
from hf_lora.cli.tables import print_table
from hf_lora.data import ClassificationData
from hf_lora.serving.export import PROBES, Export, export_onnx
from hf_lora.tasks.mistakes import measurer


def export(options: argparse.Namespace) -> int:
    """An adapter in the weights of its base model, in the format that was asked for."""
    return _FORMATS[options.format](options)


def _onnx(options: argparse.Namespace) -> int:
    """A graph, how far it is from torch, and what int8 costs."""
    classifier = classifier_of(options, precision="fp32", device="cpu")
    # Before the work, so that a mistake in the file is told at once.
    data = labelled_data(options, classifier) if options.test_file or options.dataset_name else None
    done = export_onnx(
        classifier, options.output_dir, int8=options.int8, texts=None if data is None else texts_of(data)
    )
    metrics = {} if data is None else _metrics(classifier.info, data, done.logits)
    count = len(done.logits["torch"])
    if options.json:
        print(json.dumps({**_report(done), "texts": count, "metrics": metrics}))
        return 0
    _print(done, f"{count} texts of the data" if data else f"{count} probe texts")
    if metrics:
        rows = [(name, *(metrics[file].get(name) for file in metrics)) for name in metrics["torch"]]
        print_table("measured on them", ("metric", *metrics), rows)
    elif options.int8:
        print("no labelled data was given to measure the loss of int8 on; pass --test_file")
    return 0


def _merged(options: argparse.Namespace) -> int:
    """What `hf-lora merge` writes, compared on the probes."""
    unused = [name for name in ("int8", "test_file", "dataset_name") if getattr(options, name)]
    if unused:
        raise ValueError(
            f"--{unused[0]} does nothing in this format; got --format {options.format}; expected --format onnx"
        )
    return merge(argparse.Namespace(**{**vars(options), "texts": list(PROBES), "input_file": None}))


_FORMATS = dict(zip(FORMATS, (_onnx, _merged), strict=True))


def _metrics(
    info: AdapterInfo, data: ClassificationData, logits: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    measure, references = measurer(info.task, info.labels, info.calibration), references_of(data)
    return {name: measure(part.numpy(), references) for name, part in logits.items()}


def _report(done: Export) -> dict[str, Any]:
    return {
        "output_dir": str(done.directory),
        "inputs": list(done.inputs),
        "files": {name: asdict(entry) for name, entry in done.files.items()},
    }


def _print(done: Export, texts: str) -> None:
    columns: Sequence[str] = ("file", "MB", "difference of a logit", "of a probability", "labels changed")
    rows = [
        (
            name,
            f"{entry.bytes / 1e6:.1f}",
            f"{entry.largest_logit_difference:.2g}",
            _short(entry.largest_probability_difference),
            entry.changed_labels,
        )
        for name, entry in done.files.items()
    ]
    print_table(f"{done.directory}: the greatest differences from torch on {texts}", columns, rows)
    print(f"inputs: {', '.join(done.inputs)}")


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.2g}"
