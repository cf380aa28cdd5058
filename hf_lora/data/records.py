"""Read files record by record; errors name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO
from zipfile import BadZipFile, ZipFile

import pandas
import pyarrow
import pyarrow.parquet

from hf_lora._choices import unknown
from hf_lora.data.columns import choose_text_columns
from hf_lora.data.config import MAX_TEXT, Reading
from hf_lora.data.delimited import Record, bounded_lines, delimited_records, fail
from hf_lora.tasks.labels import as_text

# What is held whole: a list of JSON objects, and the parts of an Excel file. JSON lines and CSV are not.
MAX_WHOLE = 1 << 30


def iter_texts(
    path_or_stream: str | Path | TextIO,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    encoding: str = "utf-8",
    delimiter: str | None = None,
    quoting: str | None = None,
) -> Iterator[tuple[str, ...]]:
    """Yield the text, or the pair of texts, of each example, reading no further than the caller has asked.

    Takes .csv, .tsv, .json, .jsonl, .parquet and .xlsx files; .txt files and open text streams have one text per
    line, in a column "text". Nulls become empty texts. A JSON array and Excel, unlike JSON lines, are read whole.
    delimiter, quoting: of CSV and TSV, as in `DataConfig`.
    Raises ValueError: as `read_path`, when iteration arrives at the mistake.
    """
    reading = Reading.of(encoding, delimiter, quoting)
    check_delimited(reading, [path_or_stream])
    if isinstance(path_or_stream, (str, Path)):
        name, records = str(path_or_stream), read_records(Path(path_or_stream), reading)
    else:
        name, records = "the input", _text_per_line(path_or_stream, "the input")
    columns: tuple[str, ...] = ()
    line = 0
    try:
        for line, record in records:
            columns = columns or choose_text_columns(tuple(record), text_column, text_pair_column, name)
            for column in columns:
                if column not in record:
                    fail(name, line, f"no {column!r} here; expected it in every record")
            texts = tuple(as_text(record[column]) for column in columns)
            if any(len(text) > MAX_TEXT for text in texts):
                fail(name, line, f"a text of more than {MAX_TEXT:,} characters; cut it or divide it")
            yield texts
    except UnicodeDecodeError as error:  # of a stream; of a file `read_records` names the line
        problem = f"not valid {error.encoding} ({error.reason})"
        raise ValueError(f"{name}, after line {line}: {problem}") from None


def read_records(path: Path, reading: Reading) -> Iterator[Record]:
    """Yield the records of a file one by one, with their line numbers (from 1).

    Raises ValueError: the file does not exist, is empty, has an unknown format, or holds a mistake.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is not a file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; expected at least one example")
    try:
        yield from format_of(path).records(path, reading)
    except UnicodeDecodeError as error:
        content = path.read_bytes()
        try:
            content.decode(reading.encoding)
            start = 0
        except UnicodeDecodeError as first:
            start = first.start
        hint = _other_encoding(content)
        problem = f"not valid {reading.encoding} ({error.reason}); {hint}"
        fail(path, content.count(b"\n", 0, start) + 1, problem)


