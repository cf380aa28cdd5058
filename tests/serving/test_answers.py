"""Files of predictions, read back by other libraries and by our own reader."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from hf_lora.adapters.info import AdapterInfo
from hf_lora.data import iter_texts
from hf_lora.serving import answers
from hf_lora.serving.answers import FORMATS, write_answers

HOSTILE = [
    '=1+1 "quoted", and\nnew\n\nlines',
    "schön 日本 🙂, tab\there; semi",
    "",
    "null",
    "007",
    "'single'",
]
LABELS = ("no", "yes, sir", 'q"uote')
MULTI = "multi_label_classification"


# Three adapters on the same texts; a name with a dot is one too.
SEVERAL = {"news": "single", "mood.v2": MULTI, "stars": "regression"}


def some_answers(kind: str) -> tuple[Any, list[dict[str, Any]]]:
    """Answers as `predict` gives them, for each kind of task, and what is known of their adapter, or of each."""
    if kind == "several":
        own = {name: some_answers(one) for name, one in SEVERAL.items()}
        rows = zip(*(given for _, given in own.values()), strict=True)
        parts = [
            [{key: row[key] for key in ("label", "score", "scores")} for row in answers] for answers in rows
        ]
        given = [dict(zip(own, part, strict=True)) for part in parts]
        infos = {name: info for name, (info, _) in own.items()}
        return infos, [{"text": text, "answers": row} for text, row in zip(HOSTILE, given, strict=True)]
    if kind == "regression":
        numbers = [(-1.5 + row) / 7 for row in range(len(HOSTILE))]
        rows = [("stars", number, {"stars": number}) for number in numbers]
        info = AdapterInfo(("stars",), "regression")
    else:
        scores = [
            {label: 0.1 + 0.01 * row + place / 7 for place, label in enumerate(LABELS)} for row in range(6)
        ]
        rows = [("yes, sir", score["yes, sir"], score) for score in scores]
        info = AdapterInfo(LABELS)
    if kind == MULTI:
        given = [[], [], *([list(LABELS[: 1 + row % 3]) for row in range(4)])]
        rows = [
            (names, [score[name] for name in names], score)
            for names, score in zip(given, scores, strict=True)
        ]
        info = AdapterInfo(LABELS, MULTI)
    texts: list[Any] = HOSTILE if kind != "pairs" else [[text, f"second, {text}"] for text in HOSTILE]
    names = ("text", "label", "score", "scores")
    return info, [dict(zip(names, (text, *row), strict=True)) for text, row in zip(texts, rows, strict=True)]


def flat(answer: dict[str, Any], cells: bool = False) -> dict[str, Any]:
    """What a table holds of an answer."""
    if "answers" in answer:
        own = {name: flat({"text": "", **part}, cells) for name, part in answer["answers"].items()}
        columns = {
            f"{name}.{key}": cell for name, row in own.items() for key, cell in row.items() if key != "text"
        }
        return {"text": answer["text"], **columns}
    texts = [answer["text"]] if isinstance(answer["text"], str) else answer["text"]
    row = dict(zip(("text", "text_pair"), texts, strict=False))
    row |= {"label": answer["label"], "score": answer["score"]}
    if cells:
        row = {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
    return {**row, **{f"scores.{label}": score for label, score in answer["scores"].items()}}


def read_delimited(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream, delimiter="," if path.suffix.lower() == ".csv" else "\t"))
    numeric = [name for name in lines[0] if any(part.startswith("score") for part in name.split("."))]
    return [{**line, **{n: line[n] if "[" in line[n] else float(line[n]) for n in numeric}} for line in lines]


def read_excel(path: Path) -> list[dict[str, Any]]:
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl, which writes Excel files, is not installed")
    names, *rows = openpyxl.load_workbook(path).active.iter_rows(values_only=True)
    # Excel has no empty text, only an empty cell.
    return [{n: "" if value is None else value for n, value in zip(names, row, strict=True)} for row in rows]


READERS: dict[str, tuple[Callable[[Path], Any], Callable[[dict[str, Any]], Any]]] = {
    ".jsonl": (lambda path: [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]], dict),
    ".json": (lambda path: json.loads(path.read_text("utf-8")), dict),
    ".csv": (read_delimited, lambda answer: flat(answer, cells=True)),
    ".tsv": (read_delimited, lambda answer: flat(answer, cells=True)),
    ".parquet": (lambda path: pyarrow.parquet.read_table(path).to_pylist(), flat),
    # Numbers in Excel files have 16 digits.
    ".xlsx": (
        read_excel,
        lambda answer: {
            name: float(f"{value:.16g}") if isinstance(value, float) else value
            for name, value in flat(answer, cells=True).items()
        },
    ),
}
needs_openpyxl = pytest.mark.skipif(
    importlib.util.find_spec("openpyxl") is None,
    reason="openpyxl, which writes Excel files, is not installed",
)


@pytest.mark.parametrize("kind", ["single", "pairs", MULTI, "regression", "several"])
@pytest.mark.parametrize(
    "suffix", [pytest.param(s, marks=needs_openpyxl) if s == ".xlsx" else s for s in FORMATS]
)
def test_a_file_read_back_has_the_same_values(suffix: str, kind: str, tmp_path: Path) -> None:
    info, given = some_answers(kind)
    path = tmp_path / "deep" / f"out{suffix.upper() if kind == 'single' else suffix}"
    write_answers(path, iter(given), info)
    read, expected = READERS[suffix]
    assert read(path) == [expected(answer) for answer in given]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("text", ["a\rb", "a\r\nb", "\x00", "line one\x0bline two"], ids=ascii)
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".json", ".jsonl"])
def test_control_characters_come_back_too(suffix: str, text: str, tmp_path: Path) -> None:
    info, given = some_answers("single")
    path = tmp_path / f"out{suffix}"
    write_answers(path, [{**given[0], "text": text}, given[1]], info)
    read, _ = READERS[suffix]
    assert [row["text"] for row in read(path)] == [text, HOSTILE[1]]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".json", ".jsonl"])
def test_our_own_reader_takes_the_texts_from_it(suffix: str, tmp_path: Path) -> None:
    info, given = some_answers("single")
    write_answers(tmp_path / f"out{suffix}", given, info)
    read = iter_texts(tmp_path / f"out{suffix}", quoting="double" if suffix == ".tsv" else None)
    assert [text for (text,) in read] == HOSTILE


@pytest.mark.parametrize("kind", ["single", "several"])
@pytest.mark.parametrize("suffix", [s for s in FORMATS if s != ".xlsx"])
def test_no_answers_make_a_file_without_rows(suffix: str, kind: str, tmp_path: Path) -> None:
    info, given = some_answers(kind)
    path = tmp_path / f"out{suffix}"
    write_answers(path, [], info)
    header = list(flat(given[0]))
    if suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        assert (table.num_rows, table.column_names) == (0, header)
    elif suffix in (".csv", ".tsv"):
        with path.open(newline="") as stream:
            assert list(csv.reader(stream, delimiter="," if suffix == ".csv" else "\t")) == [header]
    else:
        assert path.read_text() == ("[]\n" if suffix == ".json" else "")


def test_parts_of_a_parquet_file_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_ROWS", 2)
    info, given = some_answers(MULTI)
    write_answers(tmp_path / "out.parquet", given[:5], info)
    assert READERS[".parquet"][0](tmp_path / "out.parquet") == [flat(answer) for answer in given[:5]]


@pytest.mark.parametrize("name", ["out", "out.txt", "out.csv.gz", ".csv"])
def test_an_unknown_ending_names_the_known_ones(name: str, tmp_path: Path) -> None:
    def never() -> Any:
        raise AssertionError("an answer was asked for")
        yield

    with pytest.raises(ValueError, match=r"got .*; expected one of \.jsonl, \.json, \.csv, \.tsv, \.parquet"):
        write_answers(tmp_path / name, never(), AdapterInfo(LABELS))
    assert not list(tmp_path.iterdir())


def test_excel_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"\.xlsx files need a package that is missing; expected openpyxl; try"
    ):
        write_answers(tmp_path / "out.xlsx", [], AdapterInfo(LABELS))


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    own = AdapterInfo(("label", "other"))
    message = r"2 columns would have one name; got 'a\.scores\.label'"
    with pytest.raises(ValueError, match=message):
        write_answers(tmp_path / "out.csv", [], {"a": own, "a.scores": own})
    assert not list(tmp_path.iterdir())


@needs_openpyxl
def test_more_columns_than_excel_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info, given = some_answers("several")
    monkeypatch.setattr(answers, "_EXCEL_COLUMNS", len(flat(given[0])) - 1)
    with pytest.raises(ValueError, match="at most 13 columns; got 14; expected another format"):
        write_answers(tmp_path / "out.xlsx", given, info)
    assert not list(tmp_path.iterdir())


@needs_openpyxl
@pytest.mark.parametrize("text", ["a\x00b", "a\rb", "long " * 7000], ids=["null", "return", "long"])
def test_what_excel_cannot_hold_is_refused_and_nothing_is_left(text: str, tmp_path: Path) -> None:
    info, given = some_answers("single")
    with pytest.raises(ValueError, match=r"cannot hold the text in row 3; .*write a \.csv file"):
        write_answers(tmp_path / "out.xlsx", [given[0], {**given[1], "text": text}], info)
    assert not list(tmp_path.iterdir())
