"""Data in memory against the same rows in a CSV file: the same labels, splits, tokens and report."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
from conftest import tiny_tokenizer

from hf_lora.data import ClassificationData, DataConfig, load_splits, prepare_data, prepare_test
from hf_lora.data.files import read_table

FORMS = ["dataset", "dataset_dict", "frame", "rows"]
TEXTS = ["the film was good", "a dull book", "", "007", "NA", 'it was "fine", really', "very\nbad", "é"] * 5
COLUMNS: dict[str, list[Any]] = {
    "strings": ["x", "y"] * 20,
    "integers": [10, 9, 2, 9] * 10,
    "floats": [0.5, 2.0, -1.25, 1e-3] * 10,
    "several": ["x|y", "x", "", "y"] * 10,
}
SHOUTED = datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1] * 20}).with_transform(
    lambda batch: batch
)
PROBLEMS = {"several": "multi_label_classification"}


def in_memory(form: str, columns: dict[str, list[Any]]) -> Any:
    if form == "rows":
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if form == "frame":
        # The index of a frame that was filtered or shuffled means nothing.
        return pandas.DataFrame(columns, index=range(7, 7 + len(columns["text"])))
    table = datasets.Dataset.from_dict(columns)
    return table if form == "dataset" else datasets.DatasetDict(train=table)


def in_csv(path: Path, columns: dict[str, list[Any]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return str(path)


def contents(data: ClassificationData) -> dict[str, Any]:
    """All that a run reads of the data."""
    names = list(data.text_columns)
    return {
        "splits": {split: part.to_dict() for split, part in data.splits.items()},
        "features": {split: part.features for split, part in data.splits.items()},
        "texts": {split: part.select_columns(names).to_dict() for split, part in data.texts.items()},
        "raw_labels": {split: [str(v) for v in part["label"]] for split, part in data.texts.items()},
        "rest": (data.labels, data.problem_type, names, data.max_length, data.report, data.held_out),
    }


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("strings", {}),
        ("strings", {"max_train_samples": 9, "seed": 5}),
        ("integers", {"few_shot": 3}),
        ("floats", {}),
        ("several", {"validation_fraction": 0.3}),
    ],
)
def test_every_form_gives_what_the_csv_gives(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    columns = {"text": TEXTS, "label": COLUMNS[kind], "number": list(range(40))}
    options = {"max_length": 16, "problem_type": PROBLEMS.get(kind), **options}
    tokenizer = tiny_tokenizer()
    path = in_csv(tmp_path / "train.csv", columns)
    expected = contents(prepare_data(DataConfig(train_file=path, **options), tokenizer))
    for table in (path, Path(path), *(in_memory(form, columns) for form in FORMS)):
        data = prepare_data(DataConfig(**options), tokenizer, tables={"train": table})
        assert contents(data) == expected


@pytest.mark.parametrize("form", FORMS)
def test_validation_and_test_tables(form: str, tmp_path: Path) -> None:
    parts = {
        split: {"text": [f"the {split} was {row}" for row in range(12)], "label": [0, 1, 1] * 4}
        for split in ("train", "validation", "test")
    }
    files = {f"{split}_file": in_csv(tmp_path / f"{split}.csv", part) for split, part in parts.items()}
    tables = {split: in_memory(form, part) for split, part in parts.items()}
    tokenizer = tiny_tokenizer()
    expected = contents(prepare_data(DataConfig(max_length=32, **files), tokenizer))
    assert contents(prepare_data(DataConfig(max_length=32), tokenizer, tables=tables)) == expected
    # Files and tables mix.
    rest = {split: tables[split] for split in ("validation", "test")}
    mixed = prepare_data(DataConfig(train_file=files["train_file"], max_length=32), tokenizer, tables=rest)
    assert contents(mixed) == expected
    given = (tokenizer, ["0", "1"], "single_label_classification")
    alone = prepare_test(DataConfig(max_length=32), *given, tables={"test": tables["test"]})
    assert contents(alone) == contents(
        prepare_test(DataConfig(test_file=files["test_file"], max_length=32), *given)
    )


def test_a_dataset_dict_brings_its_own_splits() -> None:
    names = ("train", "dev", "test", "unlabelled")
    own = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": [name], "label": [0]}) for name in names}
    )
    found = load_splits(DataConfig(), {"train": own, "test": [{"text": "other", "label": 1}]})
    assert {split: part["text"][:] for split, part in found.items()} == {
        "train": ["train"],
        "validation": ["dev"],
        "test": ["other"],
    }
    with pytest.raises(ValueError, match="the test data has no test split; its splits are train, dev"):
        load_splits(DataConfig(), {"test": datasets.DatasetDict({k: own[k] for k in ("train", "dev")})})


@pytest.mark.parametrize("missing", [None, math.nan, pandas.NA, pandas.NaT])
def test_missing_values_are_nulls(missing: Any) -> None:
    rows = [{"text": "a", "label": 1}, {"text": missing, "label": missing}, {"label": 2}]
    for table in (rows, pandas.DataFrame(rows, dtype=object)):
        assert read_table(table, "train").to_dict() == {"text": ["a", None, None], "label": [1, None, 2]}
    with pytest.raises(ValueError, match=r"1 of 3 examples of the train split have no label .* row 2"):
        prepare_data(DataConfig(max_length=32), tiny_tokenizer(), tables={"train": rows})


@pytest.mark.parametrize(
    ("values", "held"),
    [
        (pandas.Categorical(["x", "y", "x"]), ["x", "y", "x"]),
        (pandas.array([1, None, 2], dtype="Int64"), [1, None, 2]),
        (pandas.array(["x", None, "y"], dtype="string"), ["x", None, "y"]),
        (np.array([1, 2, 3], dtype=np.int8), [1, 2, 3]),
        (np.array([True, False, True]), [True, False, True]),
        ([["x", "y"], [], None], [["x", "y"], [], None]),
        ([("x", "y"), (), ("x",)], [["x", "y"], [], ["x"]]),
        (["x", 1, 2.5], ["x", "1", "2.5"]),
    ],
)
def test_columns_of_a_frame(values: Any, held: list[Any]) -> None:
    frame = pandas.DataFrame({"text": ["a", "b", "c"], 5: values})
    assert read_table(frame, "train").to_dict() == {"text": ["a", "b", "c"], "5": held}


def test_the_format_of_a_dataset_does_not_matter() -> None:
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}).with_format("numpy")
    assert read_table(table, "train")["label"][:] == [1, 0]
    assert type(read_table(table, "train")["label"][0]) is int


@pytest.mark.parametrize(
    ("tables", "options", "message"),
    [
        ({"train": {"text": ["a"]}}, {}, r"the train data is a dict; expected a path, a datasets\.Dataset,"),
        ({"test": np.zeros(3)}, {}, r"the test data is a ndarray; expected a path"),
        (
            {"train": [{"text": "a"}, "b"]},
            {},
            r"the train data holds a str in row 2; expected a list of dicts",
        ),
        ({"train": []}, {}, "the train split is empty; expected at least one example"),
        ({"train": SHOUTED}, {}, "the train data has a transform, which .*; use map in the place of"),
        ({"train": datasets.DatasetDict(test=SHOUTED)}, {}, "the train data has a transform"),
        (
            {"train": [{"text": "a \ud83d"}]},
            {},
            "column 'text' of the train data cannot be read; got .*surrogates",
        ),
        (
            {"train": pandas.DataFrame([["a", "b"]], columns=["text", "text"])},
            {},
            "the train data has a column twice; got text, text",
        ),
        (
            {"train": [{"text": "a", "extra": object()}]},
            {},
            r"column 'extra' of the train data cannot be read; got values of type object \(.*; leave the column out",
        ),
        ({"dev": []}, {}, "unknown split; got 'dev'; expected one of train, validation, test"),
        ({"train": []}, {"train_file": "t.csv"}, r"two sources of the train data; got 't\.csv' and a list"),
        ({"train": []}, {"dataset_name": "a/b"}, "two sources of the train data; got 'a/b' and a list"),
        ({}, {}, "no data given; expected a dataset_name, a train_file or a test_file"),
        ({"validation": []}, {}, "no data given"),
    ],
)
def test_mistakes(tables: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_splits(DataConfig(**options), tables)
    assert "\n" not in str(raised.value)


def test_no_progress_bars(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": row, "label": row % 2} for row in range(10)]
    prepare_data(DataConfig(max_length=32), tiny_tokenizer(), tables={"train": rows})
    assert capfd.readouterr().err == ""
    assert not datasets.are_progress_bars_disabled()


BITS = [[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0]] * 3
LISTS = [["a", "b"], ["b"], [], ["a"]] * 3
WRITTEN = [
    *("it's a day", "2024-01-01", 'the "best"', "007", "NA", "", 'a "quote', "é, ü; |", "1e5", "None"),
    *("[x]", "last"),
]
# Labels in memory, as text in a file of text, the label columns, and what they are: problem type, names, encoded.
STANDING: dict[str, tuple[dict[str, list[Any]], Any, str, tuple[str, ...], list[Any]]] = {
    "text": ({"label": ["x", "NA", "x", "007"] * 3}, str, "single", ("007", "NA", "x"), [2, 1, 2, 0] * 3),
    "integers": ({"label": [10, 9, 2, 9] * 3}, str, "single", ("2", "9", "10"), [2, 1, 0, 1] * 3),
    "booleans": ({"label": [True, False] * 6}, json.dumps, "single", ("false", "true"), [1, 0] * 6),
    "numbers": ({"label": [0.5, 2.0, -1.25, 3.0] * 3}, str, "regression", ("label",), [0.5, 2, -1.25, 3] * 3),
    "lists": ({"label": LISTS}, str, "multi", ("a", "b"), [[1, 1], [0, 1], [0, 0], [1, 0]] * 3),
    "lists as JSON": ({"label": LISTS}, json.dumps, "multi", ("a", "b"), [[1, 1], [0, 1], [0, 0], [1, 0]] * 3),
    "ids": (
        {"label": [[2], [0, 1], [], [1]] * 3}, str, "multi", ("0", "1", "2"),
        [[0, 0, 1], [1, 1, 0], [0, 0, 0], [0, 1, 0]] * 3,
    ),
    "vectors": ({"label": BITS}, str, "multi", ("0", "1", "2"), BITS),
    "vectors of two": ({"label": [[1, 0], [0, 1]] * 6}, str, "multi", ("0", "1"), [[1, 0], [0, 1]] * 6),
    "columns": (
        {name: [row[at] for row in BITS] for at, name in enumerate("cab")}, str, "multi", ("c", "a", "b"), BITS,
    ),
}  # fmt: skip
NAMED = {"single": "single_label_classification", "multi": "multi_label_classification"}


def written_as(form: str, folder: Path, labels: dict[str, list[Any]], as_text: Any) -> Any:
    """The texts and labels in one of the forms that are read: a path, or a table."""
    columns = {"text": WRITTEN, **labels}
    texts = {
        name: values if name == "text" else list(map(as_text, values)) for name, values in columns.items()
    }
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    path = folder / f"data.{form}"
    if form == "rows":
        return rows
    if form == "frame":
        return pandas.DataFrame(columns)
    if form == "dataset":
        return datasets.Dataset.from_dict(columns)
    if form == "csv":
        return in_csv(path, texts)
    if form == "tsv":
        lines = ["\t".join(texts), *("\t".join(row) for row in zip(*texts.values(), strict=True))]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif form == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif form == "parquet":
        datasets.Dataset.from_dict(columns).to_parquet(str(path))
    else:
        pytest.importorskip("openpyxl")
        scalars = {
            name: texts[name] if isinstance(values[0], list) else values for name, values in columns.items()
        }
        pandas.DataFrame(scalars).to_excel(path, index=False)
    return str(path)


@pytest.mark.parametrize("standing", STANDING)
@pytest.mark.parametrize(
    "form", ["csv", "tsv", "jsonl", "json", "parquet", "xlsx", "frame", "rows", "dataset"]
)
def test_every_format_gives_the_same_for_every_layout(form: str, standing: str, tmp_path: Path) -> None:
    labels, as_text, kind, names, encoded = STANDING[standing]
    table = written_as(form, tmp_path, labels, as_text)
    options = {"max_length": 16, "label_column": tuple(labels)}
    tables = {"train": table, "validation": table}
    data = prepare_data(DataConfig(**options), tiny_tokenizer(), tables=tables)
    assert (data.problem_type, data.labels) == (NAMED.get(kind, kind), names)
    assert data.splits["train"]["labels"][:] == data.splits["validation"]["labels"][:] == encoded
    assert data.texts["train"]["text"][:] == WRITTEN
    # And once more for a classifier that was saved, from what it remembers.
    known = {"label_columns": data.label_columns, "label_layout": data.label_layout}
    again = prepare_test(
        DataConfig(max_length=16), tiny_tokenizer(), names, data.problem_type, tables={"test": table}, **known
    )
    assert again.splits["test"]["labels"][:] == encoded
