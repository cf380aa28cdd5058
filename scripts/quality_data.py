"""The data sets of `benchmark_quality.py`: each as a training and a test file."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from benchmark_data import bbc_folder

# Folders of `--data`, in order of the tables.
FOLDERS = ("amazon", "tweets", "editorials", "clinc150")
TEST_SHARE = 0.2


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
    """The sets found in `data` and BBC News, by name; `work`: where the files of BBC News are written."""
    found = {}
    for name in FOLDERS:
        if data is None:
            break
        paths = {split: data / name / f"{split}.csv" for split in ("train", "test", "validation")}
        if paths["train"].is_file() and paths["test"].is_file():
            files = {f"{split}_file": str(path) for split, path in paths.items() if path.is_file()}
            found[name] = QualitySet(name, **files)
    return {**found, "bbc": _bbc(work)}


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
    work.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, in_test in (("train", False), ("test", True)):
        path = work / f"bbc_{split}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            chosen = [rows[row] for row in range(len(rows)) if (row in tested) == in_test]
            csv.writer(file).writerows([("text", "label"), *chosen])
        files[f"{split}_file"] = str(path)
    return QualitySet("bbc", **files)
