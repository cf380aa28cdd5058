"""Every format gives the same rows, and each mistake in a file is told with its line."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import datasets
import pandas
import pytest
import transformers
from helpers_data import FOUR_ROWS, column, write, write_lines

from hf_lora.data import DataConfig, iter_texts, load_splits, prepare_data
from hf_lora.data.config import MAX_TEXT


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
            return write(path, 'text\tlabel\na b\tx\nc, d\ty\ne "f"\tx\né\ty\n')
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
            (
                "t.jsonl",
                '{"text": "a"}\n' + '{"text":' + "[" * 300_000,
                r"t\.jsonl, line 2: not usable JSON: nested too deeply",
            ),
            ("t.json", "[" * 300_000, r"t\.json, line 1: not usable JSON: nested too deeply"),
            (
                "t.jsonl",
                '{"text": "' + "a" * 10_000_000 + '"}\n',
                r"t\.jsonl, line 1: longer than 10,000,000 characters; expected shorter lines",
            ),
            (
                "t.csv",
                "text,label\na,x\n“b”,y\n".encode("cp1252"),
                r"t\.csv, line 3: not valid utf-8 .*; try --encoding cp1252",
            ),
            (
                "t.csv",
                "text,label\na,x\n".encode("utf-16"),
                r"t\.csv, line 1: not valid utf-8 .*--encoding utf-16",
            ),
            (
                "t.csv",
                b"text,label\n\x81\xff,x\n",
                r"line 2: not valid utf-8 .*; it is neither UTF-8 nor cp1252;",
            ),
            ("t.json", '[{"text": "a"},\n{"text": }]', r"t\.json, line 2: not valid JSON"),
            ("t.parquet", "text", r"t\.parquet is not a Parquet file"),
        ],
        ids=lambda value: str(value)[:30],
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
            ("t.doc", "a\n", r"unknown suffix of .*t\.doc; got '\.doc'; expected one of \.csv"),
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

    def test_types_that_cannot_be_one_column(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.jsonl", '{"text": "a", "label": 1}\n\n{"text": "b", "label": ["x"]}\n')
        with pytest.raises(
            ValueError, match=r"column 'label' of .*t\.jsonl cannot be read; got .* int, list"
        ):
            load_splits(DataConfig(train_file=path))

    def test_document_that_is_too_large(self, tmp_path: Path) -> None:
        (tmp_path / "docs" / "x").mkdir(parents=True)
        write(tmp_path / "docs" / "x" / "1.txt", b"a" * (4 * MAX_TEXT + 1))
        with pytest.raises(
            ValueError, match=r"1\.txt has 4,000,001 bytes; expected a text of at most 1,000,000"
        ):
            load_splits(DataConfig(train_file=str(tmp_path / "docs")))

    def test_excel_without_its_reader(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "t.xlsx"
        with zipfile.ZipFile(path, "w") as parts:
            parts.writestr("xl/workbook.xml", "")
        monkeypatch.setitem(sys.modules, "openpyxl", None)
        with pytest.raises(ValueError, match=r"Excel files need openpyxl; pip install 'hf-lora\[excel\]'"):
            load_splits(DataConfig(train_file=str(path)))

    def test_excel_that_is_none_and_of_several_sheets(self, tmp_path: Path) -> None:
        pytest.importorskip("openpyxl")
        with pytest.raises(
            ValueError, match=r"t\.xlsx cannot be read as an Excel file: File is not a zip file"
        ):
            load_splits(DataConfig(train_file=write(tmp_path / "t.xlsx", "text,label\n")))
        table = pandas.DataFrame({"text": ["a"], "label": [1]})
        with pandas.ExcelWriter(tmp_path / "u.xlsx") as book:
            for name in ("one", "two"):
                table.to_excel(book, sheet_name=name, index=False)
        with pytest.raises(ValueError, match=r"u\.xlsx has 2 sheets with rows: one, two; expected one"):
            load_splits(DataConfig(train_file=str(tmp_path / "u.xlsx")))

    def test_bad_byte_far_into_a_file(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.txt", b"abcdefghi\n" * 300_000 + b"\xff\n")
        with pytest.raises(ValueError, match=r"t\.txt, line 300001: not valid utf-8"):
            for _ in iter_texts(path):
                pass
