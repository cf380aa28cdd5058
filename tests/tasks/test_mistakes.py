"""Results on labelled data, against scikit-learn and arithmetic by hand."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_insight import INFO, LABELS, MULTI_INFO, REGRESSION_INFO, judge, judged, outputs
from sklearn import metrics as sk

from hf_lora.adapters.info import AdapterInfo
from hf_lora.tasks import MULTI, REGRESSION, task_of
from hf_lora.tasks.calibration import Calibration
from hf_lora.tasks.mistakes import measurer


def test_single_label_results_are_those_of_sklearn():
    made, references, logits, disabled = judged()
    for found, outs in ((made.confusion, logits), (made.confusion_disabled, disabled)):
        np.testing.assert_array_equal(found, sk.confusion_matrix(references, outs.argmax(1), labels=range(3)))
    assert made.metrics["accuracy"] == pytest.approx(sk.accuracy_score(references, logits.argmax(1)))
    wrong = [row for row in range(60) if logits[row].argmax() != references[row]]
    assert made.wrong == len(wrong) and made.examples == 60
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    losses = {row: -np.log(probabilities[row, references[row]]) for row in wrong}
    order = sorted(wrong, key=lambda row: -losses[row])[:12]
    assert [m.text.split()[1] for m in made.mistakes] == [str(row) for row in order]
    for mistake, row in zip(made.mistakes, order, strict=True):
        assert mistake.loss == pytest.approx(losses[row])
        assert mistake.confidence == pytest.approx(probabilities[row].max())
        assert (mistake.truth, mistake.given) == (LABELS[references[row]], LABELS[logits[row].argmax()])
        assert mistake.disabled == LABELS[disabled[row].argmax()]
    for label, index in zip(LABELS, range(3), strict=True):
        there = references == index
        expected = {
            "support": there.sum(),
            "wrong": (logits.argmax(1) != references)[there].sum(),
            "wrong_disabled": (disabled.argmax(1) != references)[there].sum(),
        }
        assert expected.items() <= made.classes[label].items()


def test_calibration_is_its_definition():
    made, references, logits, _ = judged()
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    confidence, correct = probabilities.max(1), logits.argmax(1) == references
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            error += inside.sum() / 60 * abs(correct[inside].mean() - confidence[inside].mean())
    assert made.calibration is not None and made.calibration.error == pytest.approx(error)
    assert made.calibration.accuracy == pytest.approx(correct.mean())
    assert sum(entry.count for entry in made.calibration.bins) == 60


def test_multi_label():
    truth = np.random.default_rng(3).integers(0, 2, (40, 3)).astype(np.float32)
    logits, disabled = outputs(4, 40), outputs(5, 40)
    made = judge(MULTI_INFO, ["t"] * 40, truth, logits, disabled, mistakes=3)
    given = logits > 0
    assert made.wrong == 40 - round(40 * sk.accuracy_score(truth, given))
    for index, label in enumerate(LABELS):
        _, (missed, _) = sk.confusion_matrix(truth[:, index], given[:, index])
        assert made.classes[label]["wrong"] == missed
    probabilities = 1 / (1 + np.exp(-logits))
    losses = [sk.log_loss(truth[row], probabilities[row], labels=[0, 1]) for row in range(40)]
    assert made.mistakes[0].loss == pytest.approx(max(losses), rel=1e-5)
    assert made.calibration is not None
    assert made.calibration.accuracy == pytest.approx((given == truth).mean())
    assert made.calibration.confidence == pytest.approx(np.maximum(probabilities, 1 - probabilities).mean())
    assert not made.confusion


def test_a_temperature_changes_confidences_and_losses_and_nothing_else():
    plain, references, logits, disabled = judged()
    info = AdapterInfo(LABELS, temperature=2.5)
    made = judge(info, ["t"] * 60, references, logits, disabled)
    # The same as of logits that are smaller.
    small = judge(INFO, ["t"] * 60, references, logits / 2.5, disabled / 2.5)
    assert (made.calibration, made.calibration_disabled) == (small.calibration, small.calibration_disabled)
    assert made.mistakes == small.mistakes and made.classes == plain.classes
    assert made.calibration.error != plain.calibration.error
    assert {**made.metrics, "calibration_error": 0} == {**plain.metrics, "calibration_error": 0}
    assert made.metrics["calibration_error"] == made.calibration.error


def test_thresholds_decide_and_leave_probabilities_alone():
    truth = np.random.default_rng(3).integers(0, 2, (40, 3)).astype(np.float32)
    logits, disabled = outputs(4, 40), outputs(5, 40)
    thresholds = (0.2, 0.5, 0.9)
    info = AdapterInfo(LABELS, MULTI, temperature=2.0, thresholds=thresholds)
    made = judge(info, ["t"] * 40, truth, logits, disabled, mistakes=40)
    scores = 1 / (1 + np.exp(-logits / 2))
    given = scores > thresholds
    assert (given != (logits > 0)).any(0).tolist() == [True, False, True]
    for average in ("macro", "micro"):
        expected = sk.f1_score(truth, given, average=average)
        assert made.metrics[f"f1_{average}"] == pytest.approx(expected)
    assert made.metrics["roc_auc"] == pytest.approx(sk.roc_auc_score(truth, scores))
    assert made.wrong == (given != truth).any(1).sum() == len(made.mistakes)
    without = 1 / (1 + np.exp(-disabled / 2)) > thresholds
    assert made.metrics_disabled["accuracy"] == pytest.approx(sk.accuracy_score(truth, without))
    for column, label in enumerate(LABELS):
        _, (missed, _) = sk.confusion_matrix(truth[:, column], given[:, column])
        assert made.classes[label]["wrong"] == missed
    losses = [sk.log_loss(truth[row], scores[row], labels=[0, 1]) for row in range(40)]
    wrong = (given != truth).any(1)
    assert [m.loss for m in made.mistakes] == pytest.approx(sorted(np.array(losses)[wrong], reverse=True))
    # The calibration error by an independent loop: of the likelier answer, whatever the thresholds.
    likelier, right = np.maximum(scores, 1 - scores).ravel(), ((scores > 0.5) == truth).ravel()
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (likelier > low) & (likelier <= low + 1 / 15)
        if inside.any():
            error += inside.sum() / 120 * abs(right[inside].mean() - likelier[inside].mean())
    assert made.calibration.error == pytest.approx(error)
    assert made.metrics["calibration_error"] == pytest.approx(error)
    assert measurer(info.task, LABELS, info.calibration)(logits, truth) == made.metrics
    assert task_of(REGRESSION).reliability(logits[:, :1], truth[:, 0], Calibration()) is None


def test_regression():
    truth = np.array([1.0, 2.0, 3.0])
    logits, disabled = np.array([[1.5], [2.0], [1.0]]), np.zeros((3, 1))
    made = judge(REGRESSION_INFO, ["a", "b", "c"], truth, logits, disabled, mistakes=2)
    assert made.points == [(1.0, 1.5), (2.0, 2.0), (3.0, 1.0)]
    assert [(m.text, m.truth, m.given, m.disabled, m.loss) for m in made.mistakes] == [
        ("c", "3", "1", "0", 4.0),
        ("a", "1", "1.5", "0", 0.25),
    ]
    assert made.metrics["mse"] == pytest.approx(4.25 / 3) and made.calibration is None
