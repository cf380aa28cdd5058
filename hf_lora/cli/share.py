"""`hf-lora merge`, `export` and `push`: a classifier for other tools, and an adapter for the Hub."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from hf_lora.cli.predict import texts_of
from hf_lora.cli.shared import (
    CLASSIFIER,
    INPUT,
    LABELLED,
    add_command,
    add_options,
    classifier_of,
    labelled_data,
    new_directory,
)

if TYPE_CHECKING:
    from hf_lora.serving.classifier import TextClassifier
    from hf_lora.serving.encoding import Text

# Texts that `merge` compares at most.
COMPARED = 1000
ONNX, MERGED, SENTENCES = FORMATS = ("onnx", "safetensors-merged", "sentence-transformers")


def register(commands: Any) -> None:
    """Add the commands."""
    words = "write base and adapter as one plain transformers checkpoint"
    parser = add_command(commands, merge, words, *CLASSIFIER, "output_dir", *INPUT, "json")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts to compare merged and unmerged on")
    parser.add_argument("--input_file", help="file of texts to compare on")

    words = "write base and adapter for other tools: ONNX, transformers or sentence-transformers"
    parser = add_command(commands, export, words, *CLASSIFIER, "output_dir", "json")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=ONNX,
        help=f"{ONNX}: a graph for onnxruntime, in fp32; {MERGED}: as `hf-lora merge`; {SENTENCES}: for pooled heads, "
        f"its embeddings are the logits (default: {ONNX})",
    )
    parser.add_argument("--int8", action="store_true", help="with onnx: also a file with weights of 8 bits")
    add_options(parser.add_argument_group("labelled data, to measure the onnx files on"), *LABELLED)

    words = "push an adapter to the Hub: its own files, and nothing else"
    parser = add_command(commands, push, words, "adapter", "json")
    parser.add_argument("--repo_id", required=True, help="user/name of the repository, made if it is missing")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", help="branch to push to, made if it is missing (default: main)")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request; main stays as it is")
    parser.add_argument("--commit_message", help="message of the commit (default: Upload LoRA adapter)")


def merge(options: Namespace) -> None:
    """A plain checkpoint with the adapter in the weights, and how much merging changed the outputs."""
    given = options.texts or options.input_file
    _merge(
        options,
        MERGED,
        lambda classifier: list(islice(texts_of(options, classifier.info), COMPARED)) if given else [],
    )


def _merge(options: Namespace, form: str, texts_for: Callable[[TextClassifier], list[Text]]) -> None:
    from hf_lora._files import replacing
    from hf_lora.cli.tables import print_facts
    from hf_lora.lora.inject import merge_lora, remove_lora
    from hf_lora.models.pooling import MEAN_LAYERS, NATIVE
    from hf_lora.serving import checkpoint

    output = new_directory(options.output_dir)
    # In the types of the base, so that the checkpoint has them too; sentence-transformers has one for all modules.
    classifier = classifier_of(options, merge=False, precision="fp32" if form == SENTENCES else None)
    save = checkpoint.save_transformers
    if form == SENTENCES:
        checkpoint.check_sentence_transformers(classifier)
        save = checkpoint.save_sentence_transformers
    texts = texts_for(classifier)
    before = classifier.logits(texts) if texts else None
    merged = merge_lora(classifier.model)
    report: dict[str, Any] = {"output_dir": str(output), "merged_modules": len(merged), "texts": len(texts)}
    if before is not None:
        after = classifier.logits(texts)
        report["largest_logit_difference"] = (after - before).abs().max().item()
        info = classifier.info
        report["label_flips"] = info.task.changed(before.numpy(), after.numpy(), info.calibration)
    remove_lora(classifier.model)
    with replacing(output) as folder:
        save(classifier, folder)
    if options.json:
        print(json.dumps(report))
        return
    print_facts("merged", report)
    if classifier.info.pooling != NATIVE and (form == MERGED or classifier.info.pooling == MEAN_LAYERS):
        print("load it with trust_remote_code=True: the code of its class is in the directory")
    if before is None:
        print("no texts were given to compare on; pass some, or --input_file")


def export(options: Namespace) -> None:
    """Base and adapter in another format: a graph, how far it is from torch, and what int8 costs."""
    from hf_lora.cli.tables import print_table
    from hf_lora.serving.export import export_onnx, probes
    from hf_lora.tasks.mistakes import measurer

    if options.format != ONNX:
        unused = [name for name in ("int8", "test_file", "dataset_name") if getattr(options, name)]
        if unused:
            raise ValueError(
                f"--{unused[0]} does nothing in this format; got --format {options.format}; expected --format {ONNX}"
            )
        _merge(options, options.format, lambda classifier: probes(classifier.info))
        return
    classifier = classifier_of(options, precision="fp32", device="cpu")
    # Before the work, so that a mistake in the file is told at once.
    named = options.test_file or options.dataset_name
    given = labelled_data(options, classifier.info, classifier.tokenizer) if named else None
    done = export_onnx(classifier, options.output_dir, int8=options.int8, texts=given and given.texts)
    metrics = {}
    if given:
        info = classifier.info
        measure = measurer(info.task, info.labels, info.calibration)
        metrics = {name: measure(part.numpy(), given.references) for name, part in done.logits.items()}
    count = len(done.logits["torch"])
    if options.json:
        report = {
            "output_dir": str(done.directory),
            "inputs": list(done.inputs),
            "files": {name: asdict(entry) for name, entry in done.files.items()},
            "texts": count,
            "metrics": metrics,
        }
        print(json.dumps(report))
        return
    rows = [
        (
            name,
            f"{entry.bytes / 1e6:.1f}",
            f"{entry.largest_logit_difference:.2g}",
            probability if probability is None else f"{probability:.2g}",
            entry.changed_labels,
        )
        for name, entry in done.files.items()
        for probability in [entry.largest_probability_difference]
    ]
    columns = ("file", "MB", "difference of a logit", "of a probability", "labels changed")
    texts = f"{count} texts of the data" if given else f"{count} probe texts"
    print_table(f"{done.directory}: largest differences from torch on {texts}", columns, rows)
    print(f"inputs: {', '.join(done.inputs)}")
    if metrics:
        measured = [(name, *(metrics[file].get(name) for file in metrics)) for name in metrics["torch"]]
        print_table("measured on them", ("metric", *metrics), measured)
    elif options.int8:
        print("no labelled data was given to measure the loss of int8 on; pass --test_file")


def push(options: Namespace) -> None:
    """Push an adapter directory to the Hub; print its files and the commit's URL."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    from hf_lora._text import printable
    from hf_lora.adapters.hub import checked_contents, commit_page, push_contents
    from hf_lora.cli.tables import print_table

    disable_progress_bars()
    contents = checked_contents(options.adapter)
    sizes = {path: len(content) for path, content in contents.items()}
    commit = push_contents(
        contents,
        options.repo_id,
        private=options.private,
        revision=options.revision,
        create_pr=options.create_pr,
        commit_message=options.commit_message,
    )
    repo_id, url = commit.repo_url.repo_id, commit_page(commit)
    if options.json:
        report = {
            "repo_id": repo_id,
            "revision": options.revision or constants.DEFAULT_REVISION,
            "url": url,
            "commit": commit.oid,
            "pull_request": commit.pr_url,
            "files": sizes,
        }
        print(json.dumps(report))
        return
    print_table(f"pushed to {repo_id}", ("file", "bytes"), list(sizes.items()))
    print(printable(url))
