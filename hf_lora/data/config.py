"""What a user says about the data, validated once. Imports nothing heavy: the command line's help is made of it."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hf_lora._choices import Keywords, option, unknown

DEFAULT_SEED = 42
MAX_TEXT = 1_000_000
"""Characters of the longest text that is taken: tokenizing takes about 150 bytes of memory for each."""
QUOTINGS = ("double", "none")


class Reading(NamedTuple):
    """How text files are read. delimiter, quoting: None: by the suffix of the file."""

    encoding: str = "utf-8"
    delimiter: str | None = None
    quoting: str | None = None

    @classmethod
    def of(cls, encoding: str, delimiter: str | None = None, quoting: str | None = None) -> Reading:
        """Checked values; "tab" is the tab. Raises ValueError for one that is not usable."""
        delimiter = "\t" if delimiter in ("tab", "\\t") else delimiter
        if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n\0'):
            raise ValueError(f"delimiter is {delimiter!r}; expected one character, such as ';', or tab")
        if quoting not in (None, *QUOTINGS):
            raise unknown("quoting", quoting, QUOTINGS)
        codec_for(encoding)
        return cls(encoding, delimiter, quoting)

    @property
    def codec(self) -> str:
        """What decodes the file, without a byte order mark."""
        return codec_for(self.encoding)


def separator_name(mark: str) -> str:
    """A separator, for people."""
    return {"\t": "tab"}.get(mark, repr(mark))


@dataclass(frozen=True)
class DataConfig(Keywords):
    """Where the data is, which columns it has, and how it is split and cut.

    Data in memory is not named here: `prepare_data` takes it as `tables`.
    Raises ValueError: a value is out of range, or fields contradict each other.
    """

    dataset_name: str | None = option(None, help="Data set: a Hub id.")
    dataset_config_name: str | None = option(None, help="Configuration of the Hub data set.")
    dataset_revision: str | None = option(None, help="Branch, tag or commit of the Hub data set.")
    train_file: str | None = option(
        None,
        help="Training data: CSV, TSV, JSON lines, Parquet, Excel, a save_to_disk folder, or a folder with one "
        "sub-folder of text files for each label.",
    )
    validation_file: str | None = option(
        None, help="Validation data; default: a part held out from training."
    )
    test_file: str | None = option(None, help="Test data.")
    text_column: str | None = option(None, help="Column of the text; default: guessed from the usual names.")
    text_pair_column: str | None = option(None, help="Column of the second text of a pair.")
    label_column: str | tuple[str, ...] | None = option(
        None,
        help="Column of the label; several: one of 0 and 1 for each label of a multi-label problem; default: guessed "
        "from the usual names.",
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
    delimiter: str | None = option(
        None, help="What separates the fields of CSV and TSV files, such as ';' or tab; default: ',' and tab."
    )
    quoting: str | None = option(
        None,
        help="Double quotes in CSV and TSV files: double (they surround a text that holds separators) or none (they "
        "are text); default: double, but none where tabs separate.",
    )
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
    def label_columns(self) -> tuple[str, ...]:
        """The columns of the labels that are named: none, one, or one for each label."""
        given = self.label_column or ()
        return (given,) if isinstance(given, str) else given

    @property
    def reading(self) -> Reading:
        """How the text files are read."""
        return Reading.of(self.encoding, self.delimiter, self.quoting)

    @property
    def split_seed(self) -> int:
        """The seed of every draw from the data; outside of a run 42, as in transformers."""
        return DEFAULT_SEED if self.seed is None else self.seed

    def __post_init__(self) -> None:
        def refuse(mistake: object, message: str) -> None:
            if mistake:
                raise ValueError(message)

        train, few_shot, fraction = self.train_file, self.few_shot, self.validation_fraction
        text, pair, limit = self.text_column, self.text_pair_column, self.max_train_samples
        both = self.dataset_name and train
        refuse(both, f"two training sets: {self.dataset_name!r} and {train!r}; expected one")
        for name in ("dataset_config_name", "dataset_revision"):
            value = getattr(self, name)
            refuse(value and not self.dataset_name, f"{name} needs a dataset_name; got {value!r}")
        refuse(pair and not text, f"text_pair_column needs a text_column; got {pair!r} alone")
        if isinstance(self.label_column, Sequence) and not isinstance(self.label_column, str):
            one = len(self.label_column) == 1
            object.__setattr__(
                self, "label_column", self.label_column[0] if one else tuple(self.label_column)
            )
        named = [name for name in (text, pair, *self.label_columns) if name]
        twice = len(set(named)) < len(named)
        refuse(twice, f"one column has two roles; got text, pair and label columns {', '.join(named)}")
        for name in ("max_length", "few_shot", "max_train_samples", "max_eval_samples", "max_test_samples"):
            value = getattr(self, name)
            refuse(value is not None and value < 1, f"{name} is {value}; expected 1 or more")
        refuse(
            few_shot is not None and limit is not None,
            "few_shot and max_train_samples both cut the training data; "
            f"got {few_shot} and {limit}; expected one of the two",
        )
        usable = fraction is None or 0 < fraction < 1
        refuse(not usable, f"validation_fraction is {fraction}; expected a number between 0 and 1")
        if self.problem_type is not None:
            # Imported here, since it takes a second.
            from hf_lora.tasks import TASKS

            if self.problem_type not in TASKS:
                raise unknown("problem_type", self.problem_type, TASKS)
            several = len(self.label_columns) > 1 and self.problem_type != "multi_label_classification"
            refuse(
                several,
                f"several label columns are for multi_label_classification; got {self.problem_type!r}",
            )
        Reading.of(self.encoding, self.delimiter, self.quoting)


def codec_for(encoding: str) -> str:
    """The codec that also skips the byte order mark that spreadsheets write in front of UTF-8.

    Raises ValueError: the encoding is unknown.
    """
    try:
        name = codecs.lookup(encoding).name
    except LookupError:
        raise ValueError(f"unknown encoding {encoding!r}; try utf-8, latin-1 or cp1252") from None
    return "utf-8-sig" if name == "utf-8" else encoding
