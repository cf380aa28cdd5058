"""What several commands share: options, and the classifier and labelled data that they name.

Light, so that `--help` is quick: heavy modules are imported inside the functions that need them.
"""

from __future__ import annotations

from argparse import Action, ArgumentError, ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from hf_lora._choices import nearest
from hf_lora.data.config import QUOTINGS

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from hf_lora.adapters.info import AdapterInfo
    from hf_lora.bank.bank import AdapterBank
    from hf_lora.data import ClassificationData
    from hf_lora.serving.classifier import TextClassifier
    from hf_lora.serving.encoding import Text
    from hf_lora.tasks.mistakes import Evaluation

_TRUE = "store_true"
# The options by name; each means the same in every command that has it.
OPTIONS: dict[str, dict[str, Any]] = {
    "adapter": {"required": True, "help": "adapter directory or Hub id"},
    "revision": {"help": "branch, tag or commit of the adapter on the Hub"},
    "base": {"help": "Hub id or directory of the base model (default: the one that the adapter names)"},
    "skip_base_check": {"action": _TRUE, "help": "accept a base model with other weights than in training"},
    "test_file": {"help": "file or folder with texts and labels"},
    "dataset_name": {"help": "Hub data set with a test split, instead of --test_file"},
    "dataset_config_name": {"help": "configuration of the Hub data set"},
    "text_column": {"help": "column of the text (default: as in training)"},
    "text_pair_column": {"help": "column of the second text of a pair"},
    "label_column": {
        "nargs": "+",
        "help": "column of the label, or one for each label (default: as in training)",
    },
    "encoding": {"default": "utf-8", "help": "character encoding of the file (default: utf-8)"},
    "delimiter": {"help": "what separates the fields of CSV and TSV files, such as ';' or tab"},
    "quoting": {"choices": QUOTINGS, "help": "whether double quotes surround texts in CSV and TSV files"},
    "max_test_samples": {"type": int, "help": "use only the first N examples"},
    "batch_size": {
        "type": int,
        "help": "texts in a batch (default: as many as make 2,048 tokens; 16,384 on a GPU)",
    },
    "precision": {
        "choices": ("auto", "fp32", "bf16"),
        "default": "auto",
        "help": "of the encoder; auto: bf16 where the hardware computes in it, else fp32 (default: auto)",
    },
    "output_dir": {"required": True, "help": "new directory to write; must not exist"},
    "json": {"action": _TRUE, "help": "print one JSON object instead of tables"},
}
ADAPTER = ("adapter", "revision")
CLASSIFIER = (*ADAPTER, "base", "skip_base_check")
INPUT = ("text_column", "text_pair_column", "encoding", "delimiter", "quoting")
LABELLED = ("test_file", "dataset_name", "dataset_config_name", "label_column", "max_test_samples", *INPUT)
SPEED = ("batch_size", "precision")


def add_command(commands: Any, run: Callable[[Namespace], None], help: str, *options: str) -> ArgumentParser:
    """Add the parser of a command, called like the function that runs it, with some of `OPTIONS`."""
    parser: ArgumentParser = commands.add_parser(run.__name__, help=help, description=f"{help}.")
    parser.set_defaults(run=run)
    add_options(parser, *options)
    return parser


def add_options(parser: Any, *names: str) -> None:
    """Add some of `OPTIONS` to a parser or a group of one."""
    for name in names:
        parser.add_argument(f"--{name}", **OPTIONS[name])


