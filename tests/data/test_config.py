"""Every mistake in the options of the data."""

from __future__ import annotations

from typing import Any

import pytest

from hf_lora.data import DataConfig


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
            (
                {"problem_type": "ranking"},
                "unknown problem_type; got 'ranking'; expected one of single_label",
            ),
            ({"encoding": "utf-9"}, "unknown encoding 'utf-9'; try utf-8"),
            ({"delimiter": "::"}, "delimiter is '::'; expected one character, such as ';', or tab"),
            ({"delimiter": '"'}, "delimiter is '\"'; expected one character"),
            ({"quoting": "single"}, "unknown quoting; got 'single'; expected one of double, none"),
            (
                {"label_column": ["a", "b", "a"]},
                "one column has two roles; got text, pair and label columns a, b, a",
            ),
            (
                {"label_column": ["a", "b"], "problem_type": "regression"},
                "several label columns are for multi_label_classification; got 'regression'",
            ),
        ],
    )
    def test_mistake(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            DataConfig(**{"train_file": "t.csv", **options})

    @pytest.mark.parametrize("given", [["a", "b"], ("a", "b")])
    def test_several_label_columns(self, given: Any) -> None:
        assert DataConfig(label_column=given).label_columns == ("a", "b")
        assert DataConfig(label_column=["a"]) == DataConfig(label_column="a")
        assert DataConfig().label_columns == ()

    def test_the_tab_has_a_name(self) -> None:
        assert DataConfig(delimiter="tab").reading == DataConfig(delimiter="\\t").reading
        assert DataConfig(delimiter="tab").reading.delimiter == "\t"

    def test_token_is_not_printed(self) -> None:
        assert "secret" not in repr(DataConfig(dataset_name="a/b", token="secret"))
