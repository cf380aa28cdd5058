"""The classifier and the labelled texts that a subcommand measures on, and what the one says of the other."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from hf_lora.data import ClassificationData, DataConfig, prepare_test
from hf_lora.lora.inject import lora_disabled
from hf_lora.serving.classifier import Text, TextClassifier


def classifier_of(
    options: argparse.Namespace, *, merge: bool = True, precision: str | None, device: str | None = None
) -> TextClassifier:
    """The classifier that the options of a subcommand name."""
    return TextClassifier.from_pretrained(
        options.adapter,
        revision=options.revision,
        base=options.base,
        check_base=not options.skip_base_check,
        device=device,
        merge=merge,
        precision=precision,
    )


def labelled_data(options: argparse.Namespace, classifier: TextClassifier) -> ClassificationData:
    """The labelled texts that the options name, as the classifier reads texts; its labels in its order."""
    info = classifier.info
    columns = [options.text_column, options.text_pair_column]
    if columns == [None, None] and info.text_columns:
        columns = [*info.text_columns, None][:2]
    config = DataConfig(
        dataset_name=options.dataset_name,
        dataset_config_name=options.dataset_config_name,
        test_file=options.test_file,
        text_column=columns[0],
        text_pair_column=columns[1],
        label_column=options.label_column,
        max_length=info.max_length or min(DataConfig.max_length, classifier.tokenizer.model_max_length),
        encoding=options.encoding,
        max_test_samples=options.max_test_samples,
    )
    return prepare_test(config, classifier.tokenizer, info.labels, info.problem_type)


def texts_of(data: ClassificationData) -> list[Text]:
    """The texts, or pairs of texts, of the test split."""
    rows = zip(*(data.texts["test"][name] for name in data.text_columns), strict=True)
    return [row[0] if len(row) == 1 else row for row in rows]


def references_of(data: ClassificationData) -> np.ndarray:
    """The labels of the test split: class ids, rows of 0 and 1, or numbers."""
    return data.splits["test"].with_format("numpy")["labels"][:]


def logits_beside(
    classifier: TextClassifier, texts: Sequence[Text], batch_size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The outputs `(texts, labels)` with the adapter, and with it disabled."""
    enabled = classifier.logits(texts, batch_size=batch_size).numpy()
    with lora_disabled(classifier.model):
        return enabled, classifier.logits(texts, batch_size=batch_size).numpy()
