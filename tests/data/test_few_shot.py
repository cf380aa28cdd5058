"""Counts, nesting and parts of few-shot draws, counted independently of the code that draws."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lora.data import ClassificationData, DataConfig, prepare_data
from hf_lora.data.few_shot import divide, draw


def write(path: Path, labels: list[Any], tag: str = "film") -> str:
    """One text for each label, no two of them the same."""
    rows = [{"text": f"the {tag} was {row}", "label": label} for row, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(path: str, few_shot: int | None = None, test_seed: int | None = None, **options: Any) -> Any:
    config = DataConfig(train_file=path, few_shot=few_shot, max_length=32, **options)
    return prepare_data(config, tiny_tokenizer(), test_seed=test_seed)


def texts(data: ClassificationData, split: str) -> list[str]:
    return data.texts[split]["text"][:]


def counts(data: ClassificationData, split: str) -> Counter[str]:
    """Examples by label, from the raw label column."""
    values = data.texts[split]["label"][:]
    return Counter(name for value in values for name in (value if isinstance(value, list) else [value]))


# Of 60, 25, 9, 3 and 1 examples, mixed.
UNEVEN = [label for label, count in zip("abcde", (60, 25, 9, 3, 1), strict=True) for _ in range(count)]
MULTI = [["a"], ["b"], ["a", "b"], ["a", "c"], ["a"], ["b", "d"], [], ["a"], [], ["a"]] * 6


@pytest.mark.parametrize("shots", [2, 4, 8, 100])
def test_every_label_has_as_many_or_all_it_has(shots: int, tmp_path: Path) -> None:
    validation = write(tmp_path / "v.jsonl", ["a", "b", "c"] * 4, tag="book")
    data = prepared(write(tmp_path / "t.jsonl", UNEVEN), shots, validation_file=validation)
    assert counts(data, "train") == {label: min(shots, n) for label, n in Counter(UNEVEN).items()}
    assert len(set(texts(data, "train"))) == len(texts(data, "train"))
    # A validation file that is given stays whole, in its order.
    assert texts(data, "validation") == [f"the book was {row}" for row in range(12)]


def test_ids_and_tokens_are_those_of_the_drawn_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", UNEVEN)
    data = prepared(path, 3)
    whole = {f"the film was {row}": label for row, label in enumerate(UNEVEN)}
    for split in ("train", "validation"):
        assert [data.labels[label] for label in data.splits[split]["labels"]] == [
            whole[text] for text in texts(data, split)
        ]


@pytest.mark.parametrize("labels", [UNEVEN, MULTI], ids=["single", "multi"])
@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_smaller_draws_are_parts_of_larger_ones(labels: list[Any], fraction: float, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", labels)
    draws = [prepared(path, shots, validation_fraction=fraction) for shots in (2, 4, 20)]
    for smaller, larger in pairwise(draws):
        sizes = []
        for split in ("train", "validation"):
            part, whole = set(texts(smaller, split)), set(texts(larger, split))
            assert part <= whole
            sizes.append(len(whole - part))
        assert sum(sizes) > 0
    for data in draws:
        assert not set(texts(data, "train")) & set(texts(data, "validation"))


@pytest.mark.parametrize(
    ("shots", "fraction", "held_out"), [(2, 0.2, 1), (5, 0.2, 1), (8, 0.2, 2), (9, 0.5, 5), (4, 0.95, 3)]
)
def test_the_held_out_part_is_of_each_label(
    shots: int, fraction: float, held_out: int, tmp_path: Path
) -> None:
    path = write(tmp_path / "t.jsonl", ["a", "b", "c"] * 20)
    data = prepared(path, shots, validation_fraction=fraction)
    assert counts(data, "validation") == dict.fromkeys("abc", held_out)
    assert counts(data, "train") == dict.fromkeys("abc", shots - held_out)


def test_a_label_with_one_example_stays_in_training(tmp_path: Path) -> None:
    data = prepared(write(tmp_path / "t.jsonl", UNEVEN), 4)
    assert counts(data, "train") == {"a": 3, "b": 3, "c": 3, "d": 2, "e": 1}
    assert counts(data, "validation") == {"a": 1, "b": 1, "c": 1, "d": 1}
    assert data.labels == tuple("abcde")
    assert data.report.warnings == (
        "train: 2 of 5 labels have fewer than 4 examples, and all of theirs are taken: 'd' (3), 'e' (1)",
    )


def test_the_seed_decides(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", ["a", "b"] * 50)
    one, again, other = (prepared(path, 4, seed=seed) for seed in (1, 1, 2))
    for split in ("train", "validation"):
        assert texts(one, split) == texts(again, split)
        assert set(texts(one, split)) != set(texts(other, split))


def test_a_label_with_exactly_as_many_is_not_short(tmp_path: Path) -> None:
    data = prepared(write(tmp_path / "t.jsonl", UNEVEN), 3)
    assert data.report.warnings == (
        "train: 1 of 5 labels have fewer than 3 examples, and all of theirs are taken: 'e' (1)",
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_rarest_label_is_drawn_first(seed: int) -> None:
    # The one row of label 1 is a row of label 0 too, which then needs no other.
    assert draw([(0,)] * 10 + [(0, 1)], 1, seed) == [10]


def test_each_example_is_as_likely_as_another() -> None:
    carried = [(row % 2,) for row in range(20)]
    drawn = Counter(row for seed in range(400) for row in draw(carried, 2, seed))
    # Each of 10 rows of a label is drawn with probability 2 / 10: 80 times of 400, with a deviation of 8.
    assert set(drawn) == set(range(20))
    assert max(abs(count - 80) for count in drawn.values()) < 4 * 8


@pytest.mark.parametrize("shots", [1, 2, 5])
def test_multi_label_draws_have_enough_of_every_label(shots: int, tmp_path: Path) -> None:
    validation = write(tmp_path / "v.jsonl", [["a"], ["b"]], tag="book")
    data = prepared(write(tmp_path / "t.jsonl", MULTI), shots, validation_file=validation)
    found, available = counts(data, "train"), Counter(name for value in MULTI for name in value)
    assert all(found[name] >= min(shots, available[name]) for name in "abcd")
    # c and d are carried beside a and b: what is drawn for them is not drawn once more.
    assert found["c"] == found["d"] == shots
    # Texts without any label are as many.
    assert data.texts["train"]["label"][:].count([]) == shots
    assert len(data.texts["train"]) <= 5 * shots


@settings(deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 4), min_size=1).map(sorted), min_size=1, max_size=60),
    st.integers(1, 12),
    st.floats(0.01, 0.99),
    st.integers(0, 3),
)
def test_draws_of_any_labels(carried: list[list[int]], shots: int, fraction: float, seed: int) -> None:
    rows = draw(carried, shots, seed)
    available = Counter(label for labels in carried for label in labels)
    found = Counter(label for row in rows for label in carried[row])
    assert len(set(rows)) == len(rows)
    assert all(min(shots, available[label]) <= found[label] for label in available)
    assert draw(carried, shots + 5, seed)[: len(rows)] == rows
    held_out = divide([carried[row] for row in rows], fraction)
    kept = Counter(
        label for row, out in zip(rows, held_out, strict=True) if not out for label in carried[row]
    )
    assert set(kept) == set(found), "a label without an example in training"


def test_the_test_split_is_never_touched(tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", ["a", "b"] * 7, tag="book")
    data = prepared(write(tmp_path / "t.jsonl", UNEVEN), 2, test_file=test)
    assert texts(data, "test") == [f"the book was {row}" for row in range(14)]


@pytest.mark.parametrize("shots", [2, 8, None])
def test_one_test_part_for_draws_of_all_sizes_and_seeds(shots: int | None, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", ["a", "b"] * 50)
    reference = prepared(path, 3, test_seed=7, seed=1)
    data = prepared(path, shots, test_seed=7, seed=2)
    assert texts(data, "test") == texts(reference, "test")
    assert counts(data, "test") == {"a": 10, "b": 10}
    assert not set(texts(data, "test")) & {*texts(data, "train"), *texts(data, "validation")}
    assert "test: there is no such split; 20 examples of train are held out as one" in data.report.warnings
    for split in ("validation_file", "test_file"):
        given = prepared(path, shots, test_seed=7, **{split: write(tmp_path / "g.jsonl", ["a", "b"], "book")})
        assert len(given.texts[split.partition("_")[0]]) == 2
        assert ("test" in given.texts) == (split == "test_file")


MISTAKES = {
    "regression": ([0.5, 1.25] * 8, {"few_shot": 8}, "a regression has none; got 8; use max_train_samples"),
    "one shot": (
        ["a", "b"] * 8,
        {"few_shot": 1},
        "few_shot 1 leaves nothing to hold out .*expected 2 or more",
    ),
    "one each": (["a", "b", "c"], {"few_shot": 8}, "few_shot 8 leaves nothing to hold out"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_cannot_be_drawn_is_told(case: str, tmp_path: Path) -> None:
    labels, options, message = MISTAKES[case]
    with pytest.raises(ValueError, match=message):
        prepared(write(tmp_path / "t.jsonl", labels), **options)


def test_one_shot_with_a_validation_file(tmp_path: Path) -> None:
    validation = write(tmp_path / "v.jsonl", ["a", "b"], tag="book")
    data = prepared(write(tmp_path / "t.jsonl", ["a", "b"] * 8), 1, validation_file=validation)
    assert counts(data, "train") == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"few_shot": 0}, "few_shot is 0; expected 1 or more"),
        ({"few_shot": 8, "max_train_samples": 9}, "few_shot and max_train_samples both cut .*got 8 and 9"),
    ],
)
def test_config_refuses(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(train_file="t.csv", **options)
