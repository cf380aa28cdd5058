from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn.dummy import DummyClassifier, DummyRegressor

from hf_lora.recipe.compare import constant_logits
from hf_lora.tasks.labels import MULTI, REGRESSION, SINGLE


def test_the_majority_is_that_of_the_training_labels() -> None:
    labels = np.array([2, 2, 1, 2, 0, 1])
    logits = constant_logits(labels, 3, SINGLE)
    dummy = DummyClassifier(strategy="prior").fit(np.zeros((6, 1)), labels)
    np.testing.assert_allclose(softmax(logits), dummy.predict_proba(np.zeros((1, 1)))[0])
    assert logits.argmax() == 2


def test_a_label_without_examples_has_a_finite_logit() -> None:
    assert np.isfinite(constant_logits(np.array([0, 0]), 3, SINGLE)).all()


def test_multi_label_decides_each_label_by_its_own_majority() -> None:
    labels = np.array([[1, 0, 1], [1, 0, 0], [0, 0, 1], [1, 0, 1]], float)
    logits = constant_logits(labels, 3, MULTI)
    assert (logits > 0).tolist() == [True, False, True]
    assert expit(logits[0]) == pytest.approx(3.5 / 5)


def test_a_regression_answers_with_the_mean() -> None:
    values = np.array([1.0, 2.0, 6.0])
    dummy = DummyRegressor().fit(np.zeros((3, 1)), values)
    assert constant_logits(values, 1, REGRESSION) == dummy.predict(np.zeros((1, 1)))
