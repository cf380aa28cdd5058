"""The probe against scikit-learn's own estimators, called plainly, and against arithmetic by hand."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_tasks import scaled
from scipy.special import expit, softmax
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss

from hf_lora.tasks import MULTI, REGRESSION, SINGLE, task_of
from hf_lora.tasks.probe import STRENGTHS, fit_probe


def features(rows: int, width: int = 6, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, width)) * rng.uniform(0.5, 3, width) + 2.0).astype(np.float32)


def classes(x: np.ndarray, labels: int, seed: int = 5) -> np.ndarray:
    """Labels with noise, so that the best penalty is neither the weakest nor the strongest."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(labels, x.shape[1]))
    return (x @ weight.T + 3 * rng.normal(size=(len(x), labels))).argmax(1)


@pytest.mark.parametrize("labels", [2, 4])
def test_single_labels_are_logistic_regression(labels: int) -> None:
    x, held = features(120), features(60, seed=1)
    y, held_y = classes(x, labels), classes(held, labels)
    probe = fit_probe(x, y, (held, held_y), task=task_of(SINGLE), labels=labels)
    losses = {}
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=5000, tol=1e-10).fit(scaled(x, x), y)
        losses[strength] = log_loss(held_y, model.predict_proba(scaled(held, x)), labels=range(labels))
    best = min(losses, key=losses.__getitem__)
    assert probe.strength == best
    assert probe.loss == pytest.approx(losses[best], rel=1e-3)
    model = LogisticRegression(C=best, max_iter=5000, tol=1e-10).fit(scaled(x, x), y)
    np.testing.assert_allclose(
        softmax(probe.logits(held), 1), model.predict_proba(scaled(held, x)), atol=2e-3
    )


def test_the_layer_takes_the_features_as_they_are() -> None:
    x = features(50)
    probe = fit_probe(x, classes(x, 3), None, task=task_of(SINGLE), labels=3)
    assert probe.strength == 10.0 and probe.loss is None and probe.examples == 50
    np.testing.assert_allclose(probe.logits(x), x.astype(float) @ probe.weight.T + probe.bias)


def test_class_weights_are_weights_of_the_examples() -> None:
    x = features(90)
    y = classes(x, 3)
    probe = fit_probe(x, y, None, task=task_of(SINGLE), labels=3, class_weights=[0.2, 1.0, 4.0])
    model = LogisticRegression(C=10.0, max_iter=5000, tol=1e-10, class_weight={0: 0.2, 1: 1.0, 2: 4.0})
    model.fit(scaled(x, x), y)
    np.testing.assert_allclose(softmax(probe.logits(x), 1), model.predict_proba(scaled(x, x)), atol=2e-3)


def test_multi_label_is_one_regression_for_each_label() -> None:
    x = features(100)
    y = np.stack([classes(x, 2, seed) for seed in (1, 2, 3)], 1).astype(np.float32)
    y[:, 2] = 1.0
    probe = fit_probe(x, y, None, task=task_of(MULTI), labels=3)
    for label in (0, 1):
        model = LogisticRegression(C=10.0, max_iter=5000, tol=1e-10).fit(scaled(x, x), y[:, label])
        np.testing.assert_allclose(
            expit(probe.logits(x)[:, label]), model.predict_proba(scaled(x, x))[:, 1], atol=2e-3
        )
    # A label that all examples carry: 100 + 1 against 0 + 1.
    np.testing.assert_allclose(probe.logits(x)[:, 2], np.log(101.0))


@pytest.mark.parametrize("targets", [1, 2])
def test_regression_is_ridge(targets: int) -> None:
    x = features(80)
    y = (x @ np.random.default_rng(2).normal(size=(6, targets)) + 7.0).astype(np.float32)
    probe = fit_probe(x, y if targets > 1 else y[:, 0], None, task=task_of(REGRESSION), labels=targets)
    model = Ridge(alpha=0.1).fit(scaled(x, x), y)
    np.testing.assert_allclose(probe.logits(x), model.predict(scaled(x, x)).reshape(80, targets), atol=1e-6)


def test_a_layer_without_bias_has_none() -> None:
    x = features(80)
    y = classes(x, 3)
    probe = fit_probe(x, y, None, task=task_of(SINGLE), labels=3, intercept=False)
    np.testing.assert_array_equal(probe.bias, np.zeros(3))
    model = LogisticRegression(C=10.0, max_iter=5000, tol=1e-10, fit_intercept=False)
    model.fit(scaled(x, x, center=False), y)
    np.testing.assert_allclose(
        softmax(probe.logits(x), 1), model.predict_proba(scaled(x, x, center=False)), atol=2e-3
    )


def test_a_label_without_examples_is_never_the_answer() -> None:
    x = features(60)
    y = classes(x, 2) * 2  # 0 and 2 of four labels
    probe = fit_probe(x, y, None, task=task_of(SINGLE), labels=4)
    logits = probe.logits(x)
    assert set(logits.argmax(1)) == {0, 2}
    np.testing.assert_array_equal(probe.weight[[1, 3]], 0.0)


def test_one_class_alone_is_certain() -> None:
    x = features(5)
    probe = fit_probe(x, np.ones(5, int), None, task=task_of(SINGLE), labels=3)
    assert (probe.logits(x).argmax(1) == 1).all()


def test_losses_are_those_of_training() -> None:
    logits = np.array([[2.0, 0.0], [0.0, 1.0]])
    single = -(2 - np.log(np.exp(2) + 1) + 0 - np.log(1 + np.exp(1))) / 2
    assert task_of(SINGLE).losses(logits, np.array([0, 0])).mean() == pytest.approx(single)
    targets = np.array([[1.0, 0.0], [0.0, 1.0]])
    multi = -(np.log(expit(2)) + np.log(0.5) + np.log(0.5) + np.log(expit(1))) / 4
    assert task_of(MULTI).losses(logits, targets).mean() == pytest.approx(multi)
    assert task_of(REGRESSION).losses(np.array([[1.0], [3.0]]), np.array([0.0, 1.0])).mean() == pytest.approx(
        2.5
    )
