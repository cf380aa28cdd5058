"""Lists as text, separators and vectors, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from hf_lora.tasks.layouts import are_lists, are_vectors, as_bit, split_names


@pytest.mark.parametrize(
    ("values", "expected", "words"),
    [
        (["['a', 'b']", "['b']", "[]", ""], [["a", "b"], ["b"], [], []], "lists written as text"),
        (['["a", "b"]', '["it\'s"]'], [["a", "b"], ["it's"]], "lists written as text"),
        (["[1, 1, 0]", "[0, 0, 1]"], [[1, 1, 0], [0, 0, 1]], "lists written as text"),
        (["[1., 0.]", "[True, False]"], [[1.0, 0.0], [True, False]], "lists written as text"),
        (["('a', 'b')", "('b',)"], [["a", "b"], ["b"]], "lists written as text"),
        (["a|b, c", "a"], [["a", "b, c"], ["a"]], "names with '|' between them"),
        (["a; b", "a;"], [["a", "b"], ["a"]], "names with ';' between them"),
        (["a, b", "c", ""], [["a", "b"], ["c"], []], "names with ',' between them"),
        (["(other)", "a|b"], [["(other)"], ["a", "b"]], "names with '|' between them"),
        ([["a"], None], [["a"], None], "lists"),
    ],
)
def test_texts_become_lists(values: list[Any], expected: list[Any], words: str) -> None:
    assert split_names(values, "train") == (expected, words)


def test_a_known_name_is_not_divided() -> None:
    assert split_names(["b, c", "a, b, c"], "test", ("a", "b, c"))[0] == [["b, c"], ["a", "b", "c"]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["['a']", "['a' 'b']"], r"label \"\['a' 'b'\]\" in the train split, row 2: expected a list such as"),
        (["[1 0 1]", "[0 0 1]"], r"'\[1 0 1\]' in the train split, row 1: expected a list"),
        (["['a']", "b"], r"'b' in the train split, row 2: expected a list"),
        (["[a, b]"], r"row 1: expected a list"),
        (["{'a': 1}", "{'a': 0}"], r"row 1: expected a list"),
        (["1 0 1", "0 0 1"], r"row 1: expected a list"),
        (["[['a']]"], r"row 1: expected a list"),
        (["[" * 300_000 + "]"], r"row 1: expected a list"),
        (["a;b", "c,d"], r"'c,d' in the train split, row 2: both ';' and ','"),
    ],
)
def test_what_cannot_be_read_is_refused(values: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_names(values, "train")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 0], [0, 1]], True),
        ([["1", "0"], ["0", "0"]], True),
        ([[1.0, 0.0, 1.0]], True),
        ([[True, False]], True),
        ([[1, 0], [0]], False),
        ([[1], [0]], False),
        ([[1, 2], [0, 1]], False),
        ([["a", "b"]], False),
        ([[1, 0], None], False),
        ([], False),
    ],
)
def test_vectors_have_one_length_and_two_values(rows: list[Any], expected: bool) -> None:
    assert are_vectors(rows) is expected


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["[a", "b]"], False),
        (["[x]"], True),
        (["{'a'}", "{'b', 'c'}"], True),
        (["(a)", "(b)"], False),
        ([], False),
    ],
)
def test_texts_in_brackets_are_lists_if_they_can_be_read(texts: list[str], expected: bool) -> None:
    assert are_lists(texts) is expected


def test_bits() -> None:
    assert [as_bit(value) for value in (0, 1.0, True, "0.0", " True ", "1")] == [0, 1, 1, 0, 1, 1]
    assert [as_bit(value) for value in (2, 0.5, "yes", None, "", [1], float("nan"))] == [None] * 7
