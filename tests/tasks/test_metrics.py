"""Every metric against scikit-learn, scipy or arithmetic by hand."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from transformers import EvalPrediction

from hf_lora.tasks import TASKS
from hf_lora.tasks.metrics import METRICS, UndefinedMetricError, class_errors, compute_metrics

# Three classes: 0 is right twice of three, 1 once of two, 2 always (once).
REFERENCES = [0, 0, 0, 1, 1, 2]
PREDICTIONS = [0, 0, 1, 1, 2, 2]
BY_HAND = {
    "accuracy": 4 / 6,
    "precision_macro": (1 + 1 / 2 + 1 / 2) / 3,
    "precision_micro": 4 / 6,
    "precision_weighted": (3 * 1 + 2 * 1 / 2 + 1 * 1 / 2) / 6,
    "recall_macro": (2 / 3 + 1 / 2 + 1) / 3,
    "recall_micro": 4 / 6,
    "recall_weighted": 4 / 6,
    "f1_macro": (4 / 5 + 1 / 2 + 2 / 3) / 3,
    "f1_micro": 4 / 6,
    "f1_weighted": (3 * 4 / 5 + 2 * 1 / 2 + 1 * 2 / 3) / 6,
    "matthews_correlation": (4 * 6 - (3 * 2 + 2 * 2 + 1 * 2)) / np.sqrt((36 - 12) * (36 - 14)),
}
TRUTH_ROWS = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1]])
GIVEN_ROWS = np.array([[1, 0, 1], [0, 1, 1], [0, 1, 0], [1, 0, 1]])


def compute(name: str, **inputs: Any) -> dict[str, float]:
    return METRICS.get(name)().compute(**inputs)


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_class_metric_by_hand(name: str) -> None:
    result = compute(name, predictions=PREDICTIONS, references=REFERENCES)
    assert result == {name: pytest.approx(BY_HAND[name])}


@pytest.mark.parametrize("score", ["f1", "precision", "recall"])
@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
def test_multi_label_average_is_that_of_sklearn(score: str, average: str) -> None:
    expected = getattr(sklearn.metrics, f"{score}_score")(TRUTH_ROWS, GIVEN_ROWS, average=average)
    result = compute(f"{score}_{average}", predictions=GIVEN_ROWS, references=TRUTH_ROWS)
    assert result == {f"{score}_{average}": pytest.approx(expected)}


def test_multi_label_accuracy_needs_the_whole_row() -> None:
    assert compute("accuracy", predictions=GIVEN_ROWS, references=TRUTH_ROWS) == {"accuracy": 0.25}


def test_class_that_is_never_predicted_has_precision_zero() -> None:
    assert compute("precision_macro", predictions=[0, 0], references=[0, 1]) == {"precision_macro": 0.25}


def test_roc_auc_binary_counts_ordered_pairs() -> None:
    # Positives 0.8 and 0.3 against negatives 0.1 and 0.4: three of four pairs are in order.
    result = compute("roc_auc", prediction_scores=[0.1, 0.4, 0.8, 0.3], references=[0, 0, 1, 1])
    assert result == {"roc_auc": 0.75}


def test_roc_auc_of_classes_is_one_versus_rest() -> None:
    scores = np.random.default_rng(0).dirichlet(np.ones(3), size=30)
    references = np.arange(30) % 3
    expected = sklearn.metrics.roc_auc_score(references, scores, multi_class="ovr", average="macro")
    assert compute("roc_auc", prediction_scores=scores, references=references)["roc_auc"] == pytest.approx(
        expected
    )


def test_roc_auc_multi_label_is_that_of_sklearn() -> None:
    scores = np.random.default_rng(1).normal(size=TRUTH_ROWS.shape)
    expected = sklearn.metrics.roc_auc_score(TRUTH_ROWS, scores, average="macro")
    assert compute("roc_auc", prediction_scores=scores, references=TRUTH_ROWS)["roc_auc"] == pytest.approx(
        expected
    )


def test_roc_auc_without_a_class_is_undefined() -> None:
    with pytest.raises(UndefinedMetricError, match="no or every example has class 2"):
        compute("roc_auc", prediction_scores=[[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]], references=[0, 1])


def test_regression_metrics() -> None:
    predictions, references = [1.0, 2.0, 4.0], [1.0, 3.0, 2.0]
    inputs = {"predictions": predictions, "references": references}
    assert compute("mse", **inputs) == {"mse": pytest.approx(5 / 3), "rmse": pytest.approx((5 / 3) ** 0.5)}
    assert compute("spearman", **inputs) == {"spearman": pytest.approx(0.5)}
    expected = scipy.stats.pearsonr(predictions, references).statistic
    assert compute("pearson", **inputs) == {"pearson": pytest.approx(expected)}


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_constant_scores_have_no_correlation(name: str) -> None:
    with pytest.raises(UndefinedMetricError, match="that vary"):
        compute(name, predictions=[1.0, 1.0], references=[1.0, 2.0])


def test_class_errors_by_hand() -> None:
    expected = {
        "a": {"support": 3, "wrong": 1, "false_positives": 0},
        "b": {"support": 2, "wrong": 1, "false_positives": 1},
        "c": {"support": 1, "wrong": 0, "false_positives": 1},
        "d": {"support": 0, "wrong": 0, "false_positives": 0},
    }
    assert class_errors(PREDICTIONS, REFERENCES, list("abcd")) == expected


def test_class_errors_multi_label_by_hand() -> None:
    assert class_errors(GIVEN_ROWS, TRUTH_ROWS, list("abc")) == {
        "a": {"support": 2, "wrong": 1, "false_positives": 1},
        "b": {"support": 2, "wrong": 0, "false_positives": 0},
        "c": {"support": 2, "wrong": 0, "false_positives": 1},
    }


def test_combine_adds_batches() -> None:
    combined = evaluate.combine(
        [METRICS.get(name)() for name in ("accuracy", "f1_macro", "f1_micro", "roc_auc")]
    )
    combined.add_batch(predictions=[0, 1], references=[0, 1], prediction_scores=[0.1, 0.9])
    combined.add_batch(predictions=[0, 1], references=[1, 1], prediction_scores=[0.2, 0.8])
    expected = {"accuracy": 0.75, "f1_macro": (2 / 3 + 4 / 5) / 2, "f1_micro": 0.75, "roc_auc": 1.0}
    assert combined.compute() == pytest.approx(expected)


def test_metric_is_reusable_after_an_undefined_result() -> None:
    metric = METRICS.get("roc_auc")()
    with pytest.raises(UndefinedMetricError):
        metric.compute(prediction_scores=[0.1, 0.2], references=[0, 0])
    assert metric.compute(prediction_scores=[0.1, 0.2], references=[0, 1]) == {"roc_auc": 1.0}


@pytest.mark.slow
def test_fresh_process_without_network_leaves_no_metric_files(tmp_path: Path) -> None:
    code = (
        "import socket; socket.socket.connect = None\n"
        "from hf_lora.tasks.metrics import METRICS\n"
        "names = [name for name, make in METRICS.items() if make()]\n"
        "print(METRICS.get('accuracy')().compute(predictions=[0, 1], references=[0, 0]))"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'accuracy': 0.5}"
    assert not (tmp_path / "hf" / "metrics").exists()


def test_processes_that_share_results_use_files(tmp_path: Path) -> None:
    options = {"num_process": 2, "process_id": 1, "experiment_id": "shared", "cache_dir": str(tmp_path)}
    metric = METRICS.get("accuracy")(**options)
    assert not metric.keep_in_memory
    assert (tmp_path / "local_metric" / "accuracy").is_dir()


def test_single_label_results_are_those_of_sklearn() -> None:
    generator = np.random.default_rng(2)
    logits, references = generator.normal(size=(40, 3)), np.arange(40) % 3
    given = logits.argmax(axis=1)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    results = compute_metrics("single_label_classification", list("abc"))(EvalPrediction(logits, references))
    assert results == pytest.approx(
        {
            "accuracy": sklearn.metrics.accuracy_score(references, given),
            "f1_macro": sklearn.metrics.f1_score(references, given, average="macro"),
            "f1_weighted": sklearn.metrics.f1_score(references, given, average="weighted"),
            "precision_macro": sklearn.metrics.precision_score(references, given, average="macro"),
            "recall_macro": sklearn.metrics.recall_score(references, given, average="macro"),
            "matthews_correlation": sklearn.metrics.matthews_corrcoef(references, given),
            "roc_auc": sklearn.metrics.roc_auc_score(references, probabilities, multi_class="ovr"),
        }
    )
    json.dumps(results)


def test_binary_roc_auc_ranks_by_the_positive_class() -> None:
    logits, references = np.array([[2.0, 0.0], [0.0, 1.0], [0.5, 0.0], [1.0, 0.0]]), np.array([0, 1, 1, 0])
    results = compute_metrics("single_label_classification", ["no", "yes"])(
        EvalPrediction(logits, references)
    )
    assert results["roc_auc"] == 1.0


def test_multi_label_results_are_those_of_sklearn() -> None:
    generator = np.random.default_rng(3)
    logits, references = generator.normal(size=(40, 3)), generator.integers(0, 2, size=(40, 3))
    given = (1 / (1 + np.exp(-logits)) > 0.5).astype(int)
    prediction = EvalPrediction(logits.astype(np.float32), references.astype(np.float32))
    results = compute_metrics("multi_label_classification", list("abc"))(prediction)
    assert results == pytest.approx(
        {
            "accuracy": sklearn.metrics.accuracy_score(references, given),
            "f1_macro": sklearn.metrics.f1_score(references, given, average="macro"),
            "f1_micro": sklearn.metrics.f1_score(references, given, average="micro"),
            "precision_micro": sklearn.metrics.precision_score(references, given, average="micro"),
            "recall_micro": sklearn.metrics.recall_score(references, given, average="micro"),
            "roc_auc": sklearn.metrics.roc_auc_score(references, logits, average="macro"),
        }
    )


def test_regression_results() -> None:
    logits, references = np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 3.0, 2.0], dtype=np.float32)
    results = compute_metrics("regression", ["score"])(EvalPrediction(logits, references))
    assert results == pytest.approx(
        {
            "pearson": scipy.stats.pearsonr(logits[:, 0], references).statistic,
            "spearman": 0.5,
            "mse": 5 / 3,
            "rmse": (5 / 3) ** 0.5,
        }
    )


def test_first_of_several_outputs_is_the_logits() -> None:
    logits, references = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 1])
    measure = compute_metrics("single_label_classification", ["a", "b"])
    several = EvalPrediction((logits, np.zeros((2, 5, 7))), references)
    assert measure(several) == measure(EvalPrediction(logits, references))


def test_undefined_metric_is_left_out_and_explained_once(caplog: pytest.LogCaptureFixture) -> None:
    measure = compute_metrics("single_label_classification", list("abc"))
    prediction = EvalPrediction(np.eye(3)[:2], np.array([0, 1]))
    with caplog.at_level(logging.WARNING, logger="hf_lora.tasks.metrics"):
        assert "roc_auc" not in measure(prediction)
        assert "roc_auc" not in measure(prediction)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["roc_auc is left out of the results: no or every example has class 2"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite(value: float) -> None:
    measure = compute_metrics("single_label_classification", ["a", "b"])
    with pytest.raises(ValueError, match=r"1 of 4 logits are NaN or infinite"):
        measure(EvalPrediction(np.array([[0.0, 1.0], [value, 0.0]]), np.array([0, 1])))


def test_logits_of_another_number_of_labels() -> None:
    measure = compute_metrics("single_label_classification", ["a", "b"])
    with pytest.raises(ValueError, match=r"logits have 3 columns; expected 2"):
        measure(EvalPrediction(np.zeros((4, 3)), np.zeros(4)))


def test_every_task_is_measured_by_known_metrics() -> None:
    assert all(name in METRICS for _, task in TASKS.items() for name in task.metric_names)


def test_the_area_of_large_logits_is_that_of_their_difference() -> None:
    rng = np.random.default_rng(1)
    references = rng.integers(0, 2, 60)
    logits = np.stack([np.zeros(60), 300 * (rng.normal(size=60) + references)], 1).astype(np.float32)
    area = compute_metrics("single_label_classification", ("a", "b"))(EvalPrediction(logits, references))[
        "roc_auc"
    ]
    assert area == pytest.approx(sklearn.metrics.roc_auc_score(references, logits[:, 1]))
