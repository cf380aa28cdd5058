"""Read labelled examples whole: from a file, a saved dataset, or a folder of documents."""

from __future__ import annotations

import glob
from pathlib import Path

import datasets
import pyarrow

from hf_lora.data.records import FORMATS, codec_for, format_of, read_records

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
    if any((source / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _read_saved(source)
    return _read_label_folders(source, encoding)


def _read_file(path: Path, encoding: str, cache_dir: str | None) -> datasets.Dataset:
    file_format = format_of(path)
    if file_format.builder is None:
        labelled = ", ".join(suffix for suffix, entry in FORMATS.items() if entry.builder)
        raise ValueError(f"{path}: plain text has no labels; expected {labelled} or a folder")
    records = read_records(path, encoding)
    _, first = next(records, (0, None))
    if first is None:
        raise ValueError(f"{path} is empty; expected at least one example")
    if file_format.written_by_hand:
        # Find mistakes first: pandas takes a row with too many fields for one with an index, and pyarrow has no line
        # numbers.
        for _ in records:
            pass
    try:
        return datasets.load_dataset(
            file_format.builder,
            data_files={"train": [glob.escape(str(path.resolve()))]},
            split="train",
            cache_dir=cache_dir,
            **file_format.options(list(first), encoding),
        )
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as {file_format.builder}: {reason}") from error


def _read_saved(folder: Path) -> datasets.Dataset | datasets.DatasetDict:
    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, IndexError, pyarrow.ArrowException) as error:  # IndexError: no rows
        raise ValueError(f"{folder} cannot be loaded as a saved dataset, or is empty: {error}") from error


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
    texts, fell_back = zip(*(_read_document(path, encoding) for path in documents), strict=True)
    columns = {"text": texts, "label": [path.parent.name for path in documents], BADLY_ENCODED: fell_back}
    return datasets.Dataset.from_dict(columns)


def _read_document(path: Path, encoding: str) -> tuple[str, bool]:
    """Return the text and whether it had to be read in the fallback encoding."""
    content = path.read_bytes()
    try:
        return content.decode(codec_for(encoding)), False
    except UnicodeDecodeError:
        return content.decode(FALLBACK_ENCODING, errors="replace"), True
