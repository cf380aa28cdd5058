"""What a user says about the data, validated once. Imports nothing heavy: the command line's help is made of it."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field

from hf_lora._choices import option

DEFAULT_SEED = 42


@dataclass(frozen=True)
class DataConfig:
    """Where the data is, which columns it has, and how it is split and cut.

    Data in memory is not named here: `prepare_data` takes it as `tables`.
    Raises ValueError: a value is out of range, or fields contradict each other.
    """

    dataset_name: str | None = option(None, help="Data set: a Hub id.")
    dataset_config_name: str | None = option(None, help="Configuration of the Hub data set.")
    dataset_revision: str | None = option(None, help="Branch, tag or commit of the Hub data set.")
    train_file: str | None = option(
        None,
        help="Training data: CSV, TSV, JSON lines, Parquet, a save_to_disk folder, or a folder with one "
        "sub-folder of text files for each label.",
    )
    validation_file: str | None = option(
        None, help="Validation data; default: a part held out from training."
    )
    test_file: str | None = option(None, help="Test data.")
    text_column: str | None = option(None, help="Column of the text; default: guessed from the usual names.")
    text_pair_column: str | None = option(None, help="Column of the second text of a pair.")
    label_column: str | None = option(
        None, help="Column of the label; default: guessed from the usual names."
    )
    problem_type: str | None = option(
        None,
        help="single_label_classification, multi_label_classification or regression; default: from the labels "
        "(numbers with a decimal point are a regression, lists are multi-label).",
    )
    max_length: int = option(
        128,
        help="Longer texts are cut to this many tokens; the number cut is reported.",
        flag="max_seq_length",
    )
    validation_fraction: float | None = option(
        None,
        help="Share of the training data held out when none is given; default: a fifth of up to 1,000 examples, then "
        "200 examples, but at least a tenth and one example of each label.",
    )
    seed: int | None = option(
        None,
        help="Seed of the held-out part, of few_shot and of max_train_samples; default: the seed of the run.",
        flag="split_seed",
    )
    encoding: str = option("utf-8", help="Character encoding of the files.")
    few_shot: int | None = option(
        None,
        help="Use only this many training examples of each label, drawn with the split's seed. The validation part "
        "is held out of these; a validation file that is given stays whole, and so do the test data.",
    )
    max_train_samples: int | None = option(None, help="Use only this many training examples.")
    max_eval_samples: int | None = option(None, help="Use only this many validation examples.")
    max_test_samples: int | None = option(None, help="Use only this many test examples.")
    cache_dir: str | None = option(
        None, help="Where downloads are kept; default: the Hub's own cache.", flag=""
    )
    token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "Hub token; default: the one `hf auth login` stored.", "flag": ""},
    )

    @property
    def split_seed(self) -> int:
        """The seed of every draw from the data; outside of a run 42, as in transformers."""
        return DEFAULT_SEED if self.seed is None else self.seed

    def __post_init__(self) -> None:
        self._check_names()
        self._check_values()

    def _check_names(self) -> None:
        if self.dataset_name and self.train_file:
            raise ValueError(
                f"two training sets: {self.dataset_name!r} and {self.train_file!r}; expected one"
            )
        for name in ("dataset_config_name", "dataset_revision"):
            if getattr(self, name) and not self.dataset_name:
                raise ValueError(f"{name} needs a dataset_name; got {getattr(self, name)!r}")
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
        if self.problem_type is not None:
            # Imported here, since it takes a second.
            from hf_lora.tasks import TASKS

            if self.problem_type not in TASKS:
                raise ValueError(
                    f"unknown problem_type {self.problem_type!r}; expected one of {', '.join(TASKS)}"
                )
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(f"unknown encoding {self.encoding!r}; try utf-8, latin-1 or cp1252") from None
