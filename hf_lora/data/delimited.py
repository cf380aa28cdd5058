"""CSV and TSV: fields, quotes, and what betrays a stray one. Lines of bounded length for every kind of text file."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from hf_lora.data.config import MAX_TEXT, Reading, separator_name

logger = logging.getLogger(__name__)

# A line number and what that line says, by column. Parquet and Excel have rows instead of lines.
Record = tuple[int, dict[str, Any]]

# No longer line is read, so that one without an end does not fill the memory.
MAX_LINE = 10 * MAX_TEXT
_SWALLOWED = (
    "a text in double quotes goes on over lines that look like rows of their own, as after a stray quote; pass "
    "--quoting none if quotes are text, or --quoting double if this is right"
)
_SEPARATORS = ",;\t|"
# Values of a column that are kept to know them again: so many, and no longer than this.
_KNOWN_VALUES, _KNOWN_LENGTH = 1000, 60


def delimited(path: Path, reading: Reading, delimiter: str) -> tuple[str, bool]:
    """The separator of a file's fields, and whether a double quote begins a field that may hold it."""
    delimiter = reading.delimiter or delimiter
    return delimiter, reading.quoting == "double" or (reading.quoting is None and delimiter != "\t")


def delimited_records(path: Path, reading: Reading, *, delimiter: str) -> Iterator[Record]:
    delimiter, quoted = delimited(path, reading, delimiter)
    csv.field_size_limit(MAX_TEXT)
    style: Any = {"quoting": csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, "strict": True}
    names: list[str] = []
    doubts = _Swallowed(delimiter) if quoted and reading.quoting is None else None
    in_quotes = 0
    with path.open(encoding=reading.codec, newline="") as file:
        lines = _Lines(file, path)
        reader = csv.reader(lines, delimiter=delimiter, **style)
        line = 1
        try:
            for fields in reader:
                if not fields or (len(fields) == 1 and fields[0].isspace()):
                    pass  # a blank line
                elif not names:
                    names = _header(fields, path, line, delimiter)
                elif len(fields) != len(names):
                    fail(path, line, _other_width(fields, names, quoted=quoted))
                else:
                    if doubts:
                        doubts.look(line, fields, lines.pending)
                    in_quotes += not quoted and any(map(_is_quoted, fields))
                    yield line, dict(zip(names, fields, strict=True))
                line = reader.line_num + 1
                lines.pending.clear()
        except csv.Error as error:
            fail(path, line, _csv_problem(error, ended=lines.ended))
    if doubts and (line := doubts.verdict()):
        fail(path, line, _SWALLOWED)
    if in_quotes and reading.quoting is None:
        words = "%s: double quotes around texts are kept, in %s rows; pass --quoting double to read texts without them"
        logger.warning(words, path, f"{in_quotes:,}")


class _Lines:
    """The lines of a file. pending: those of the record that is being read; ended: the last one was read."""

    def __init__(self, file: TextIO, source: Path) -> None:
        self.lines, self.pending, self.ended = bounded_lines(file, source), list[str](), False

    def __iter__(self) -> Iterator[str]:
        for line in self.lines:
            self.pending.append(line)
            yield line
        self.ended = True


def bounded_lines(file: TextIO, source: Path | str) -> Iterator[str]:
    """The lines of a text file. Raises ValueError for one that is too long, and for a null character."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            fail(source, number, f"longer than {MAX_LINE:,} characters; expected shorter lines")
        if "\0" in line:
            fail(source, number, "a null character; try --encoding utf-16, or remove it")
        yield line


class _Swallowed:
    """Finds rows that a stray double quote has drawn into a text.

    Each line of the record, taken alone, has as many fields as a row, and the fields that lie inside of the quotes have
    a value that the same column has in other rows, such as a label.
    """

    def __init__(self, delimiter: str) -> None:
        self.delimiter, self.known = delimiter, Counter[tuple[int, str]]()
        self.suspects: list[tuple[int, list[tuple[int, str]]]] = []

    def look(self, line: int, fields: Sequence[str], lines: Sequence[str]) -> None:
        """One record, and the lines it was read from."""
        if len(lines) == 1:
            if len(self.known) < _KNOWN_VALUES * len(fields):
                self.known.update((at, v) for at, v in enumerate(fields) if 0 < len(v) <= _KNOWN_LENGTH)
            return
        parts = [text.rstrip("\r\n").split(self.delimiter) for text in lines]
        if any(len(part) != len(fields) for part in parts):
            return
        broken = [at for at, value in enumerate(fields) if "\n" in value or "\r" in value]
        first, last = (broken[0], broken[-1]) if broken else (0, 0)
        inside = [*list(enumerate(parts[0]))[first + 1 :], *list(enumerate(parts[-1]))[:last]]
        inside += [pair for part in parts[1:-1] for pair in enumerate(part)]
        self.suspects.append((line, inside))

    def verdict(self) -> int:
        """The line of the first record that must be wrong, or 0."""
        return next((line for line, inside in self.suspects if any(self.known[p] > 1 for p in inside)), 0)


def _header(fields: list[str], path: Path, line: int, delimiter: str) -> list[str]:
    """The names of the columns. Raises ValueError for one name twice, and for a header with another separator."""
    names = [name or f"Unnamed: {position}" for position, name in enumerate(fields)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        fail(path, line, f"the header names the column {twice!r} more than once")
    if len(names) == 1 and (other := next((mark for mark in _SEPARATORS if mark in names[0]), None)):
        known, found = separator_name(delimiter), separator_name(other)
        what = f"the header {names[0]!r} has no {known} between names, but {found}"
        fail(
            path, line, f"{what}; pass --delimiter {'tab' if other == chr(9) else repr(other)} to read it so"
        )
    return names


def _other_width(fields: list[str], names: list[str], *, quoted: bool) -> str:
    hint = "put double quotes around a text that holds the separator"
    hint = hint if quoted else "with --quoting double a quoted text may hold the separator"
    return f"{len(fields)} fields; expected {len(names)} ({', '.join(names)}); {hint}"


def _is_quoted(field: str) -> bool:
    return len(field) > 1 and field[0] == field[-1] == '"'


def _csv_problem(error: csv.Error, *, ended: bool) -> str:
    if ended:  # the reader asks for more after the last line only inside quotes
        return "a double quote is opened and never closed; pass --quoting none if quotes are text"
    if "limit" in str(error):
        return f"a field of more than {MAX_TEXT:,} characters; expected fewer, or is a double quote never closed?"
    problem = "text after the double quote that closes a field"
    return (
        f"{problem}; write a quote inside of a quoted text twice, or pass --quoting none if quotes are text"
    )


def fail(source: str | Path, line: int, problem: str) -> NoReturn:
    """Raise ValueError for a mistake in a line."""
    raise ValueError(f"{source}, line {line}: {problem}")
