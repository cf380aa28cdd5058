from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit

from hf_lora.tasks import MULTI, task_of
from hf_lora.tasks.calibration import Calibration

TASK = task_of(MULTI)
LABELS = ("a", "b", "c")
LOGITS = torch.tensor([[2.0, 0.0, -1.0], [-3.0, 0.5, 0.4]])


def test_predictions_by_hand() -> None:
    calibration = Calibration(0.5, (0.99, 0.5, 0.1))
    results = list(TASK.predictions(LOGITS, LABELS, calibration))
    # The sigmoids of 4, 0, -2 and of -6, 1, 0.8: only the third of the first text is above its threshold.
    scores = [expit(row / 0.5) for row in LOGITS.double().numpy()]
    for result, row in zip(results, scores, strict=True):
        assert result["scores"] == pytest.approx(dict(zip(LABELS, row, strict=True)))
    assert [result["label"] for result in results] == [["c"], ["b", "c"]]
    assert results[1]["score"] == [results[1]["scores"]["b"], results[1]["scores"]["c"]]
    decisions = TASK.decide(LOGITS.numpy(), calibration)
    assert decisions.tolist() == [[False, False, True], [False, True, True]]
    # Without thresholds those above one half, which a logit of 0 is not.
    plain = TASK.predictions(LOGITS, LABELS, Calibration(0.5))
    assert [result["label"] for result in plain] == [["a"], ["b", "c"]]
    assert TASK.changed(LOGITS.numpy(), LOGITS.numpy() * [1, 1, -1], Calibration()) == 2


def test_the_constant_baseline_decides_each_label_by_its_own_majority() -> None:
    labels = np.array([[1, 0, 1], [1, 0, 0], [0, 0, 1], [1, 0, 1]], float)
    logits = TASK.constant(labels, 3)
    assert (logits > 0).tolist() == [True, False, True]
    assert expit(logits[0]) == pytest.approx(3.5 / 5)


def test_an_example_without_labels_counts_as_one_of_one_label_more() -> None:
    rows = [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    assert TASK.labels_of(rows, 3) == [(0, 2), (3,)]
    assert TASK.count(rows, 3) == [1, 0, 1] and TASK.count([], 3) == [0, 0, 0]


def test_labels_that_all_examples_have_teach_nothing() -> None:
    with pytest.raises(ValueError, match="every example of the train split has all 2 labels of 'tags'"):
        TASK.learn([["a", "b"], ["b", "a"]], "tags", ())
    assert TASK.learn([["a", "b"], ["b"]], "tags", ()) == ("a", "b")


@pytest.mark.parametrize(
    ("value", "message"),
    [("a|a", "it has a label twice"), (3, "expected a list of labels"), (None, "have no label")],
)
def test_a_row_that_cannot_be_read_is_named(value, message) -> None:
    with pytest.raises(ValueError, match=message):
        TASK.encode(["a|b", value], ("a", "b"), "train")
    assert TASK.encode(["a|b", ""], ("a", "b"), "train") == [[1.0, 1.0], [0.0, 0.0]]