def _other_encoding(content: bytes) -> str:
    """Advice on the encoding of what is no UTF-8. latin-1 takes every byte, but has no letter at 0x80 to 0x9F."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "try --encoding utf-16"
    if not any(byte in content for byte in map(bytes.__call__, ([code] for code in range(0x80, 0xA0)))):
        return "try --encoding latin-1, or save the file as UTF-8"
    try:
        content.decode("cp1252")
    except UnicodeDecodeError:
        return "it is neither UTF-8 nor cp1252; give its --encoding, or save the file as UTF-8"
    return "try --encoding cp1252, or save the file as UTF-8"


def _json_records(path: Path, reading: Reading) -> Iterator[Record]:
    with path.open(encoding=reading.codec) as file:
        beginning = file.read(1024)
        while beginning and beginning.isspace():
            beginning = file.read(1024)
        file.seek(0)
        numbered: Iterable[tuple[int, Any]]
        if beginning.lstrip().startswith("["):
            if (size := path.stat().st_size) > MAX_WHOLE:
                fail(path, 1, f"a list of {size:,} bytes; expected at most {MAX_WHOLE:,}, or JSON lines")
            numbered = enumerate(_parse_json(file.read(), path, 1), 1)
        else:
            lines = ((number, line.strip()) for number, line in enumerate(bounded_lines(file, path), 1))
            numbered = ((number, _parse_json(line, path, number)) for number, line in lines if line)
        for number, value in numbered:
            if not isinstance(value, dict):
                fail(path, number, 'not a JSON object; expected one like {"text": "...", "label": "..."}')
            yield number, value


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    def reject(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a JSON value")

    try:
        return json.loads(text, parse_constant=reject)
    except json.JSONDecodeError as error:
        fail(path, first_line + error.lineno - 1, f"not valid JSON: {error.msg} (column {error.colno})")
    except RecursionError:
        fail(path, first_line, "not usable JSON: nested too deeply")
    except ValueError as error:
        fail(path, first_line, f"not valid JSON: {error}")


def _parquet_records(path: Path, reading: Reading) -> Iterator[Record]:
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from error
    with table:
        batches = table.iter_batches(batch_size=1024)
        yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1)


def _excel_records(path: Path, reading: Reading) -> Iterator[Record]:
    """The rows of the only sheet, below a row of names; cells keep their types, empty ones are empty texts."""
    options: Any = {"sheet_name": None, "dtype": object, "keep_default_na": False, "engine": "openpyxl"}
    try:
        with ZipFile(path) as parts:
            size = sum(part.file_size for part in parts.infolist())
        if size > MAX_WHOLE:
            raise ValueError(f"{size:,} bytes unpacked; expected at most {MAX_WHOLE:,}")
        found = pandas.read_excel(path, na_values=[""], **options)
    except ImportError:
        raise ValueError(f"{path}: Excel files need openpyxl; pip install 'hf-lora[excel]'") from None
    except (BadZipFile, ValueError, KeyError, OSError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read as an Excel file: {str(error).partition(chr(10))[0]}"
        ) from error
    sheets = {name: table for name, table in found.items() if len(table)}
    if len(sheets) > 1:
        raise ValueError(
            f"{path} has {len(sheets)} sheets with rows: {', '.join(sheets)}; expected one; save it alone"
        )
    for table in sheets.values():
        names = [str(name) for name in table.columns]
        values = table.astype(object).where(table.notna(), "").itertuples(index=False, name=None)
        yield from ((line, dict(zip(names, row, strict=True))) for line, row in enumerate(values, 2))


def _line_records(path: Path, reading: Reading) -> Iterator[Record]:
    with path.open(encoding=reading.codec) as file:
        yield from _text_per_line(file, path)


def _text_per_line(file: TextIO, source: Path | str) -> Iterator[Record]:
    return (
        (number, {"text": line.rstrip("\r\n")}) for number, line in enumerate(bounded_lines(file, source), 1)
    )


class FileFormat(NamedTuple):
    """How one kind of file is read, record by record."""

    records: Callable[[Path, Reading], Iterator[Record]]
    has_labels: bool = True
    delimiter: str | None = None
    """Of CSV and TSV: what separates the fields where nothing else is asked for."""


FORMATS: dict[str, FileFormat] = {
    ".csv": FileFormat(partial(delimited_records, delimiter=","), delimiter=","),
    ".tsv": FileFormat(partial(delimited_records, delimiter="\t"), delimiter="\t"),
    ".json": FileFormat(_json_records),
    ".jsonl": FileFormat(_json_records),
    ".parquet": FileFormat(_parquet_records),
    ".xlsx": FileFormat(_excel_records),
    ".txt": FileFormat(_line_records, has_labels=False),
}


def check_delimited(reading: Reading, sources: Iterable[Any]) -> None:
    """Raise ValueError for a delimiter or quoting where no source is a CSV or TSV file."""
    kinds = [Path(source).suffix.lower() for source in sources if isinstance(source, str | Path)]
    for name in ("delimiter", "quoting"):
        value = getattr(reading, name)
        if value is not None and not any(kind in FORMATS and FORMATS[kind].delimiter for kind in kinds):
            raise ValueError(f"{name} is of CSV and TSV files; got {value!r} and no such file; leave it out")


def format_of(path: Path) -> FileFormat:
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise unknown(f"suffix of {path}", suffix, FORMATS)
    return FORMATS[suffix]
