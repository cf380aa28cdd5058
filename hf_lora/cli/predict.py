"""`hf-lora evaluate` and `hf-lora predict`: metrics on labelled texts, and labels for texts."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lora._text import json_line, shortened
from hf_lora.cli.shared import (
    INPUT,
    LABELLED,
    SPEED,
    Labelled,
    adapters_of,
    add_adapters,
    add_command,
    add_options,
    bank_of,
    classifier_of,
    evaluated,
    judged,
    labelled_data,
    text_columns,
)

if TYPE_CHECKING:
    from hf_lora.adapters.info import AdapterInfo
    from hf_lora.bank.bank import AdapterBank
    from hf_lora.data import ClassificationData
    from hf_lora.serving.encoding import Text
    from hf_lora.tasks.mistakes import Evaluation


def register(commands: Any) -> None:
    """Add the commands."""
    words = "measure adapters, and the encoder without them, on labelled texts"
    parser = add_command(commands, evaluate, words)
    add_adapters(parser)
    add_options(parser, *LABELLED, *SPEED, "json")

    parser = add_command(commands, predict, "classify texts")
    add_adapters(parser)
    add_options(parser, *INPUT, *SPEED)
    parser.add_argument(
        "texts",
        nargs="*",
        metavar="TEXT",
        help="texts, for an adapter of pairs two for each (default: those of --input_file); behind --adapter a word "
        "is a text unless it is an adapter directory or, without spaces, has a slash",
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
    """Metrics and errors by class, with the adapter and for the encoder without it; of several only the metrics."""
    from hf_lora.cli.tables import print_class_errors, print_table

    if adapters := adapters_of(options):
        _evaluate_several(options, bank_of(options, adapters))
        return
    classifier, data, results = evaluated(options)
    print(classifier.setting, file=sys.stderr)
    if options.json:
        print(json_line(_report(str(options.adapter), data, results)))
        return
    rows = [(name, value, results.metrics_disabled.get(name)) for name, value in results.metrics.items()]
    print_table(f"{results.examples} examples", ("metric", "with adapter", "encoder without adapter"), rows)
    if results.confusion:
        print_class_errors(results.classes, "in the output of --json")


def _evaluate_several(options: Namespace, bank: AdapterBank) -> None:
    """The metrics of every adapter in a row, with it and for the encoder without it."""
    from torch import stack

    from hf_lora.cli.tables import print_table

    # Before anything is computed, so that a mistake in the file is told at once.
    given = _labelled(options, bank)
    print(bank.setting, file=sys.stderr)
    reports = []
    for name, info in bank.adapters.items():
        texts, size = given[name].texts, options.batch_size
        logits = [stack(bank.logits(texts, name, batch_size=size, enabled=on)) for on in (True, False)]
        reports.append(_report(name, given[name].data, judged(info, given[name], *logits)))
    if options.json:
        print(json_line(reports))
        return
    # More than two do not fit on a terminal.
    shown = dict.fromkeys(metric for report in reports for metric in list(report["metrics"])[:2])
    sides = {"metrics": "", "metrics_disabled": " without adapter"}
    columns = [f"{metric}{words}" for metric in shown for words in sides.values()]
    rows = [
        (
            report["adapter"],
            report["examples"],
            *(report[side].get(metric) for metric in shown for side in sides),
        )
        for report in reports
    ]
    print_table(f"{len(reports)} adapters", ("adapter", "examples", *columns), rows)
    print("all metrics, and the errors by class, are in the output of --json")


def _labelled(options: Namespace, bank: AdapterBank) -> dict[str, Labelled]:
    """The labelled texts for every adapter, prepared once for those that need the same."""
    prepared: dict[Any, Labelled] = {}
    given = {}
    for name, info in bank.adapters.items():
        where = (info.text_columns, info.max_length, info.label_columns, info.label_layout)
        needed = (info.labels, info.problem_type, *where)
        try:
            given[name] = prepared.get(needed) or labelled_data(options, info, bank.tokenizer)
        except ValueError as error:
            raise ValueError(f"for the adapter {name!r}: {error}") from error
        prepared[needed] = given[name]
    return given


def _report(adapter: str, data: ClassificationData, results: Evaluation) -> dict[str, Any]:
    report: dict[str, Any] = {
        "adapter": adapter,
        "examples": results.examples,
        "truncated": data.report.truncated["test"],
        "metrics": results.metrics,
        "metrics_disabled": results.metrics_disabled,
    }
    return {**report, "classes": results.classes} if results.confusion else report


def predict(options: Namespace) -> None:
    """The prediction for each text, in order, while the texts are being read: a line of JSON, or a row of a file."""
    from tqdm import tqdm

    from hf_lora.serving.answers import format_of, write_answers, write_lines

    if options.output_file is not None:
        format_of(options.output_file)  # before anything is loaded
    answer, info, setting = _opened(options)
    infos = list(info.values()) if isinstance(info, Mapping) else [info]
    texts = texts_of(options, next((own for own in infos if own.text_columns), infos[0]))
    if options.output_file is None:
        write_lines(_told(answer(texts, batch_size=options.batch_size), setting), {}, sys.stdout)
        return
    texts = tqdm(texts, unit=" texts", disable=None)
    write_answers(options.output_file, _told(answer(texts, batch_size=options.batch_size), setting), info)


def _opened(
    options: Namespace,
) -> tuple[Callable[..., Iterator[dict[str, Any]]], AdapterInfo | Mapping[str, AdapterInfo], str]:
    """What answers a stream of texts, what is known of its adapter, or of each by name, and how it runs."""
    _take_texts(options)
    adapters = adapters_of(options, "; if it is a text, put it in front of --adapter")
    if not adapters:
        classifier = classifier_of(options, precision=options.precision)
        return classifier.predict_stream, classifier.info, classifier.setting
    _check_columns(adapters)
    bank = bank_of(options, adapters)
    return partial(bank.predict_stream, adapter="*"), bank.adapters, bank.setting


def _take_texts(options: Namespace) -> None:
    """Move the texts that stand behind an adapter to the others."""
    from hf_lora.bank.names import may_be_adapter

    for group in options.adapter or ():
        count = 1 + len(list(takewhile(may_be_adapter, group[1:])))
        options.texts += group[count:]
        del group[count:]
    if options.texts and options.input_file is not None:
        raise ValueError(
            f"texts and a file cannot be given together; got {shortened(options.texts[0])} and --input_file "
            f"{options.input_file!r}; expected one of the two"
        )


def _check_columns(adapters: Mapping[str, Path]) -> None:
    """Raise ValueError for adapters of single texts beside adapters of pairs, before any of them is loaded."""
    from hf_lora.adapters.info import read_info

    kinds: dict[int, str] = {}
    for name, directory in adapters.items():
        info = read_info(directory)
        if info is not None and info.text_columns:
            kinds.setdefault(len(info.text_columns), name)
    if len(kinds) > 1:
        raise ValueError(
            f"adapters of single texts and of pairs cannot answer the same texts; got {kinds[1]!r} for single texts "
            f"and {kinds[2]!r} for pairs; expected one kind"
        )


def texts_of(options: Namespace, info: AdapterInfo) -> Iterator[Text]:
    """The texts of the command line, or else of the file, or else of standard input."""
    from hf_lora.data import iter_texts

    if options.texts:
        yield from _examples(options.texts, info.text_columns)
        return
    text, pair = text_columns(options, info)
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


def _told(answers: Iterable[dict[str, Any]], setting: str) -> Iterator[dict[str, Any]]:
    for number, answer in enumerate(answers):
        if number == 0:
            # After the first text was read: a mistake in the texts is told in one line.
            print(setting, file=sys.stderr)
        yield answer
