"""Counts and warnings by hand."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from helpers_data import write

from hf_lora.data import DataConfig, prepare_data


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
