"""What decides on a problem type, what is doubtful about labels, and what is refused."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from hf_lora.tasks import MULTI, REGRESSION, SINGLE, task_of
from hf_lora.tasks.labels import LabelScheme, learn_labels


def learned(values: list[Any], problem_type: str | None = None) -> LabelScheme:
    return learn_labels(datasets.Dataset.from_dict({"label": values}), "label", problem_type)


@pytest.mark.parametrize(
    ("values", "task", "why", "warning"),
    [
        (["a", "b"], SINGLE, "the labels are text", ""),
        (["1", "2"], SINGLE, "the labels are whole numbers", ""),
        ([1, 2], SINGLE, "the labels are whole numbers", ""),
        ([True, False], SINGLE, "the labels are booleans", ""),
        ([["a"], ["b"]], MULTI, "the labels are lists", ""),
        (["0.5", "2"], REGRESSION, "the labels are numbers with a decimal point", ""),
        (["0.0", "1.0"], REGRESSION, "the labels are numbers with a decimal point", "2 different whole numbers"),
        ([0.0, 1.0], REGRESSION, "the labels are numbers with a decimal point", "are classes, set problem_type"),
        (["1", "1.0", "0"], REGRESSION, "the labels are numbers with a decimal point", "2 different whole"),
        (["pos", "pos ", "neg"], SINGLE, "the labels are text", "unseen characters alone: 'pos' and 'pos '"),
        (["Pos", "pos", "neg"], SINGLE, "the labels are text", "unseen characters alone: 'Pos' and 'pos'"),
        (["True", "true", "false"], SINGLE, "the labels are text", "alone: 'True' and 'true'"),
        (["pos", "pos\u200b", "n"], SINGLE, "the labels are text", "alone: 'pos' and 'pos\\u200b'"),
        (["é", "e\u0301", "n"], SINGLE, "the labels are text", "unseen characters alone: "),
        (["a", "nan", "b"], SINGLE, "the labels are text", "the label 'nan' is taken as a name"),
        (["a", "NA", "b"], SINGLE, "the labels are text", "the label 'NA' is taken as a name"),
        (["1", "2", "1", "x"], SINGLE, "the labels are text", "3 of 4 labels are numbers; all are taken as names"),
        (list(range(30)) * 2, SINGLE, "the labels are whole numbers", "30 different whole numbers, taken as"),
        (list(range(30)) * 9, SINGLE, "the labels are whole numbers", ""),
    ],
)  # fmt: skip
def test_the_task_has_a_reason_and_doubts_are_told(
    values: list[Any], task: str, why: str, warning: str
) -> None:
    scheme = learned(values)
    assert (scheme.task.name, scheme.why) == (task, why)
    assert warning in "".join(scheme.warnings) and len(scheme.warnings) == bool(warning)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["1.5", "nan", "2.5"], r"1 of 3 labels in 'label' are no numbers; the first is 'nan' in row 2; set problem"),
        (["1.5", "2.5", "inf"], r"the first is 'inf' in row 3"),
        (["1.5", "2.5", "None", "3"], r"the first is 'None' in row 3"),
        (["1,5", "2", "3,25"], r"look like numbers with a decimal comma; got '1,5'; expected a decimal point"),
        (["1 0 1", "0 0 1"], r"look like vectors of 0 and 1; got '1 0 1'"),
        (["a;b", "b;c", "c"], r"may be several, with ';' between them; got 'a;b'; set problem_type"),
        (["a|b", "a|c", "b|c"], r"may be several, with '\|' between them"),
        (["food", "food, drink", "drink"], r"may be several, with ',' between them; got 'food, drink'"),
    ],
)  # fmt: skip
def test_what_may_be_two_things_is_refused(values: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learned(values)
    # Said so, they are names.
    assert set(learned(values, SINGLE).names) == set(values)


def test_names_with_commas_are_names() -> None:
    assert learned(["Albany, NY", "New York, NY", "arts; music"]).task.name == SINGLE


def test_infinite_numbers_are_no_targets() -> None:
    for values in ([1.5, float("inf")], ["1.5", "inf"]):
        with pytest.raises(ValueError, match="row 2: expected a finite number for a regression"):
            task_of(REGRESSION).encode(values, ("label",), "train")


def test_whole_numbers_have_one_spelling() -> None:
    scheme = learned(["1", "1.0", "0.0", "10", "007"], SINGLE)
    assert scheme.names == ("0", "1", "007", "10")
    assert scheme.task.encode(["1", "1.0", "0", "7" and "007", 10.0], scheme.names, "test") == [1, 1, 0, 2, 3]
    assert scheme.warnings == ("train: labels such as '0.0' are taken as whole numbers",)
    assert learned([1.0, 0.0], SINGLE).names == learned(["1.0", "0.0"], SINGLE).names == ("0", "1")
    # Versions are names.
    assert learned(["1.0", "1.10", "2.0"], SINGLE).names == ("1.0", "1.10", "2.0")
    with pytest.raises(ValueError, match="the train split has one label only"):
        learned(["1", "1.0"], SINGLE)


def test_another_spelling_of_a_known_label() -> None:
    single = task_of(SINGLE)
    assert single.encode([True, "True", "false"], ("false", "true"), "test") == [1, 1, 0]
    assert single.encode([True, "true"], ("False", "True"), "test") == [1, 1]
    with pytest.raises(ValueError, match=r"2 labels known: 'neg', 'pos'; did you mean 'pos'\?"):
        single.encode(["Pos "], ("neg", "pos"), "test")
