"""Separators and quotes: what is read, what is refused, and that no row is ever drawn into a text."""

from __future__ import annotations

import csv
import io
import logging
import random
from pathlib import Path
from typing import Any

import pytest
from helpers_data import write

from hf_lora.data import DataConfig, iter_texts, load_splits
from hf_lora.data.config import MAX_TEXT, Reading
from hf_lora.data.delimited import MAX_LINE
from hf_lora.data.files import read_path


def rows_of(path: str, **options: Any) -> list[tuple[str, ...]]:
    return [tuple(row.values()) for row in load_splits(DataConfig(train_file=path, **options))["train"]]


def test_quotes_in_tsv_are_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = ['"Wow, what a day', 'she said "no"', '"all of it"', "5'6\"", 'a "b', "plain"] * 10
    content = "text\tlabel\n" + "".join(f"{text}\t{row % 2}\n" for row, text in enumerate(texts))
    path = write(tmp_path / "t.tsv", content)
    with caplog.at_level(logging.WARNING, logger="hf_lora.data"):
        assert rows_of(path) == [(text, str(row % 2)) for row, text in enumerate(texts)]
    assert [text for (text,) in iter_texts(path)] == texts
    assert "double quotes around texts are kept, in 10 rows; pass --quoting double" in caplog.text


def test_what_is_asked_for_wins(tmp_path: Path) -> None:
    quoted = '"a, b";x\n"say ""c""\nd";y\n'
    path = write(tmp_path / "t.csv", "text;label\n" + quoted)
    expected = [("a, b", "x"), ('say "c"\nd', "y")]
    assert rows_of(path, delimiter=";") == expected
    assert list(iter_texts(path, delimiter=";")) == [(text,) for text, _ in expected]
    tabs = write(tmp_path / "t.tsv", ("text;label\n" + quoted).replace(";", "\t"))
    assert rows_of(tabs, quoting="double") == expected
    plain = write(tmp_path / "u.csv", 'text,label\n"a,x\nb",y\n')
    assert rows_of(plain, quoting="none") == [('"a', "x"), ('b"', "y")]
    # Where tabs separate, quotes are text, whatever the file is called.
    assert rows_of(write(tmp_path / "v.csv", 'text\tlabel\n"a\tx\n'), delimiter="tab") == [('"a', "x")]


@pytest.mark.parametrize(
    ("name", "header", "message"),
    [
        ("t.csv", "text;label", r"line 1: the header 'text;label' has no ',' between names, but ';'; .*delimiter ';'"),
        ("t.csv", "text\tlabel", r"has no ',' between names, but tab; pass --delimiter tab"),
        ("t.tsv", "text,label", r"has no tab between names, but ','; pass --delimiter ','"),
    ],
)  # fmt: skip
def test_a_header_with_another_separator(name: str, header: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, f"{header}\na, b{header[4]}x\n")
    for read in (rows_of, lambda path: list(iter_texts(path))):
        with pytest.raises(ValueError, match=message):
            read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,label\n"so" he said,x\n', r"line 2: text after the double quote that closes a field; .*--quoting none"),
        ('text,label\n"he said \\"no\\"",x\n', r"line 2: text after the double quote"),
        ('text,label\n"Wow,x\nb,y\nhe is 5\'6",y\nc,x\nd,x\n', r"line 2: a text in double quotes goes on over lines"),
        ('label,text\nx,"Wow\ny,b\ny,he is 5\'6"\nx,c\ny,d\nx,e\ny,f\n', r"line 2: a text in double quotes goes on"),
        ('text,label\na,x\nb,"y', r"line 3: a double quote is opened and never closed; pass --quoting none"),
        ("text,label\na\0b,x\n", r"line 2: a null character; try --encoding utf-16, or remove it"),
        ('text,label\n"' + "a\n" * (MAX_TEXT // 2 + 1) + '",x\n', r"line 2: a field of more than 1,000,000 char"),
        ("text,label\na,x\n" + "a" * (MAX_LINE + 2), r"line 3: longer than 10,000,000 characters"),
    ],
    ids=range(8),
)  # fmt: skip
def test_what_cannot_be_meant(content: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", content)
    for read in (rows_of, lambda path: list(iter_texts(path))):
        with pytest.raises(ValueError, match=message) as raised:
            read(path)
        assert "\n" not in str(raised.value)


def test_texts_of_several_lines_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", '\ufefftext,label\r\n"Dear Sir,\r\nBye, all",x\r\nb,y\r\n')
    found, words = read_path(path, Reading(), cache_dir=None)
    assert found["text"][:] == ["Dear Sir,\r\nBye, all", "b"]
    assert words == "t.csv: CSV, ',' between fields, double quotes around them; 2 rows in 4 lines"


PIECES = ["good", "bad", '"so"', "5'6\"", '"Wow', 'end"', "yes, really", "no,thanks", '"a, b"', "x"]


@pytest.mark.parametrize("label_first", [False, True])
def test_rows_are_read_or_refused_and_never_joined(label_first: bool, tmp_path: Path) -> None:
    """Files that the csv module writes are read back; files without any quoting lose no row silently."""
    for seed in range(150):
        draw = random.Random(seed)
        texts = [" ".join(draw.choices(PIECES, k=draw.randint(1, 6))) for _ in range(20)]
        broken = [text.replace(" ", "\n", draw.randint(0, 2)) for text in texts]
        labels = draw.choices(["x", "y"], k=20)
        rows = [(a, b)[:: -1 if label_first else 1] for a, b in zip(broken, labels, strict=True)]
        stream = io.StringIO()
        csv.writer(stream).writerows([("a", "b"), *rows])
        assert rows_of(write(tmp_path / f"{seed}.csv", stream.getvalue())) == rows
        bare = [text.replace(",", "") if draw.random() < 0.1 else "plain" for text in texts]
        lines = [",".join((a, b)[:: -1 if label_first else 1]) for a, b in zip(bare, labels, strict=True)]
        path = write(tmp_path / f"bare{seed}.csv", "a,b\n" + "".join(f"{line}\n" for line in lines))
        try:
            assert len(rows_of(path)) == 20
        except ValueError as error:
            assert "--quoting none" in str(error)


def test_a_delimiter_without_such_a_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", '{"text": "a", "label": 1}\n')
    with pytest.raises(ValueError, match="delimiter is of CSV and TSV files; got ';' and no such file"):
        load_splits(DataConfig(train_file=path, delimiter=";"))
    with pytest.raises(ValueError, match="quoting is of CSV and TSV files; got 'none' and no such file"):
        list(iter_texts(io.StringIO("a\n"), quoting="none"))
