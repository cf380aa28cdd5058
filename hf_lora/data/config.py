"""What a user says about the data, validated once."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field

from hf_lora.tasks.labels import PROBLEM_TYPES


@dataclass(frozen=True)
class DataConfig:
    """Where the data is, which columns it has, and how it is split and cut.

    `train_file`, `validation_file` and `test_file` each take a .csv, .tsv, .json, .jsonl or .parquet file, a
    `save_to_disk` folder, or a folder with one sub-folder of .txt files per label; `dataset_name` is a Hub
    id. Columns that are None are guessed from their usual names, and a problem type of None from the labels:
    floats are a regression, lists multi-label. `max_length` is in tokens; `validation_fraction` of the training
    split (None: by `hf_lora.data.splits.held_out_fraction`) is held out when there is no validation split.
    `few_shot` examples of each label, drawn with the seed, are all that is used of the training split; what is held
    out is then held out of these.

    Raises:
        ValueError: a value is out of range, or fields contradict each other.
    """

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    problem_type: str | None = None
    max_length: int = 128
    validation_fraction: float | None = None
    encoding: str = "utf-8"
    few_shot: int | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    max_test_samples: int | None = None
    seed: int = 42
    cache_dir: str | None = None
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._check_source()
        self._check_columns()
        self._check_values()

    def _check_source(self) -> None:
        if not (self.dataset_name or self.train_file or self.test_file):
            raise ValueError("no data given; expected a dataset_name, a train_file or a test_file")
        if self.dataset_name and self.train_file:
            raise ValueError(
                f"two training sets: {self.dataset_name!r} and {self.train_file!r}; expected one"
            )
        for name in ("dataset_config_name", "dataset_revision"):
            if getattr(self, name) and not self.dataset_name:
                raise ValueError(f"{name} needs a dataset_name; got {getattr(self, name)!r}")

    def _check_columns(self) -> None:
        if self.text_pair_column and not self.text_column:
            raise ValueError(f"text_pair_column needs a text_column; got {self.text_pair_column!r} alone")
        named = [name for name in (self.text_column, self.text_pair_column, self.label_column) if name]
        if len(set(named)) < len(named):
            raise ValueError(f"one column has two roles; got text, pair and label columns {', '.join(named)}")

    def _check_values(self) -> None:
        for name in ("max_length", "few_shot", "max_train_samples", "max_eval_samples", "max_test_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more")
        if self.few_shot is not None and self.max_train_samples is not None:
            raise ValueError(
                f"few_shot and max_train_samples both cut the training data; got {self.few_shot} and "
                f"{self.max_train_samples}; expected one of the two"
            )
        if self.validation_fraction is not None and not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction is {self.validation_fraction}; expected a number between 0 and 1"
            )
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(
                f"unknown problem_type {self.problem_type!r}; expected one of {', '.join(PROBLEM_TYPES)}"
            )
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(f"unknown encoding {self.encoding!r}; try utf-8, latin-1 or cp1252") from None
