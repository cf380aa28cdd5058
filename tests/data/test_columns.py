"""Which columns are chosen, and what is said where none or several fit."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import transformers
from helpers_data import FOUR_ROWS, column, write, write_lines

from hf_lora.data import ClassificationData, DataConfig, iter_texts, prepare_data, prepare_test
from hf_lora.data.config import MAX_TEXT


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

    def test_dates_are_text(self, tmp_path: Path, tokenizer: Any) -> None:
        days = ["2024-01-01", "2024-02-29", "2024-01-02 10:30:00"]
        times = [datetime.fromisoformat(day) for day in days]
        lines = write_lines(
            tmp_path / "t.jsonl", [{"text": day, "label": i % 2} for i, day in enumerate(days)]
        )
        sheet = write(
            tmp_path / "t.csv", "text,label\n" + "".join(f"{day},{i % 2}\n" for i, day in enumerate(days))
        )
        frame = pandas.DataFrame({"text": times, "label": [0, 1, 0]})
        frame.to_parquet(tmp_path / "t.parquet")
        mixed = [{"text": value, "label": i % 2} for i, value in enumerate([times[0], days[1], times[2]])]
        for table in (lines, sheet, str(tmp_path / "t.parquet"), frame, mixed):
            data = prepare_data(DataConfig(), tokenizer, tables={"train": table, "validation": table})
            assert column(data.texts["train"], "text") == days
        assert [text for (text,) in iter_texts(tmp_path / "t.parquet")] == days

    def test_text_that_is_too_long(self, tmp_path: Path, tokenizer: Any) -> None:
        rows = [{"text": "a" * size, "label": size % 2} for size in (MAX_TEXT, 5, MAX_TEXT + 1)]
        with pytest.raises(ValueError, match=r"'text' of the train split has a text of 1,000,001 characters"):
            prepare_data(DataConfig(), tokenizer, tables={"train": rows, "validation": rows[:2]})
        with pytest.raises(ValueError, match=r"line 3: a text of more than 1,000,000 characters"):
            list(iter_texts(write_lines(tmp_path / "t.jsonl", rows)))
        # Rows that were left out do not count.
        kept = datasets.Dataset.from_list(rows).filter(lambda row: len(row["text"]) < 6)
        data = prepare_data(DataConfig(), tokenizer, tables={"train": rows[:2], "validation": kept})
        assert data.report.examples == {"train": 2, "validation": 1}

    def test_texts_that_are_lists(self, tmp_path: Path, tokenizer: Any) -> None:
        path = write_lines(tmp_path / "t.jsonl", [{"text": ["a"], "label": i} for i in range(3)])
        with pytest.raises(ValueError, match=r"column 'text' of the train split holds list values, not text"):
            prepare_data(DataConfig(train_file=path, validation_file=path), tokenizer)


MULTI = "multi_label_classification"


class TestLayouts:
    """Layouts of several labels beyond those that every format is tried with."""

    def prepare(self, rows: Any, tokenizer: Any, **options: Any) -> ClassificationData:
        parts = rows if isinstance(rows, dict) else {"train": rows, "validation": rows}
        return prepare_data(DataConfig(**options), tokenizer, tables=parts)

    def rows(self, *labels: Any) -> list[dict[str, Any]]:
        return [{"text": f"a {row}", "label": label} for row, label in enumerate(labels)]

    @pytest.mark.parametrize(
        ("labels", "names", "encoded", "words"),
        [
            (["a;b", "b", ""], ("a", "b"), [[1, 1], [0, 1], [0, 0]], "names with ';' between them"),
            (["1,0", "0,1", "0,0"], ("0", "1"), [[1, 0], [0, 1], [0, 0]], "vectors of 0 and 1 for 2 labels"),
            (["['a', 'b']", "", "[]"], ("a", "b"), [[1, 1], [0, 0], [0, 0]], "lists written as text"),
            ([["1", "0"], ["0", "1"]], ("0", "1"), [[1, 0], [0, 1]], "vectors of 0 and 1"),
            ([[1, 0], [0]], ("0", "1"), [[1, 1], [1, 0]], "lists"),
        ],
    )
    def test_by_hand(self, labels: Any, names: Any, encoded: Any, words: str, tokenizer: Any) -> None:
        data = self.prepare(self.rows(*labels), tokenizer, problem_type=MULTI)
        assert (data.labels, column(data.splits["train"], "labels")) == (names, encoded)
        assert data.why.startswith(words)

    def test_what_was_understood_is_logged(
        self, tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = write(tmp_path / "t.csv", "text;label\na;0.5\nb;1\n")
        with caplog.at_level("INFO", logger="hf_lora.data"):
            data = self.prepare({"train": path, "validation": path}, tokenizer, delimiter=";")
        words = "t.csv: CSV, ';' between fields, double quotes around them"
        assert data.files == (words, words)
        told = {record.getMessage() for record in caplog.records}
        assert told >= {words, "regression: the labels are numbers with a decimal point"}

    def test_columns_hold_numbers_booleans_and_text(self, tokenizer: Any) -> None:
        rows = [
            {"text": f"a {i}", "x": x, "label": y}
            for i, (x, y) in enumerate([("1.0", True), ("False", False)])
        ]
        data = self.prepare(rows, tokenizer, label_column=["x", "label"])
        assert (data.labels, column(data.splits["train"], "labels")) == (("x", "label"), [[1, 1], [0, 0]])
        assert (data.text_columns, data.label_columns, data.label_layout) == (
            ("text",),
            ("x", "label"),
            "columns",
        )
        assert data.report.label_counts["train"] == {"x": 1, "label": 1}

    @pytest.mark.parametrize(
        ("rows", "options", "message"),
        [
            (
                [{"text": "a", "x": 1, "y": 2}],
                {"label_column": ["x", "y"]},
                r"2 in .* row 1: .* in the column 'y'",
            ),
            (
                [{"text": "a", "x": 1, "y": None}],
                {"label_column": ["x", "y"]},
                r"None in .* row 1: expected 0 or 1",
            ),
            (
                [{"text": "a", "x": 1}],
                {"label_column": ["x", "y"]},
                r"no column 'y'; its columns are 'text', 'x'",
            ),
            (
                [{"text": "a", "x": 1, "y": 0}],
                {},
                r"set label_column \(several if each label has a column of 0 and 1",
            ),
            (
                [{"text": "a", "label": "[a]"}],
                {},
                r"'\[a\]' in the train split, row 1: expected a list such as",
            ),
        ],
    )
    def test_mistakes(self, rows: Any, options: dict[str, Any], message: str, tokenizer: Any) -> None:
        with pytest.raises(ValueError, match=message):
            self.prepare(rows, tokenizer, **options)

    def test_the_layout_of_training_holds_for_the_other_splits(self, tokenizer: Any) -> None:
        train = self.rows([1, 0, 0], [0, 1, 1], [1, 1, 0])
        with pytest.raises(ValueError, match=r"row 1: expected a vector of 3 times 0 or 1"):
            self.prepare({"train": train, "validation": self.rows([0, 2])}, tokenizer)
        # One row of ids 0 and 1 is no vector where training had ids.
        parts = {"train": self.rows([0], [1, 0], [1]), "validation": self.rows([0, 1])}
        assert column(self.prepare(parts, tokenizer).splits["validation"], "labels") == [[1, 1]]
        known: dict[str, Any] = {"tables": {"test": parts["validation"]}, "label_layout": "names"}
        data = prepare_test(DataConfig(), tokenizer, ["0", "1"], MULTI, **known)
        assert column(data.splits["test"], "labels") == [[1, 1]]
        data = prepare_test(
            DataConfig(), tokenizer, ["0", "1"], MULTI, **{**known, "label_layout": "vectors"}
        )
        assert column(data.splits["test"], "labels") == [[0, 1]]
        # The comma is part of a name that is known.
        parts = {"train": self.rows("a|b, c", "a"), "validation": self.rows("b, c")}
        data = self.prepare(parts, tokenizer, problem_type=MULTI)
        assert column(data.splits["validation"], "labels") == [[0, 1]]

    def test_an_existing_classifier_knows_its_columns(self, tokenizer: Any) -> None:
        rows = [
            {"text": "a", "x": 1, "y": 0, "z": 1, "label": "x|z"},
            {"text": "b", "x": 0, "y": 0, "z": 1, "label": "z"},
        ]
        known: dict[str, Any] = {
            "tables": {"test": rows},
            "label_columns": ("z", "x", "y"),
            "label_layout": "columns",
        }
        data = prepare_test(DataConfig(), tokenizer, ["z", "x", "y"], MULTI, **known)
        assert column(data.splits["test"], "labels") == [[1, 1, 0], [1, 0, 0]]
        other = prepare_test(DataConfig(label_column="label"), tokenizer, ["z", "x", "y"], MULTI, **known)
        assert column(other.splits["test"], "labels") == [[1, 1, 0], [1, 0, 0]]
        with pytest.raises(ValueError, match="label columns are x, y; expected one for each of z, x, y"):
            prepare_test(DataConfig(label_column=["x", "y"]), tokenizer, ["z", "x", "y"], MULTI, **known)
