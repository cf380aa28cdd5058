"""From a DataConfig and a tokenizer to checked, encoded and tokenized splits."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_lora.data.columns import choose_columns, require_column
from hf_lora.data.config import DataConfig
from hf_lora.data.few_shot import few_shot
from hf_lora.data.files import BADLY_ENCODED
from hf_lora.data.report import DataReport
from hf_lora.data.splits import (
    ENCODED,
    SPLIT_NAMES,
    hold_out,
    load_splits,
    subset,
    without_hidden_test,
    without_progress_bars,
)
from hf_lora.tasks import Task, task_of
from hf_lora.tasks.labels import LabelScheme, are_hidden, learn_labels, read_labels

logger = logging.getLogger(__name__)

_LENGTH = "__length__"


@dataclass(frozen=True)
class ClassificationData:
    """Tokenized splits with everything that is known about them.

    `splits` has the tokenizer's outputs and "labels": int64, a list of `len(labels)` float32 for multi-label,
    or float32 for a regression. `texts` has the text and label columns of the same rows in the same order.
    `labels` are names in id order; of a regression the name of its label column. `held_out`: the validation
    split was taken from the training data.
    """

    splits: datasets.DatasetDict
    texts: datasets.DatasetDict
    labels: tuple[str, ...]
    problem_type: str
    text_columns: tuple[str, ...]
    max_length: int
    report: DataReport
    held_out: bool = False

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
    raw = load_splits(config, tables)
    if "train" not in raw:
        raise ValueError("there is no training split; give a train_file or a dataset_name that has one")
    columns = _checked_columns(raw, "train", config, tokenizer)
    asked_for = bool(config.test_file) or "test" in (tables or {})
    raw, warnings = without_hidden_test(raw, columns[-1], asked_for=asked_for)
    scheme = learn_labels(raw["train"], columns[-1], config.problem_type)
    splits = {split: _encode(dataset, columns, scheme, split) for split, dataset in raw.items()}
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
    return _finish(ordered, columns, scheme, config, tokenizer, (*warnings, *more), held_out)


@without_progress_bars()
def prepare_test(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    problem_type: str,
    *,
    tables: Mapping[str, Any] | None = None,
) -> ClassificationData:
    """Prepare the "test" split alone, with the labels of an existing classifier.

    tables: {"test": data in memory}, as `load_splits` takes it.
    Raises ValueError: as `prepare_data`, and for a label that is hidden or that the classifier does not know.
    """
    given = config.problem_type
    if given not in (None, problem_type):
        raise ValueError(f"problem_type is {given!r}; the classifier was trained for {problem_type!r}")
    raw = load_splits(config, tables)
    if "test" not in raw:
        raise ValueError(f"there is no test split; got {', '.join(raw)}; give a test_file")
    columns = _checked_columns(raw, "test", config, tokenizer)
    if "-1" not in labels and are_hidden(raw["test"], columns[-1]):
        raise ValueError("every label of the test split is -1: they are hidden; give a test_file with labels")
    scheme = LabelScheme(task_of(problem_type), tuple(labels))
    splits = {"test": _encode(raw["test"], columns, scheme, "test")}
    return _finish(splits, columns, scheme, config, tokenizer, (), False)


def _checked_columns(
    raw: datasets.DatasetDict, split: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, ...]:
    """The text columns and the label column; raises ValueError where `max_length` does not fit them too."""
    columns = choose_columns(raw[split].column_names, config, f"the {split} split")
    special = tokenizer.num_special_tokens_to_add(pair=len(columns) > 2)
    most, problem = tokenizer.model_max_length, f"max_length is {config.max_length}"
    if config.max_length > most:
        raise ValueError(f"{problem}; the tokenizer's model takes at most {most}")
    if config.max_length <= special:
        raise ValueError(f"{problem}; expected more than the {special} special tokens")
    return columns


def _encode(
    dataset: datasets.Dataset, columns: Sequence[str], scheme: LabelScheme, split: str
) -> datasets.Dataset:
    """Keep the columns that matter, texts as strings, and add the encoded labels."""
    *texts, label = columns
    for name in columns:
        require_column(dataset.column_names, name, f"the {split} split")
    encoded = scheme.task.encode(read_labels(dataset, label), scheme.names, split)
    marks = [name for name in (BADLY_ENCODED,) if name in dataset.column_names]
    # Stratified splits need a ClassLabel.
    feature = datasets.ClassLabel(names=list(scheme.names)) if scheme.task.one_label else scheme.task.feature
    kept = _with_string_texts(dataset.select_columns([*columns, *marks]), texts, split)
    return kept.add_column(ENCODED, encoded, feature=feature)


def _with_string_texts(
    dataset: datasets.Dataset, text_columns: Sequence[str], split: str
) -> datasets.Dataset:
    """Turn nulls into empty texts and numbers into their digits; leave columns of strings as they are."""
    features, changing = dataset.features.copy(), []
    for name in text_columns:
        is_string = getattr(features[name], "dtype", None) in ("string", "large_string")
        if is_string and dataset.data.column(name).null_count == 0:
            continue
        value = next((value for value in dataset[name] if value is not None), "")
        if not isinstance(value, str | int | float):
            held = type(value).__name__
            raise ValueError(f"column {name!r} of the {split} split holds {held} values, not text")
        features[name] = datasets.Value("string")
        changing.append(name)
    if not changing:
        return dataset
    return dataset.map(_stringify, batched=True, fn_kwargs={"columns": changing}, features=features)


def _stringify(batch: dict[str, list[Any]], columns: Sequence[str]) -> dict[str, list[str]]:
    return {name: ["" if value is None else str(value) for value in batch[name]] for name in columns}


def _finish(
    encoded: dict[str, datasets.Dataset],
    columns: tuple[str, ...],
    scheme: LabelScheme,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    warnings: tuple[str, ...],
    held_out: bool,
) -> ClassificationData:
    """Cut the splits to size, tokenize and count them."""
    text_columns, max_length = columns[:-1], config.max_length
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
    texts = {split: part.select_columns(list(columns)) for split, part in kept.items()}
    return ClassificationData(
        datasets.DatasetDict(splits),
        datasets.DatasetDict(texts),
        labels=scheme.names,
        problem_type=scheme.task.name,
        text_columns=text_columns,
        max_length=max_length,
        report=report,
        held_out=held_out,
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
    outputs = dict(tokenizer(*texts, truncation=False, verbose=False))
    lengths = [len(ids) for ids in outputs["input_ids"]]
    long = [row for row, length in enumerate(lengths) if length > max_length]
    if long:
        too_long = ([column[row] for row in long] for column in texts)
        for name, values in tokenizer(*too_long, truncation=True, max_length=max_length).items():
            for row, value in zip(long, values, strict=True):
                outputs[name][row] = value
    return {**outputs, _LENGTH: lengths}
