"""Read labelled examples whole: from a file, a saved dataset, a folder of documents, or a table in memory."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow

from hf_lora._files import replacing
from hf_lora.data.config import MAX_TEXT, Reading, codec_for, separator_name
from hf_lora.data.delimited import delimited
from hf_lora.data.records import FORMATS, format_of, read_records
from hf_lora.tasks.labels import as_text
from hf_lora.version import __version__

BADLY_ENCODED = "__badly_encoded__"  # marks the documents of a folder that were read in FALLBACK_ENCODING
FALLBACK_ENCODING = "cp1252"
EXPECTED = "a path, a datasets.Dataset, a DatasetDict, a pandas DataFrame or a list of dicts"


def read_path(
    path: str, reading: Reading, *, cache_dir: str | None
) -> tuple[datasets.Dataset | datasets.DatasetDict, str]:
    """Read labelled examples from a file, a `save_to_disk` folder, or a folder with one sub-folder per label.

    CSV and TSV columns are all strings, so that neither "NA" nor "007" changes. A folder of documents has the
    columns "text", "label" and `BADLY_ENCODED`, in the order of label and file name.
    Returns the examples, and in words how the file was understood.
    Raises ValueError: the path does not exist, is empty, or holds a mistake, whose file and line are named.
    """
    source = Path(path)
    if not source.exists():
        raise ValueError(f"{path} does not exist; expected a data file or folder")
    if source.is_file():
        return _read_file(source, reading, cache_dir)
    if not any((source / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _read_label_folders(source, reading.encoding), f"{source.name}: a folder for each label"
    try:
        return datasets.load_from_disk(path), f"{source.name}: saved by datasets"
    except (OSError, ValueError, IndexError, pyarrow.ArrowException) as error:  # IndexError: no rows
        raise ValueError(f"{source} cannot be loaded as a saved dataset, or is empty: {error}") from error


def _read_file(path: Path, reading: Reading, cache_dir: str | None) -> tuple[datasets.Dataset, str]:
    entry = format_of(path)
    if not entry.has_labels:
        labelled = ", ".join(suffix for suffix, other in FORMATS.items() if other.has_labels)
        raise ValueError(f"{path}: plain text has no labels; expected {labelled} or a folder")
    records = read_records(path, reading)
    if path.suffix.lower() == ".parquet":
        if next(records, None) is None:
            raise ValueError(f"{path} is empty; expected at least one example")
        return _read_parquet(path, cache_dir), f"{path.name}: Parquet"
    columns: dict[str, list[Any]] = {}
    rows = 0
    for rows, (_, record) in enumerate(records, 1):
        for name, value in record.items():
            column = columns.setdefault(name, [])
            column += [None] * (rows - 1 - len(column))
            column.append(value)
    if not rows:
        raise ValueError(f"{path} is empty; expected at least one example")
    for column in columns.values():
        column += [None] * (rows - len(column))
    arrays = {name: _array(values, f"column {name!r} of {path}") for name, values in columns.items()}
    words = f"{path.name}: {path.suffix[1:].upper()}"
    if entry.delimiter:
        mark, quoted = delimited(path, reading, entry.delimiter)
        breaks = sum(value.count("\n") for values in columns.values() for value in values) if quoted else 0
        words += f", {separator_name(mark)} between fields, " + (
            "double quotes around them" if quoted else "no quoting"
        )
        words += f"; {rows:,} rows in {1 + rows + breaks:,} lines" if breaks else ""
    return _kept(datasets.Dataset(pyarrow.table(arrays)), path, reading, cache_dir), words


def _read_parquet(path: Path, cache_dir: str | None) -> datasets.Dataset:
    files = {"train": [glob.escape(str(path.resolve()))]}
    try:
        return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache_dir)
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as parquet: {reason}") from error


def _kept(dataset: datasets.Dataset, path: Path, reading: Reading, cache_dir: str | None) -> datasets.Dataset:
    """The same on the disk, under a digest of the file: it takes no memory there, and what is tokenized is kept."""
    digest = hashlib.sha256(repr((path.suffix.lower(), reading, __version__)).encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "hf_lora" / digest.hexdigest()[:32]
    if not (folder / "state.json").is_file():
        with replacing(folder) as temporary:
            dataset.save_to_disk(str(temporary))
    return datasets.load_from_disk(str(folder))


def _read_label_folders(folder: Path, encoding: str) -> datasets.Dataset:
    documents = sorted(
        (path for path in folder.glob("[!.]*/[!.]*.txt") if path.is_file()),
        key=lambda path: (path.parent.name, path.name),
    )
    if not documents:
        raise ValueError(
            f"{folder} is not a data folder; expected one made by save_to_disk, or sub-folders that are "
            "named after the labels and hold .txt files"
        )
    columns: dict[str, list[Any]] = {"text": [], "label": [path.parent.name for path in documents]}
    columns[BADLY_ENCODED] = []
    for path in documents:
        if (size := path.stat().st_size) > 4 * MAX_TEXT:
            raise ValueError(f"{path} has {size:,} bytes; expected a text of at most {MAX_TEXT:,} characters")
        content = path.read_bytes()
        try:
            text, fell_back = content.decode(codec_for(encoding)), False
        except UnicodeDecodeError:
            text, fell_back = content.decode(FALLBACK_ENCODING, errors="replace"), True
        columns["text"].append(text)
        columns[BADLY_ENCODED].append(fell_back)
    return datasets.Dataset.from_dict(columns)


def read_table(table: Any, split: str) -> datasets.Dataset | datasets.DatasetDict:
    """The rows of `table` as `datasets` holds them, with the meaning that they have in a file.

    A DataFrame and a list of dicts lose their index. NaN, NaT and NA are nulls, as is a key that a dict lacks.
    A column of strings and numbers becomes one of strings, as in a CSV file.
    Raises ValueError: `table` is something else, or has a column that cannot be held.
    """
    if isinstance(table, datasets.Dataset | datasets.DatasetDict):
        parts = table.values() if isinstance(table, datasets.DatasetDict) else [table]
        if any(part.format["type"] == "custom" for part in parts):
            raise ValueError(
                f"the {split} data has a transform, which acts only where rows are read one by one; expected rows as "
                "they are trained on; use map in the place of with_transform or set_transform"
            )
        return table.with_format(None)
    if isinstance(table, list | tuple):
        for row, example in enumerate(table, 1):
            if not isinstance(example, dict):
                raise ValueError(
                    f"the {split} data holds a {type(example).__name__} in row {row}; expected a list of dicts, "
                    'such as [{"text": "...", "label": "..."}]'
                )
        table = pandas.DataFrame(list(table), dtype=object)
    if not isinstance(table, pandas.DataFrame):
        raise ValueError(f"the {split} data is a {type(table).__name__}; expected {EXPECTED}")
    names = [str(name) for name in table.columns]
    if len(set(names)) < len(names):
        raise ValueError(
            f"the {split} data has a column twice; got {', '.join(names)}; expected one of each name"
        )
    columns = zip(names, (table.iloc[:, place] for place in range(len(names))), strict=True)
    return datasets.Dataset(pyarrow.table({name: _column(values, name, split) for name, values in columns}))


def _column(series: pandas.Series, name: str, split: str) -> pyarrow.Array:
    values = series.astype(object).where(series.notna(), None).tolist()
    return _array(values, f"column {name!r} of the {split} data")


def _array(values: Sequence[Any], what: str) -> pyarrow.Array:
    """A column of Python values; numbers beside texts become texts."""
    kinds = {type(value) for value in values if value is not None}
    if str in kinds and all(issubclass(kind, str | int | float | date) for kind in kinds):
        values = [None if value is None else as_text(value) for value in values]
    try:
        return pyarrow.array(values, from_pandas=True)
    except (pyarrow.ArrowException, TypeError, OverflowError, UnicodeError) as error:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{what} cannot be read; got values of type {found} ({reason}); expected "
            "text, numbers or lists of them; leave the column out"
        ) from error
