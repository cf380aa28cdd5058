"""Which columns are chosen, and what is said where none or several fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from helpers_data import FOUR_ROWS, column, write, write_lines

from hf_lora.data import DataConfig, prepare_data


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
