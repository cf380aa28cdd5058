"""From a DataConfig and a tokenizer to checked, encoded and tokenized splits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_lora.data.collation import fill_empty
from hf_lora.data.columns import Columns, LabelLayout, choose_columns, require_column, with_string_texts
from hf_lora.data.config import MAX_TEXT, DataConfig
from hf_lora.data.few_shot import few_shot
from hf_lora.data.files import BADLY_ENCODED
from hf_lora.data.report import DataReport
from hf_lora.data.splits import (
    ENCODED,
    SPLIT_NAMES,
    hold_out,
    read_splits,
    subset,
    without_hidden_test,
    without_progress_bars,
)
from hf_lora.tasks import MULTI, Task, task_of
from hf_lora.tasks.labels import LabelScheme, are_hidden, learn_labels, read_labels

logger = logging.getLogger(__name__)

_LENGTH = "__length__"


@dataclass(frozen=True)
class ClassificationData:
    """Tokenized splits with everything that is known about them.

    `splits` has the tokenizer's outputs and "labels": int64, a list of `len(labels)` float32 for multi-label,
    or float32 for a regression. `texts` has the text and label columns of the same rows in the same order.
    `labels` are names in id order; of a regression the name of its label column. `held_out`: the validation
    split was taken from the training data. `label_columns` and `label_layout`: where and how the labels stand, the
    latter of `columns.LAYOUTS`. `why`: what decided on the problem type. `files`: how each file was understood.
    """

    splits: datasets.DatasetDict
    texts: datasets.DatasetDict
    labels: tuple[str, ...]
    problem_type: str
    text_columns: tuple[str, ...]
    max_length: int
    report: DataReport
    held_out: bool = False
    label_columns: tuple[str, ...] = ()
    label_layout: str = "values"
    why: str = ""
    files: tuple[str, ...] = ()

    @property
    def task(self) -> Task:
        """What the problem type means: losses, decisions, metrics."""
        return task_of(self.problem_type)


@without_progress_bars()
def prepare_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tables: Mapping[str, Any] | None = None,
    test_seed: int | None = None,
) -> ClassificationData:
    """Load, check, label, split and tokenize the data of a training run.

    Label names come from the training split alone. Without a validation split one is held out, stratified by
    label for single-label problems. A test split whose labels are all hidden (-1) is left out with a warning.

    tables: data in memory by split, as `load_splits` takes them.
    test_seed: where there is neither a validation nor a test split, a test split is held out first, with this seed.
        Runs with other training data then share one test split.
    Raises ValueError: a mistake in the files, columns, labels or sizes; one line that says where.
    """
    raw, told = read_splits(config, tables)
    if "train" not in raw:
        raise ValueError("there is no training split; give a train_file or a dataset_name that has one")
    columns = _checked_columns(raw, "train", config, tokenizer)
    asked_for = bool(config.test_file) or "test" in (tables or {})
    raw, warnings = without_hidden_test(raw, columns.labels[0], asked_for=asked_for)
    layout = LabelLayout.of(raw["train"], columns.labels, config.problem_type, "train")
    raw["train"] = layout.applied(raw["train"], "train")
    several = MULTI if layout.words else None
    scheme = learn_labels(raw["train"], layout.column, config.problem_type or several)
    scheme = scheme.because(layout.words)
    for split in raw.keys() - {"train"}:
        raw[split] = layout.applied(raw[split], split, scheme.names)
    splits = {split: _encode(dataset, columns.texts, layout, scheme, split) for split, dataset in raw.items()}
    warnings += scheme.warnings
    if test_seed is not None and not {"validation", "test"} & set(splits):
        train, test, _ = hold_out(splits["train"], scheme, replace(config, seed=test_seed))
        splits = {"train": train, "test": test}
        warnings += (f"test: there is no such split; {len(test):,} examples of train are held out as one",)
    held_out = "validation" not in splits
    more: tuple[str, ...] = ()
    if config.few_shot is not None:
        splits, more = few_shot(splits, scheme, config)
    elif held_out:
        splits["train"], splits["validation"], more = hold_out(splits["train"], scheme, config)
    ordered = {split: splits[split] for split in SPLIT_NAMES if split in splits}
    data = _finish(ordered, columns.texts, layout, scheme, config, tokenizer, (*warnings, *more))
    for words in (*told, f"{data.task.words}: {data.why}"):
        logger.info(words)
    return replace(data, held_out=held_out, files=told)


@without_progress_bars()
def prepare_test(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    problem_type: str,
    *,
    tables: Mapping[str, Any] | None = None,
    label_columns: Sequence[str] = (),
    label_layout: str | None = None,
) -> ClassificationData:
    """Prepare the "test" split alone, with the labels of an existing classifier.

    tables: {"test": data in memory}, as `load_splits` takes it.
    label_columns, label_layout: where and how the labels stood in training; another column can be named in `config`.
    Raises ValueError: as `prepare_data`, and for a label that is hidden or that the classifier does not know.
    """
    given = config.problem_type
    if given not in (None, problem_type):
        raise ValueError(f"problem_type is {given!r}; the classifier was trained for {problem_type!r}")
    raw, told = read_splits(config, tables)
    if "test" not in raw:
        raise ValueError(f"there is no test split; got {', '.join(raw)}; give a test_file")
    columns = _checked_columns(raw, "test", config, tokenizer, label_columns)
    if "-1" not in labels and are_hidden(raw["test"], columns.labels[0]):
        raise ValueError("every label of the test split is -1: they are hidden; give a test_file with labels")
    layout = LabelLayout.of(raw["test"], columns.labels, problem_type, "test", labels, label_layout)
    scheme = LabelScheme(task_of(problem_type), tuple(labels))
    test = layout.applied(raw["test"], "test", labels)
    splits = {"test": _encode(test, columns.texts, layout, scheme, "test")}
    data = _finish(splits, columns.texts, layout, scheme, config, tokenizer, ())
    return replace(data, files=told)


def _checked_columns(
    raw: datasets.DatasetDict,
    split: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    usual: Sequence[str] = (),
) -> Columns:
    """The columns of the text and of the label; raises ValueError where `max_length` does not fit them too."""
    columns = choose_columns(raw[split].column_names, config, f"the {split} split", usual)
    special = tokenizer.num_special_tokens_to_add(pair=len(columns.texts) > 1)
    most, problem = tokenizer.model_max_length, f"max_length is {config.max_length}"
    if config.max_length > most:
        raise ValueError(f"{problem}; the tokenizer's model takes at most {most}")
    if config.max_length <= special:
        raise ValueError(f"{problem}; expected more than the {special} special tokens")
    return columns


def _encode(
    dataset: datasets.Dataset, texts: Sequence[str], layout: LabelLayout, scheme: LabelScheme, split: str
) -> datasets.Dataset:
    """Keep the columns that matter, texts as strings, and add the encoded labels."""
    for name in (*texts, layout.column):
        require_column(dataset.column_names, name, f"the {split} split")
    encoded = scheme.task.encode(read_labels(dataset, layout.column), scheme.names, split)
    marks = [name for name in (BADLY_ENCODED,) if name in dataset.column_names]
    # Stratified splits need a ClassLabel.
    feature = datasets.ClassLabel(names=list(scheme.names)) if scheme.task.one_label else scheme.task.feature
    kept = with_string_texts(dataset.select_columns([*texts, layout.column, *marks]), texts, split)
    return kept.add_column(ENCODED, encoded, feature=feature)


def _finish(
    encoded: dict[str, datasets.Dataset],
    text_columns: tuple[str, ...],
    layout: LabelLayout,
    scheme: LabelScheme,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    warnings: tuple[str, ...],
) -> ClassificationData:
    """Cut the splits to size, tokenize and count them."""
    max_length = config.max_length
    kept = {split: subset(dataset, split, config) for split, dataset in encoded.items()}
    tokenized = {
        split: _tokenize(dataset, text_columns, tokenizer, max_length) for split, dataset in kept.items()
    }
    lengths = {split: np.asarray(dataset[_LENGTH][:]) for split, dataset in tokenized.items()}
    label_counts = {split: scheme.count(dataset[ENCODED][:]) for split, dataset in kept.items()}
    report = DataReport.of(kept, text_columns, lengths, max_length, label_counts, warnings)
    for warning in report.warnings:
        logger.warning(warning)
    splits = {
        split: dataset.remove_columns(_LENGTH)
        .cast_column(ENCODED, scheme.task.feature)
        .rename_column(ENCODED, "labels")
        for split, dataset in tokenized.items()
    }
    texts = {split: part.select_columns([*text_columns, layout.column]) for split, part in kept.items()}
    return ClassificationData(
        datasets.DatasetDict(splits),
        datasets.DatasetDict(texts),
        labels=scheme.names,
        problem_type=scheme.task.name,
        text_columns=text_columns,
        max_length=max_length,
        report=report,
        label_columns=layout.columns,
        label_layout=layout.form,
        why=scheme.why,
    )


def _tokenize(
    dataset: datasets.Dataset,
    text_columns: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> datasets.Dataset:
    # The last call's truncation is part of a fast tokenizer, and so of the key that `map` caches under.
    tokenizer("", truncation=False)
    return dataset.map(
        _tokenize_batch,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, "text_columns": text_columns, "max_length": max_length},
        remove_columns=[name for name in dataset.column_names if name != ENCODED],
    )


def _tokenize_batch(
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    text_columns: Sequence[str],
    max_length: int,
) -> dict[str, list[Any]]:
    """Return the tokenizer's outputs, cut to `max_length`, and the length that each example had before.

    Only examples that are too long are tokenized again, by the tokenizer: it knows how to cut a pair.
    """
    texts = [batch[name] for name in text_columns]
    outputs: dict[str, list[Any]] = {}
    for part in _parts([sum(map(len, row)) for row in zip(*texts, strict=True)]):
        for name, values in tokenizer(
            *(column[part] for column in texts), truncation=False, verbose=False
        ).items():
            outputs.setdefault(name, []).extend(values)
    fill_empty(tokenizer, outputs)
    lengths = [len(ids) for ids in outputs["input_ids"]]
    long = [row for row, length in enumerate(lengths) if length > max_length]
    if long:
        too_long = ([column[row] for row in long] for column in texts)
        for name, values in tokenizer(*too_long, truncation=True, max_length=max_length).items():
            for row, value in zip(long, values, strict=True):
                outputs[name][row] = value
    return {**outputs, _LENGTH: lengths}


def _parts(sizes: Sequence[int]) -> Iterator[slice]:
    """Slices of rows that have up to MAX_TEXT characters together, or one row: what is tokenized at once."""
    begin = total = 0
    for row, size in enumerate(sizes):
        total += size
        if row > begin and total > MAX_TEXT:
            yield slice(begin, row)
            begin, total = row, size
    yield slice(begin, len(sizes))
