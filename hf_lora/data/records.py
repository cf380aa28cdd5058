"""Read files record by record; errors name the file and the line."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, TextIO

import datasets
import pyarrow
import pyarrow.parquet

from hf_lora.data.columns import choose_text_columns

# A line number and what that line says, by column. Parquet has rows instead of lines.
Record = tuple[int, dict[str, Any]]

_MAX_FIELD_CHARACTERS = (1 << 31) - 1


def iter_texts(
    path_or_stream: str | Path | TextIO,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    encoding: str = "utf-8",
) -> Iterator[tuple[str, ...]]:
    """Yield the text, or the pair of texts, of each example, reading no further than the caller has asked.

    Takes .csv, .tsv, .json, .jsonl and .parquet files; .txt files and open text streams have one text per
    line, in a column "text". Nulls become empty texts. A JSON array, unlike JSON lines, is read whole.
    Raises ValueError: as `read_path`, when iteration arrives at the mistake.
    """
    if isinstance(path_or_stream, (str, Path)):
        name, records = str(path_or_stream), read_records(Path(path_or_stream), encoding)
    else:
        name, records = "the input", _stream_records(path_or_stream)
    columns: tuple[str, ...] = ()
    for line, record in records:
        columns = columns or choose_text_columns(tuple(record), text_column, text_pair_column, name)
        for column in columns:
            if column not in record:
                _fail(name, line, f"no {column!r} here; expected it in every record")
        yield tuple("" if record[column] is None else str(record[column]) for column in columns)


def read_records(path: Path, encoding: str) -> Iterator[Record]:
    """Yield the records of a file one by one, with their line numbers (from 1).

    Raises ValueError: the file does not exist, is empty, has an unknown format, or holds a mistake.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is not a file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; expected at least one example")
    try:
        yield from format_of(path).records(path, codec_for(encoding))
    except UnicodeDecodeError as error:
        content = path.read_bytes()
        try:
            content.decode(encoding)
        except UnicodeDecodeError as first:
            content = content[: first.start]
        line = content.count(b"\n") + 1
        hint = "try --encoding latin-1, or save the file as UTF-8"
        _fail(path, line, f"not valid {encoding} ({error.reason}); {hint}")


def _csv_records(path: Path, encoding: str, *, delimiter: str) -> Iterator[Record]:
    with path.open(encoding=encoding, newline="") as file:
        rows = _csv_rows(file, path, delimiter)
        header_line, header = next(rows, (1, []))
        names = [name or f"Unnamed: {position}" for position, name in enumerate(header)]
        for name in names:
            if names.count(name) > 1:
                _fail(path, header_line, f"the header names the column {name!r} more than once")
        for line, fields in rows:
            if len(fields) != len(names):
                expected = f"{len(names)} ({', '.join(names)})"
                hint = "put double quotes around a text that holds the separator"
                _fail(path, line, f"{len(fields)} fields; expected {expected}; {hint}")
            yield line, dict(zip(names, fields, strict=True))


def _csv_rows(lines: Iterable[str], path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that are not blank, each with the number of its first line."""
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)  # the default refuses texts over 128 KiB
    ended = False

    def tracked() -> Iterator[str]:
        nonlocal ended
        yield from lines
        ended = True

    reader = csv.reader(tracked(), delimiter=delimiter)
    line = 1
    try:
        for fields in reader:
            if ended:  # the reader asks for more after the last line only inside quotes
                _fail(path, line, "a double quote is opened and never closed")
            if fields and not (len(fields) == 1 and fields[0].isspace()):
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        _fail(path, line, str(error))


def _json_records(path: Path, encoding: str) -> Iterator[Record]:
    with path.open(encoding=encoding) as file:
        first = next((line for line in file if line.strip()), "")
        if first.lstrip().startswith("["):
            numbered: Iterable[tuple[int, Any]] = enumerate(_parse_json(first + file.read(), path, 1), 1)
        else:
            file.seek(0)
            lines = ((number, line.rstrip()) for number, line in enumerate(file, 1))
            numbered = ((number, _parse_json(line, path, number)) for number, line in lines if line)
        for number, value in numbered:
            if not isinstance(value, dict):
                _fail(path, number, 'not a JSON object; expected one like {"text": "...", "label": "..."}')
            yield number, value


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text, parse_constant=_reject_constant)
    except json.JSONDecodeError as error:
        _fail(path, first_line + error.lineno - 1, f"not valid JSON: {error.msg} (column {error.colno})")
    except ValueError as error:
        _fail(path, first_line, f"not valid JSON: {error}")


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _parquet_records(path: Path, encoding: str) -> Iterator[Record]:
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from error
    with table:
        batches = table.iter_batches(batch_size=1024)
        yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1)


def _line_records(path: Path, encoding: str) -> Iterator[Record]:
    with path.open(encoding=encoding) as file:
        yield from _text_per_line(file)


def _stream_records(stream: TextIO) -> Iterator[Record]:
    line = 0
    try:
        for line, record in _text_per_line(stream):
            yield line, record
    except UnicodeDecodeError as error:
        problem = f"not valid {error.encoding} ({error.reason})"
        raise ValueError(f"the input, after line {line}: {problem}") from None


def _text_per_line(lines: Iterable[str]) -> Iterator[Record]:
    return ((number, {"text": line.rstrip("\r\n")}) for number, line in enumerate(lines, 1))


@dataclass(frozen=True)
class FileFormat:
    """How one kind of file is read: record by record, or whole by a builder of `datasets`."""

    records: Callable[[Path, str], Iterator[Record]]
    builder: str | None = None
    """None: the format has no place for labels."""
    delimiter: str = ","
    written_by_hand: bool = True

    def options(self, columns: Sequence[str], encoding: str) -> dict[str, Any]:
        """What the builder is told; CSV columns are all strings."""
        if self.builder != "csv":
            return {"encoding": encoding} if self.builder == "json" else {}
        return {
            "sep": self.delimiter,
            "encoding": codec_for(encoding),
            "header": 0,
            "column_names": list(columns),
            "features": datasets.Features(dict.fromkeys(columns, datasets.Value("string"))),
            "keep_default_na": False,
            "na_filter": False,
        }


FORMATS: dict[str, FileFormat] = {
    ".csv": FileFormat(partial(_csv_records, delimiter=","), "csv"),
    ".tsv": FileFormat(partial(_csv_records, delimiter="\t"), "csv", delimiter="\t"),
    ".json": FileFormat(_json_records, "json"),
    ".jsonl": FileFormat(_json_records, "json"),
    ".parquet": FileFormat(_parquet_records, "parquet", written_by_hand=False),
    ".txt": FileFormat(_line_records),
}


def format_of(path: Path) -> FileFormat:
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{path} has the unknown suffix {suffix!r}; expected one of {', '.join(FORMATS)}")
    return FORMATS[suffix]


def codec_for(encoding: str) -> str:
    """Return the codec that also skips the byte order mark that spreadsheets write in front of UTF-8."""
    try:
        name = codecs.lookup(encoding).name
    except LookupError:
        raise ValueError(f"unknown encoding; got {encoding!r}; expected such as utf-8 or latin-1") from None
    return "utf-8-sig" if name == "utf-8" else encoding


def _fail(source: str | Path, line: int, problem: str) -> NoReturn:
    raise ValueError(f"{source}, line {line}: {problem}")
