"""`hf-lora evaluate` and `hf-lora predict`: metrics on labelled texts, and labels for texts."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hf_lora._text import json_line
from hf_lora.cli.shared import (
    CLASSIFIER,
    INPUT,
    LABELLED,
    SPEED,
    add_command,
    classifier_of,
    evaluated,
    text_columns,
)

if TYPE_CHECKING:
    from hf_lora.serving.classifier import TextClassifier
    from hf_lora.serving.encoding import Text


def register(commands: Any) -> None:
    """Add the commands."""
    words = "measure an adapter, and the encoder without it, on labelled texts"
    add_command(commands, evaluate, words, *CLASSIFIER, *LABELLED, *SPEED, "json")
    parser = add_command(commands, predict, "classify texts", *CLASSIFIER, *INPUT, *SPEED)
    parser.add_argument(
        "texts",
        nargs="*",
        metavar="TEXT",
        help="texts, for an adapter of pairs two for each (default: those of --input_file)",
    )
    parser.add_argument(
        "--input_file",
        help="txt (one text a line), csv, tsv, jsonl, parquet or xlsx, of any size (default: standard input)",
    )
    parser.add_argument(
        "--output_file",
        help="csv, tsv, jsonl, json, parquet or xlsx file to write (default: JSON lines on standard output)",
    )


def evaluate(options: Namespace) -> None:
    """Metrics and errors by class, with the adapter and for the encoder without it."""
    from hf_lora.cli.tables import print_class_errors, print_table

    classifier, data, results = evaluated(options)
    print(classifier.setting, file=sys.stderr)
    report: dict[str, Any] = {
        "adapter": str(options.adapter),
        "examples": results.examples,
        "truncated": data.report.truncated["test"],
        "metrics": results.metrics,
        "metrics_disabled": results.metrics_disabled,
    }
    if results.confusion:
        report["classes"] = results.classes
    if options.json:
        print(json_line(report))
        return
    rows = [(name, value, results.metrics_disabled.get(name)) for name, value in results.metrics.items()]
    print_table(f"{results.examples} examples", ("metric", "with adapter", "encoder without adapter"), rows)
    if results.confusion:
        print_class_errors(results.classes, "in the output of --json")


def predict(options: Namespace) -> None:
    """The prediction for each text, in order, while the texts are being read: a line of JSON, or a row of a file."""
    from tqdm import tqdm

    from hf_lora.serving.answers import format_of, write_answers, write_lines

    if options.output_file is not None:
        format_of(options.output_file)  # before anything is loaded
    classifier = classifier_of(options, precision=options.precision)
    texts = texts_of(options, classifier)
    if options.output_file is None:
        write_lines(_answers(classifier, texts, options.batch_size), (), sys.stdout)
        return
    texts = tqdm(texts, unit=" texts", disable=None)
    write_answers(options.output_file, _answers(classifier, texts, options.batch_size), classifier.info)


def texts_of(options: Namespace, classifier: TextClassifier) -> Iterator[Text]:
    """The texts of the command line, or else of the file, or else of standard input."""
    from hf_lora.data import iter_texts

    if options.texts:
        yield from _examples(options.texts, classifier.info.text_columns)
        return
    text, pair = text_columns(options, classifier.info)
    source = options.input_file or sys.stdin
    reading = {name: getattr(options, name) for name in ("encoding", "delimiter", "quoting")}
    for row in iter_texts(source, text_column=text, text_pair_column=pair, **reading):
        yield row[0] if len(row) == 1 else row


def _examples(texts: Sequence[str], columns: Sequence[str]) -> Sequence[Text]:
    """Texts of the command line; for an adapter of pairs the first and second of each in turn."""
    if len(columns) != 2:
        return texts
    if len(texts) % 2:
        raise ValueError(
            f"the adapter was trained on pairs ({', '.join(columns)}); got {len(texts)} texts; expected two for each"
        )
    return list(zip(texts[::2], texts[1::2], strict=True))


def _answers(
    classifier: TextClassifier, texts: Iterable[Text], batch_size: int | None
) -> Iterator[dict[str, Any]]:
    for number, answer in enumerate(classifier.predict_stream(texts, batch_size=batch_size)):
        if number == 0:
            # After the first text was read: a mistake in the texts is told in one line.
            print(classifier.setting, file=sys.stderr)
        yield answer
