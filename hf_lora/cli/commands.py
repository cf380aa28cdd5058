"""What each `hf-lora` subcommand does. One function each, taking the parsed options."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from hf_lora._files import replacing, whole_file
from hf_lora.adapters.directory import TENSORS, AdapterFiles, read_adapter
from hf_lora.adapters.hub import adapter_directory
from hf_lora.adapters.peft_format import PREFIX
from hf_lora.cli.labelled import classifier_of, labelled_data, logits_beside, references_of, texts_of
from hf_lora.cli.tables import print_class_errors, print_table
from hf_lora.data import iter_texts
from hf_lora.lora.architectures import ROLE_NAMES
from hf_lora.lora.config import LoRAConfig
from hf_lora.lora.inject import (
    inject_lora,
    injection,
    merge_lora,
    remove_lora,
    trainable_parameter_count,
)
from hf_lora.models.loading import meta_classifier
from hf_lora.models.pooling import NATIVE
from hf_lora.serving.classifier import Text, TextClassifier, changed_labels
from hf_lora.tasks.mistakes import measurer

# Texts that `merge` compares at the most: enough to see a difference, quick enough to wait for.
COMPARED = 1000


def evaluate(options: argparse.Namespace) -> int:
    """Metrics and errors by class on labelled data, with the adapter and with it disabled."""
    classifier = classifier_of(options, precision=options.precision)
    data = labelled_data(options, classifier)
    texts, references = texts_of(data), references_of(data)
    measure = measurer(data.task, data.labels, classifier.info.calibration)
    print(classifier.setting, file=sys.stderr)
    enabled, disabled = logits_beside(classifier, texts, options.batch_size)
    report: dict[str, Any] = {
        "adapter": str(options.adapter),
        "examples": len(texts),
        "truncated": data.report.truncated["test"],
        "metrics": measure(enabled, references),
        "metrics_disabled": measure(disabled, references),
    }
    if errors := data.task.class_errors(enabled, disabled, references, data.labels):
        report["classes"] = errors
    if options.json:
        print(json.dumps(report, ensure_ascii=False))
        return 0
    rows = [(name, value, report["metrics_disabled"].get(name)) for name, value in report["metrics"].items()]
    print_table(f"{len(texts)} examples", ("metric", "with adapter", "adapter disabled"), rows)
    if "classes" in report:
        print_class_errors(report["classes"], "in the output of --json")
    return 0


def predict(options: argparse.Namespace) -> int:
    """One JSON object a line for each text, in order, while the texts are being read."""
    classifier = classifier_of(options, precision=options.precision)
    texts = _texts(options, classifier)
    if options.output_file is None:
        _write_predictions(classifier, texts, sys.stdout, options.batch_size)
    else:
        with whole_file(Path(options.output_file)) as stream:
            _write_predictions(
                classifier, tqdm(texts, unit=" texts", disable=None), stream, options.batch_size
            )
    return 0


def merge(options: argparse.Namespace) -> int:
    """A plain checkpoint with the adapter in the weights, and how much merging changed the outputs."""
    output = Path(options.output_dir)
    if output.exists():
        raise ValueError(f"output_dir exists; got {str(output)!r}; expected a new directory")
    # In the types of the base, so that the checkpoint has them too.
    classifier = classifier_of(options, merge=False, precision=None)
    if classifier.info.pooling != NATIVE:
        raise ValueError(
            f"transformers has no class for a head with pooling={classifier.info.pooling!r}; expected {NATIVE!r}; "
            "use `hf-lora export --format onnx`, TextClassifier, which merges in memory, or train with --pooling native"
        )
    given = options.texts or options.input_file
    texts = list(islice(_texts(options, classifier), COMPARED)) if given else []
    before = classifier.logits(texts) if texts else None
    merged = merge_lora(classifier.model)
    report: dict[str, Any] = {"output_dir": str(output), "merged_modules": len(merged), "texts": len(texts)}
    if before is not None:
        after = classifier.logits(texts)
        report["largest_logit_difference"] = (after - before).abs().max().item()
        report["label_flips"] = changed_labels(before, after, classifier.info)
    remove_lora(classifier.model)
    with replacing(output) as folder:
        classifier.model.save_pretrained(folder)
        classifier.tokenizer.save_pretrained(folder)
    if options.json:
        print(json.dumps(report))
        return 0
    print_table("merged", ("what", "value"), [(k.replace("_", " "), _plain(v)) for k, v in report.items()])
    if before is None:
        print("no texts were given to compare on; pass some, or --input_file")
    return 0


def info(options: argparse.Namespace) -> int:
    """What an adapter is, from its files alone: the base model is not loaded."""
    files = read_adapter(adapter_directory(options.adapter, revision=options.revision))
    report = describe(files)
    if options.json:
        print(json.dumps(report, ensure_ascii=False))
        return 0
    norms = report.pop("delta_norms")
    metrics = report.pop("metrics")
    rows = [(name.replace("_", " "), _plain(value)) for name, value in report.items() if value is not None]
    print_table("adapter", ("what", "value"), rows)
    measured = [(name, value) for name, value in metrics.items() if isinstance(value, int | float)]
    if measured:
        print_table("measured in training", ("metric", "value"), measured)
    print_table("norms of the updates", ("module", "Frobenius norm of scaling * B A"), norms.items())
    return 0


def targets(options: argparse.Namespace) -> int:
    """The modules that each role means in a model, and what adapting them costs; no weights are loaded."""
    model = meta_classifier(
        options.model_name_or_path,
        revision=options.model_revision,
        trust_remote_code=options.trust_remote_code,
    )
    inject_lora(model, LoRAConfig(rank=options.lora_rank, projections=options.lora_projections))
    count = trainable_parameter_count(model)
    roles: dict[str, list[str]] = {role: [] for role in options.lora_projections}
    for target in injection(model).targets:
        for role in str(target.role):
            roles[role].append(target.name)
    report = {
        "model_type": model.config.model_type,
        "roles": roles,
        "head": list(injection(model).head),
        "rank": options.lora_rank,
        "lora_parameters": count.lora,
        "total_parameters": count.total,
        "share": count.lora / (count.total - count.lora),
    }
    if options.json:
        print(json.dumps(report))
        return 0
    rows = [(f"{role} ({ROLE_NAMES[role]})", len(names), "\n".join(names)) for role, names in roles.items()]
    print_table(
        f"{options.model_name_or_path}: {model.config.model_type}", ("role", "modules", "names"), rows
    )
    print(f"head: {', '.join(report['head'])}")
    print(
        f"LoRA at rank {options.lora_rank}: {count.lora:,} parameters ({100 * report['share']:.2f}% of the model)"
    )
    return 0


def describe(files: AdapterFiles) -> dict[str, Any]:
    """What `info` prints: identity, sizes, and the norm of each update, computed from its factors."""
    ends = (".lora_A.weight", ".lora_embedding_A")
    found = (key.removesuffix(end) for key in files.tensors for end in ends if key.endswith(end))
    modules = sorted(name.removeprefix(PREFIX) for name in found)
    lora = sum(tensor.numel() for key, tensor in files.tensors.items() if ".lora_" in key)
    own = files.info
    return {
        "directory": str(files.directory),
        "base_model": files.base_name,
        "base_revision": own.base_model.revision if own else files.peft_config.get("revision"),
        "fingerprint": own.base_model.fingerprint if own else None,
        "labels": list(own.labels) if own else None,
        "problem_type": own.problem_type if own else None,
        "pooling": own.pooling if own else None,
        "max_length": own.max_length if own else None,
        "temperature": own.temperature if own else None,
        "thresholds": list(own.thresholds) if own and own.thresholds else None,
        "rank": files.config.rank,
        "alpha": files.config.alpha,
        "variant": files.config.variant,
        "scaling": files.config.scaling,
        "projections": own.projections if own else None,
        "target_modules": files.config.target_modules,
        "modules": len(modules),
        "lora_parameters": lora,
        "other_parameters": sum(tensor.numel() for tensor in files.tensors.values()) - lora,
        "bytes": (files.directory / TENSORS).stat().st_size,
        "metrics": dict(own.metrics) if own else {},
        "delta_norms": {module: _delta_norm(files, module) for module in modules},
    }


def _delta_norm(files: AdapterFiles, module: str) -> float:
    """The Frobenius norm of scaling * B A: the root of trace((B'B)(AA')), which needs no `(out, in)` matrix."""
    lora_A, lora_B = (_factor(files, module, which).double().flatten(1) for which in "AB")
    # A grouped convolution's A is in PEFT's file once for each group, beside zeros.
    lora_A = lora_A[: lora_B.shape[1]]
    gram = ((lora_B.T @ lora_B) * (lora_A @ lora_A.T)).sum()
    return files.config.scaling_of(module) * gram.clamp(min=0).sqrt().item()


def _factor(files: AdapterFiles, module: str, which: str) -> torch.Tensor:
    names = (f"{PREFIX}{module}.lora_{which}.weight", f"{PREFIX}{module}.lora_embedding_{which}")
    return next(files.tensors[name] for name in names if name in files.tensors)


def _texts(options: argparse.Namespace, classifier: TextClassifier) -> Iterator[Text]:
    """The texts of the command line, else of the file, else of standard input."""
    if options.texts:
        yield from options.texts
        return
    trained_on = classifier.info.text_columns
    text = options.text_column or (trained_on[0] if trained_on else None)
    pair = options.text_pair_column or (
        trained_on[1] if len(trained_on) > 1 and not options.text_column else None
    )
    source = options.input_file or sys.stdin
    for row in iter_texts(source, text_column=text, text_pair_column=pair, encoding=options.encoding):
        yield row[0] if len(row) == 1 else row


def _write_predictions(
    classifier: TextClassifier, texts: Iterable[Text], stream: TextIO, batch_size: int | None
) -> None:
    for number, result in enumerate(classifier.predict_stream(texts, batch_size=batch_size)):
        if number == 0:
            # Not before, so that a mistake in the texts is told in one line.
            print(classifier.setting, file=sys.stderr)
        stream.write(json.dumps(result, ensure_ascii=False) + "\n")
        stream.flush()


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return (
        ", ".join(map(str, value))
        if isinstance(value, list | tuple)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )
