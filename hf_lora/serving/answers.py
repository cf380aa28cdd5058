"""Predictions as a file in the format of its name.

JSON holds them as `predict` gives them. Tables have the columns `text` (of a pair `text` and `text_pair`), `label`,
`score`, and `scores.<label>` for each label. Answers of several adapters have the last three of each adapter, behind
its name: `news.label`.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from hf_lora._choices import nearest
from hf_lora._files import whole_file
from hf_lora._text import json_line, shortened
from hf_lora.adapters.info import AdapterInfo

Answer = Mapping[str, Any]
# The columns of a table, in order, and what is in them: str or float, or for several labels lists of these.
Columns = Mapping[str, type]
# Rows of a Parquet file that are held at a time.
_ROWS = 2048
# What an Excel file and a cell of it can hold.
_EXCEL_ROWS, _EXCEL_COLUMNS, _EXCEL_CHARACTERS = 1_048_576, 16_384, 32_767


class Format(NamedTuple):
    """How answers are written: `write(answers, columns, stream)`; the package that it needs besides."""

    write: Callable[[Iterable[Answer], Columns, Any], None]
    binary: bool = False
    package: str | None = None


def write_lines(answers: Iterable[Answer], columns: Columns, stream: Any) -> None:
    """Write each answer as a line of JSON, as soon as it is there."""
    for answer in answers:
        stream.write(json_line(answer) + "\n")
        stream.flush()


def _json(answers: Iterable[Answer], columns: Columns, stream: Any) -> None:
    between = "[\n"
    for answer in answers:
        stream.write(between + json_line(answer))
        between = ",\n"
    stream.write("[]\n" if between == "[\n" else "\n]\n")


def _delimited(answers: Iterable[Answer], columns: Columns, stream: Any, *, delimiter: str) -> None:
    # With all texts in quotes: a carriage return in one of them would end the line otherwise.
    writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(columns)
    writer.writerows(map(_cells, answers))


def _parquet(answers: Iterable[Answer], columns: Columns, stream: Any) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    rows = map(_row, answers)
    first = next(rows, [])
    kinds = {name: pyarrow.float64() if kind is float else pyarrow.string() for name, kind in columns.items()}
    # Of several labels, none may be given in all of the first rows.
    several = [name for name, value in zip(columns, first, strict=False) if isinstance(value, list)]
    kinds |= {name: pyarrow.list_(kinds[name]) for name in several}
    with ParquetWriter(stream, schema := pyarrow.schema(kinds)) as writer:
        part = [first] if first else []
        while part := [*part, *islice(rows, _ROWS - len(part))]:
            writer.write_batch(
                pyarrow.RecordBatch.from_pylist(
                    [dict(zip(columns, row, strict=True)) for row in part], schema
                )
            )
            part = []


def _excel(answers: Iterable[Answer], columns: Columns, stream: Any) -> None:
    if len(columns) > _EXCEL_COLUMNS:
        raise ValueError(
            f"an Excel file has at most {_EXCEL_COLUMNS:,} columns; got {len(columns):,}; expected another format"
        )
    openpyxl = import_module("openpyxl")
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("predictions")
    sheet.append(list(columns))
    for number, row in enumerate(map(_cells, answers), 2):
        if number > _EXCEL_ROWS:
            raise ValueError(
                f"an Excel file has at most {_EXCEL_ROWS:,} rows; got more; expected another format"
            )
        cells = []
        for value in row:
            if isinstance(value, str) and (len(value) > _EXCEL_CHARACTERS or _unwritable(value)):
                raise ValueError(
                    f"an Excel file cannot hold the text in row {number}; got {shortened(value)}; expected at most "
                    f"{_EXCEL_CHARACTERS:,} characters, without control characters; write a .csv file"
                )
            cells.append(cell := openpyxl.cell.WriteOnlyCell(sheet, value=value))
            if isinstance(value, str):
                cell.data_type = "s"  # a text that begins with "=" is no formula
        sheet.append(cells)
    book.save(stream)


def _unwritable(text: str) -> bool:
    return any(character < " " and character not in "\t\n" for character in text)


FORMATS: dict[str, Format] = {
    ".jsonl": Format(write_lines),
    ".json": Format(_json),
    ".csv": Format(partial(_delimited, delimiter=",")),
    ".tsv": Format(partial(_delimited, delimiter="\t")),
    ".parquet": Format(_parquet, binary=True),
    ".xlsx": Format(_excel, binary=True, package="openpyxl"),
}


def format_of(path: str | Path) -> Format:
    """The format of a file's name. Raises ValueError for an unknown ending, and for a package that is missing."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(
            f"the ending of output_file names no format; got {str(path)!r}; expected one of "
            f"{', '.join(FORMATS)}{nearest(suffix, FORMATS)}"
        )
    package = FORMATS[suffix].package
    if package is not None and find_spec(package) is None:
        raise ValueError(
            f"{suffix} files need a package that is missing; expected {package}; try: pip install {package}"
        )
    return FORMATS[suffix]


def write_answers(
    path: str | Path, answers: Iterable[Answer], info: AdapterInfo | Mapping[str, AdapterInfo]
) -> None:
    """Write predictions to a file, which appears when the last of them is written.

    info: of the classifier that gives them; of several adapters, whose answers have "answers", by name and in order.
    Raises ValueError as `format_of`, before the first answer is taken, and for columns that would have one name.
    """
    infos = {f"{name}.": own for name, own in info.items()} if isinstance(info, Mapping) else {"": info}
    kind, stream_of = format_of(path), iter(answers)
    first = list(islice(stream_of, 1))
    pairs = any(len(own.text_columns) == 2 for own in infos.values())
    columns = _columns(infos, not isinstance(first[0]["text"], str) if first else pairs)

    def whole() -> Iterator[Answer]:
        yield from first
        yield from stream_of

    with whole_file(Path(path), binary=kind.binary) as stream:
        kind.write(whole(), columns, stream)


def _columns(infos: Mapping[str, AdapterInfo], pairs: bool) -> dict[str, type]:
    """The columns of a table. infos: of the adapters, by what stands in front of the names of their columns."""
    columns: list[tuple[str, type]] = [("text", str), *([("text_pair", str)] if pairs else [])]
    for prefix, info in infos.items():
        columns += [(f"{prefix}label", str), (f"{prefix}score", float)]
        columns += [(f"{prefix}scores.{label}", float) for label in info.labels]
    for name, count in Counter(name for name, _ in columns).items():
        if count > 1:
            raise ValueError(f"{count} columns would have one name; got {name!r}; expected different ones")
    return dict(columns)


def _row(answer: Answer) -> list[Any]:
    row = [answer["text"]] if isinstance(answer["text"], str) else list(answer["text"])
    for given in answer["answers"].values() if "answers" in answer else [answer]:
        row += [given["label"], given["score"], *given["scores"].values()]
    return row


def _cells(answer: Answer) -> list[Any]:
    """A row whose lists, of several labels and their scores, are written as JSON."""
    return [
        json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value for value in _row(answer)
    ]
