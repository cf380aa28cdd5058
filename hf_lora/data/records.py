"""Read files record by record; errors name the file and the line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

import pyarrow
import pyarrow.parquet

from hf_lora.data.columns import choose_text_columns
from hf_lora.data.config import codec_for

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
        name, records = "the input", _text_per_line(path_or_stream)
    columns: tuple[str, ...] = ()
    line = 0
    try:
        for line, record in records:
            columns = columns or choose_text_columns(tuple(record), text_column, text_pair_column, name)
            for column in columns:
                if column not in record:
                    _fail(name, line, f"no {column!r} here; expected it in every record")
            yield tuple("" if record[column] is None else str(record[column]) for column in columns)
    except UnicodeDecodeError as error:  # of a stream; of a file `read_records` names the line
        problem = f"not valid {error.encoding} ({error.reason})"
        raise ValueError(f"{name}, after line {line}: {problem}") from None


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
        hint = "try --encoding latin-1, or save the file as UTF-8"
        _fail(path, content.count(b"\n") + 1, f"not valid {encoding} ({error.reason}); {hint}")


def _csv_records(path: Path, encoding: str, *, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)  # the default refuses texts over 128 KiB
    names: list[str] = []
    line, ended = 1, False

    def lines() -> Iterator[str]:
        nonlocal ended
        yield from file
        ended = True

    with path.open(encoding=encoding, newline="") as file:
        reader = csv.reader(lines(), delimiter=delimiter)
        try:
            for fields in reader:
                if ended:  # the reader asks for more after the last line only inside quotes
                    _fail(path, line, "a double quote is opened and never closed")
                if not fields or (len(fields) == 1 and fields[0].isspace()):
                    pass  # a blank line
                elif not names:
                    names = [name or f"Unnamed: {position}" for position, name in enumerate(fields)]
                    if twice := next((name for name in names if names.count(name) > 1), None):
                        _fail(path, line, f"the header names the column {twice!r} more than once")
                elif len(fields) != len(names):
                    expected = f"{len(names)} ({', '.join(names)})"
                    hint = "put double quotes around a text that holds the separator"
                    _fail(path, line, f"{len(fields)} fields; expected {expected}; {hint}")
                else:
                    yield line, dict(zip(names, fields, strict=True))
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
    def reject(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a JSON value")

    try:
        return json.loads(text, parse_constant=reject)
    except json.JSONDecodeError as error:
        _fail(path, first_line + error.lineno - 1, f"not valid JSON: {error.msg} (column {error.colno})")
    except ValueError as error:
        _fail(path, first_line, f"not valid JSON: {error}")


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


def _text_per_line(lines: Iterable[str]) -> Iterator[Record]:
    return ((number, {"text": line.rstrip("\r\n")}) for number, line in enumerate(lines, 1))


class FileFormat(NamedTuple):
    """How one kind of file is read: record by record, or whole by a builder of `datasets`."""

    records: Callable[[Path, str], Iterator[Record]]
    builder: str | None = None
    """None: the format has no place for labels."""
    delimiter: str | None = None


FORMATS: dict[str, FileFormat] = {
    ".csv": FileFormat(partial(_csv_records, delimiter=","), "csv", ","),
    ".tsv": FileFormat(partial(_csv_records, delimiter="\t"), "csv", "\t"),
    ".json": FileFormat(_json_records, "json"),
    ".jsonl": FileFormat(_json_records, "json"),
    ".parquet": FileFormat(_parquet_records, "parquet"),
    ".txt": FileFormat(_line_records),
}


def format_of(path: Path) -> FileFormat:
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{path} has the unknown suffix {suffix!r}; expected one of {', '.join(FORMATS)}")
    return FORMATS[suffix]


def _fail(source: str | Path, line: int, problem: str) -> NoReturn:
    raise ValueError(f"{source}, line {line}: {problem}")
