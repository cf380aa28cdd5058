"""What holds for every task, and what the tasks have in common, by hand and against scikit-learn."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch

from hf_lora.tasks import MULTI, REGRESSION, SINGLE, TASKS, Task, task_of
from hf_lora.tasks.calibration import Calibration
from hf_lora.tasks.labels import infer_task

EACH = pytest.mark.parametrize("task", [task for _, task in TASKS.items()], ids=list(TASKS))
LOGITS = np.array([[1.0, -1.0], [0.5, 2.0]])


def references(task: Task, count: int = 2, labels: int = 2) -> np.ndarray:
    return task.sample_labels(labels)[torch.arange(count) % 2].numpy()


def test_an_unknown_problem_type_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"unknown problem type; got 'ranking'; expected one of single_label"
    ):
        task_of("ranking")


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [(None, None, SINGLE), (None, 3, SINGLE), (None, 1, REGRESSION), (MULTI, 1, MULTI)],
)
def test_a_config_without_problem_type_is_read_as_transformers_does(name, labels, expected) -> None:
    assert task_of(name, labels).name == expected


@EACH
def test_every_task_is_whole(task: Task) -> None:
    """Shapes of all that a task computes, so that a new one is tested with no new test code."""
    count, names = (2, ("a", "b")) if task.has_classes else (1, ("score",))
    truth = references(task, 30, count)
    logits = np.random.default_rng(0).normal(size=(30, count)).astype(np.float32)
    assert task.losses(logits, truth).shape == task.quality(logits, truth).shape == (30,)
    assert task.constant(truth, count).shape == (count,)
    assert task.example_weights(truth, None).tolist() == [1.0] * 30
    calibration = task.calibrate(logits, truth)
    assert (calibration.temperature is not None) == task.has_classes
    assert (calibration.thresholds is not None) == task.has_thresholds
    assert (task.reliability(logits, truth, calibration) is not None) == task.has_classes
    task.check_calibration(calibration, count)
    assert task.decide(logits, calibration).shape == task.truth(truth).shape
    assert {"predictions", "references"} <= task.metric_inputs(logits, truth).keys()
    assert task.words and "_" not in task.words
    column = datasets.Dataset.from_dict({"labels": truth.tolist()}).cast_column("labels", task.feature)
    assert len(task.count(column["labels"][:], count)) == (count if task.has_classes else 0)
    first = next(task.predictions(torch.from_numpy(logits), names, calibration))
    assert first.keys() == {"label", "score", "scores"} and tuple(first["scores"]) == names
    assert task.changed(logits, logits, calibration) == 0
    assert task.changed(logits, -logits, Calibration()) == (30 if task.has_classes else 0)


@EACH
def test_only_multi_label_has_thresholds_and_only_classes_a_temperature(task: Task) -> None:
    for calibration, usable in (
        (Calibration(2.0), task.has_classes),
        (Calibration(None, (0.2, 0.7)), task.has_thresholds),
    ):
        if usable:
            task.check_calibration(calibration, 2)
        else:
            with pytest.raises(ValueError, match="expected null"):
                task.check_calibration(calibration, 2)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["a", "b", None], SINGLE),
        (["1", "2"], SINGLE),
        ([True, False], SINGLE),
        ([1.0, 2.0], REGRESSION),
        (["1", "2.5", ""], REGRESSION),
        (["1", "2e1"], REGRESSION),
        (["1.5", "a"], SINGLE),
        ([["a"], []], MULTI),
    ],
)
def test_the_task_is_inferred_from_the_values(values, expected) -> None:
    assert infer_task(values).name == expected


def test_quality_by_hand() -> None:
    assert task_of(SINGLE).quality(LOGITS, np.array([0, 0])).tolist() == [1.0, 0.0]
    assert task_of(MULTI).quality(LOGITS, np.array([[1, 0], [0, 1]])).tolist() == [1.0, 0.5]
    assert task_of(REGRESSION).quality(LOGITS[:, :1], np.array([1.0, 2.5])).tolist() == [0.0, -4.0]


def test_quality_counts_as_the_loss_does() -> None:
    logits = np.array([[1.0, -1.0], [2.0, 0.5], [0.5, 2.0]])
    # Weighted accuracy: 1 * 1 + 4 * 0 + 4 * 1 of 9; its mean over the three is 5 / 9.
    weighted = task_of(SINGLE).quality(logits, np.array([0, 1, 1]), np.array([1.0, 4.0]))
    np.testing.assert_allclose(weighted, [1 / 3, 0.0, 4 / 3])
    several = task_of(MULTI).quality(logits, np.array([[1, 0], [0, 1], [0, 0]]), np.array([1.0, 3.0]))
    np.testing.assert_allclose(several, [1.0, 0.75, 0.0])
