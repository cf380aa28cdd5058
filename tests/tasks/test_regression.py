from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.dummy import DummyRegressor

from hf_lora.tasks import REGRESSION, task_of
from hf_lora.tasks.calibration import Calibration

TASK = task_of(REGRESSION)
LOGITS = torch.tensor([[2.0, 0.0, -1.0], [-3.0, 0.5, 0.4]])


def test_predictions_are_the_outputs() -> None:
    assert list(TASK.predictions(LOGITS[:, :1], ("stars",), Calibration())) == [
        {"label": "stars", "score": 2.0, "scores": {"stars": 2.0}},
        {"label": "stars", "score": -3.0, "scores": {"stars": -3.0}},
    ]
    assert next(TASK.predictions(LOGITS[:1], ("a", "b", "c"), Calibration())) == {
        "label": ["a", "b", "c"],
        "score": [2.0, 0.0, -1.0],
        "scores": {"a": 2.0, "b": 0.0, "c": -1.0},
    }


def test_the_constant_baseline_is_the_mean() -> None:
    values = np.array([1.0, 2.0, 6.0])
    dummy = DummyRegressor().fit(np.zeros((3, 1)), values)
    assert TASK.constant(values, 1) == dummy.predict(np.zeros((1, 1)))


@pytest.mark.parametrize("value", ["four", "nan", "inf", [1]])
def test_what_is_no_finite_number_is_an_error(value) -> None:
    with pytest.raises(ValueError, match=r"in the test split, row 2: expected a finite number"):
        TASK.encode([1, value], ("score",), "test")
