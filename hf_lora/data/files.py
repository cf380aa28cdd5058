"""Read labelled examples whole: from a file, a saved dataset, or a folder of documents."""

from __future__ import annotations

import glob
from collections import deque
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from hf_lora.data.config import codec_for
from hf_lora.data.records import FORMATS, format_of, read_records

BADLY_ENCODED = "__badly_encoded__"  # marks the documents of a folder that were read in FALLBACK_ENCODING
FALLBACK_ENCODING = "cp1252"


def read_path(path: str, *, encoding: str, cache_dir: str | None) -> datasets.Dataset | datasets.DatasetDict:
    """Read labelled examples from a file, a `save_to_disk` folder, or a folder with one sub-folder per label.

    CSV and TSV columns are all strings, so that neither "NA" nor "007" changes. A folder of documents has the
    columns "text", "label" and `BADLY_ENCODED`, in the order of label and file name.
    Raises ValueError: the path does not exist, is empty, or holds a mistake, whose file and line are named.
    """
    source = Path(path)
    if not source.exists():
        raise ValueError(f"{path} does not exist; expected a data file or folder")
    if source.is_file():
        return _read_file(source, encoding, cache_dir)
    if not any((source / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _read_label_folders(source, encoding)
    try:
        return datasets.load_from_disk(path)
    except (OSError, ValueError, IndexError, pyarrow.ArrowException) as error:  # IndexError: no rows
        raise ValueError(f"{source} cannot be loaded as a saved dataset, or is empty: {error}") from error


def _read_file(path: Path, encoding: str, cache_dir: str | None) -> datasets.Dataset:
    _, builder, delimiter = format_of(path)
    if builder is None:
        labelled = ", ".join(suffix for suffix, entry in FORMATS.items() if entry.builder)
        raise ValueError(f"{path}: plain text has no labels; expected {labelled} or a folder")
    records = read_records(path, encoding)
    _, first = next(records, (0, None))
    if first is None:
        raise ValueError(f"{path} is empty; expected at least one example")
    options: dict[str, Any] = {}
    if builder != "parquet":
        # Find mistakes first: pandas takes a row with too many fields for one with an index, and pyarrow has no line
        # numbers.
        deque(records, maxlen=0)
        options["encoding"] = encoding
    if builder == "csv":
        options = {
            "sep": delimiter,
            "encoding": codec_for(encoding),
            "header": 0,
            "column_names": list(first),
            "features": datasets.Features(dict.fromkeys(first, datasets.Value("string"))),
            "keep_default_na": False,
            "na_filter": False,
        }
    files = {"train": [glob.escape(str(path.resolve()))]}
    try:
        return datasets.load_dataset(builder, data_files=files, split="train", cache_dir=cache_dir, **options)
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as {builder}: {reason}") from error


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
        content = path.read_bytes()
        try:
            text, fell_back = content.decode(codec_for(encoding)), False
        except UnicodeDecodeError:
            text, fell_back = content.decode(FALLBACK_ENCODING, errors="replace"), True
        columns["text"].append(text)
        columns[BADLY_ENCODED].append(fell_back)
    return datasets.Dataset.from_dict(columns)