def add_adapters(parser: ArgumentParser) -> None:
    """Add the options that name one adapter, or several of one base."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument(
        "--adapter",
        nargs="+",
        action="append",
        metavar="ADAPTER",
        help="adapter directory or Hub id; or several of one base model, such as runs/news me/mood@v2, where each is "
        "called like the last part of its path, or as in NAME=ADAPTER",
    )
    group.add_argument(
        "--adapters_dir", metavar="DIR", help="folder of adapter directories: all of them, by their names"
    )
    add_options(parser, "revision", "base", "skip_base_check")


class Parser(ArgumentParser):
    """Tells a mistake in one line, without the usage, and the nearest choice."""

    def error(self, message: str) -> NoReturn:
        more = "" if message.endswith("?") else f"; {self.prog} --help lists the options"
        raise ValueError(message + more)

    def _check_value(self, action: Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except ArgumentError as error:
            error.message += nearest(value, action.choices or ())
            raise


class Labelled(NamedTuple):
    """Labelled texts, and their labels as class ids, rows of 0 and 1, or numbers."""

    data: ClassificationData
    texts: list[Text]
    references: np.ndarray


def classifier_of(options: Namespace, **settings: Any) -> TextClassifier:
    """The classifier that the options name; settings: of `TextClassifier.from_pretrained`."""
    from hf_lora.serving.classifier import TextClassifier

    return TextClassifier.from_pretrained(
        options.adapter,
        revision=options.revision,
        base=options.base,
        check_base=not options.skip_base_check,
        **settings,
    )


def adapters_of(options: Namespace, advice: str = "") -> dict[str, Path]:
    """The directories of the adapters that `add_adapters` let name, by their names.

    Empty for a single one without a name, which is then `options.adapter`. advice: what else a word could have been.
    Raises ValueError for names that are not clear, and for an adapter that is not there.
    """
    from hf_lora.adapters.hub import adapter_directory
    from hf_lora.bank.names import adapters_in, named, split_name
    from hf_lora.bank.sources import split_revision

    words = [word for group in options.adapter or () for word in group]
    if len(words) == 1 and not split_name(words[0])[0]:
        options.adapter = words[0]
        if options.revision is None:
            options.adapter, options.revision = split_revision(words[0])
        return {}
    if options.revision is not None:
        raise ValueError(
            f"--revision is for a single adapter; got {options.revision!r} for several; expected the revision behind "
            f"the Hub id, such as me/mood@{options.revision}"
        )
    if options.adapters_dir is not None:
        return adapters_in(options.adapters_dir)
    found = {}
    for name, place in named(words).items():
        source, revision = split_revision(place)
        try:
            found[name] = adapter_directory(source, revision=revision)
        except ValueError as error:
            raise ValueError(f"{error}{advice}") from None
    return found


def bank_of(options: Namespace, adapters: Mapping[str, Path]) -> AdapterBank:
    """The adapters on one encoder."""
    from hf_lora.bank.bank import AdapterBank

    check_base = not options.skip_base_check
    return AdapterBank.from_pretrained(
        adapters, base=options.base, check_base=check_base, precision=options.precision
    )


def text_columns(options: Namespace, info: AdapterInfo) -> tuple[str | None, str | None]:
    """The columns of the text and of the second one of a pair: as the options name them, or else as in training."""
    text, pair = options.text_column, options.text_pair_column
    trained_on = (*info.text_columns, None, None)
    return (text, pair) if text else (trained_on[0], pair or trained_on[1])


def labelled_data(options: Namespace, info: AdapterInfo, tokenizer: PreTrainedTokenizerBase) -> Labelled:
    """The labelled texts that the options name, with the adapter's length, and labels in its order."""
    from hf_lora.data import DataConfig, prepare_test

    text, pair = text_columns(options, info)
    config = DataConfig(
        dataset_name=options.dataset_name,
        dataset_config_name=options.dataset_config_name,
        test_file=options.test_file,
        text_column=text,
        text_pair_column=pair,
        label_column=options.label_column,
        max_length=info.max_length or min(DataConfig.max_length, tokenizer.model_max_length),
        encoding=options.encoding,
        delimiter=options.delimiter,
        quoting=options.quoting,
        max_test_samples=options.max_test_samples,
    )
    known: dict[str, Any] = {"label_columns": info.label_columns, "label_layout": info.label_layout}
    data = prepare_test(config, tokenizer, info.labels, info.problem_type, **known)
    rows = zip(*(data.texts["test"][name] for name in data.text_columns), strict=True)
    texts = [row[0] if len(row) == 1 else row for row in rows]
    return Labelled(data, texts, data.splits["test"].with_format("numpy")["labels"][:])


def evaluated(
    options: Namespace, *, mistakes: int = 0
) -> tuple[TextClassifier, ClassificationData, Evaluation]:
    """The classifier and labelled data that the options name, and its results with the adapter and without it."""
    from hf_lora.lora.inject import lora_disabled

    classifier = classifier_of(options, precision=options.precision)
    labelled = labelled_data(options, classifier.info, classifier.tokenizer)
    enabled = classifier.logits(labelled.texts, batch_size=options.batch_size)
    with lora_disabled(classifier.model):
        disabled = classifier.logits(labelled.texts, batch_size=options.batch_size)
    return classifier, labelled.data, judged(classifier.info, labelled, enabled, disabled, mistakes=mistakes)


def judged(
    info: AdapterInfo, labelled: Labelled, enabled: Tensor, disabled: Tensor, *, mistakes: int = 0
) -> Evaluation:
    """The results of logits, with the adapter and without it."""
    from hf_lora.tasks.mistakes import evaluate

    shown = [text if isinstance(text, str) else " / ".join(text) for text in labelled.texts]
    outputs = (labelled.references, enabled.numpy(), disabled.numpy())
    return evaluate(info.task, info.labels, info.calibration, shown, *outputs, mistakes=mistakes)


def new_directory(path: str) -> Path:
    """The path of a directory to write. Raises ValueError if it exists."""
    if Path(path).exists():
        raise ValueError(f"output_dir exists; got {path!r}; expected a new directory")
    return Path(path)
