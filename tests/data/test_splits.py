"""Splits by hand: their names, what is held out, hidden labels and limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers_data import class_labels, column, hub, labelled, write_lines

import hf_lora.data.splits
from hf_lora.data import DataConfig, load_splits, prepare_data, prepare_test
from hf_lora.data.splits import held_out_fraction


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
