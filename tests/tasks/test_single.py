from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import softmax
from sklearn.dummy import DummyClassifier

from hf_lora.tasks import SINGLE, task_of
from hf_lora.tasks.calibration import Calibration

TASK = task_of(SINGLE)
LABELS = ("a", "b", "c")
LOGITS = torch.tensor([[2.0, 0.0, -1.0], [-3.0, 0.5, 0.4]])


def test_predictions_by_hand() -> None:
    # exp of 1, 0 and -0.5, which make up 4.3248.
    first = {"a": math.e / 4.3248127, "b": 1 / 4.3248127, "c": math.exp(-0.5) / 4.3248127}
    results = list(TASK.predictions(LOGITS, LABELS, Calibration(2.0)))
    assert results[0] == {"label": "a", "score": pytest.approx(first["a"]), "scores": pytest.approx(first)}
    assert [result["label"] for result in results] == ["a", "b"]
    assert results[1]["score"] == results[1]["scores"]["b"]
    plain = next(TASK.predictions(LOGITS, LABELS, Calibration()))
    assert plain["score"] == pytest.approx(math.exp(2) / (math.exp(2) + 1 + math.exp(-1)))


@settings(deadline=None)
@given(
    logits=arrays(np.float32, (5, 3), elements=st.floats(-50, 50, width=32)),
    temperature=st.floats(0.05, 20),
)
def test_a_temperature_changes_scores_and_no_label(logits: np.ndarray, temperature: float) -> None:
    outputs, calibration = torch.from_numpy(logits), Calibration(temperature)
    results = list(TASK.predictions(outputs, LABELS, calibration))
    assert [result["label"] for result in results] == [LABELS[row.argmax()] for row in logits]
    expected = softmax(logits.astype(np.float64) / temperature, axis=1)
    np.testing.assert_allclose(TASK.probabilities(outputs, calibration).numpy(), expected, atol=1e-4)
    for result, row in zip(results, expected, strict=True):
        assert result["score"] == pytest.approx(row.max(), abs=1e-4)


def test_the_constant_baseline_is_the_majority_of_the_training_labels() -> None:
    labels = np.array([2, 2, 1, 2, 0, 1])
    logits = TASK.constant(labels, 3)
    dummy = DummyClassifier(strategy="prior").fit(np.zeros((6, 1)), labels)
    np.testing.assert_allclose(softmax(logits), dummy.predict_proba(np.zeros((1, 1)))[0])
    assert logits.argmax() == 2
    # A label without examples has a finite logit.
    assert np.isfinite(TASK.constant(np.array([0, 0]), 3)).all()


def test_margins_rank_as_probabilities_do_and_do_not_saturate() -> None:
    rng = np.random.default_rng(0)
    for classes in (2, 5):
        logits = rng.normal(size=(50, classes)) * 3
        p = scipy.special.softmax(logits, 1)
        np.testing.assert_allclose(TASK.ranking(logits), np.log(p / (1 - p)), rtol=1e-9, atol=1e-9)
    large = np.array([[400.0, 0.0], [500.0, 0.0], [0.0, 300.0]])
    np.testing.assert_allclose(TASK.ranking(large), [[400, -400], [500, -500], [-300, 300]])


def test_confusion_is_that_of_sklearn_with_all_labels() -> None:
    truth, given = np.array([0, 0, 3, 1]), np.array([0, 1, 3, 1])
    expected = sklearn.metrics.confusion_matrix(truth, given, labels=range(5)).tolist()
    assert TASK.confusion(truth, given, 5) == expected
    assert expected[0] == [1, 1, 0, 0, 0]


def test_class_weights_are_weights_of_the_examples() -> None:
    assert TASK.example_weights(np.array([0, 2, 2]), [0.5, 1.0, 3.0]).tolist() == [0.5, 3.0, 3.0]
