"""What differs between problem types: the base class of the tasks, and the table of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from hf_lora._choices import Registry
from hf_lora._files import is_number, shortened
from hf_lora.tasks.calibration import (
    MIN_EXAMPLES,
    TEMPERATURES,
    Calibration,
    Reliability,
    fit_temperature,
    reliability,
)
from hf_lora.tasks.probe import Fit, Problem

SINGLE = "single_label_classification"
MULTI = "multi_label_classification"
REGRESSION = "regression"


class Task(ABC):
    """One problem type. Outputs ("logits") are `(examples, labels)` in the order of the label names.

    References are as `encode` makes them: class ids `(examples,)`, rows of 0 and 1, or numbers.
    """

    name: str
    """The value of `problem_type` in a config, a data config and hf_lora.json."""
    baseline: str
    """The constant baseline, for people."""
    probe: str
    """The linear probe, for people."""
    metric_names: tuple[str, ...]
    default_metric: str
    feature: Any
    """The type of the "labels" column."""
    has_classes = True
    """Whether answers are labels: with probabilities, class weights and few-shot draws."""
    stratifies = False
    """Whether splits keep the shares of the labels."""
    smooths_labels = False
    has_thresholds = False
    mistakes = "mistakes"
    """The heading of the worst examples in a report."""
    wrong_texts = "wrong texts"
    missed = "Texts of the label that were given another one"
    """What the errors by label count, in a report."""
    confidence_of = "the probability of what was given"
    """What a reliability diagram bins, in a report."""

    @property
    def words(self) -> str:
        """The problem type, for people."""
        return self.name.replace("_", " ")

    # Labels

    def suits(self, values: Sequence[Any]) -> bool:
        """Whether label values without the missing ones suggest this task. Single labels are what remains."""
        return False

    @abstractmethod
    def learn(self, values: Sequence[Any], column: str, declared: tuple[str, ...]) -> tuple[str, ...]:
        """The label names in id order from the training values; declared: those of a ClassLabel, or empty."""

    @abstractmethod
    def encode(self, values: Sequence[Any], names: Sequence[str], split: str) -> list[Any]:
        """An id, a row of `len(names)` zeros and ones, or a number for each value."""

    def count(self, encoded: Sequence[Any], labels: int) -> list[int]:
        """How many examples have each label; empty for a regression."""
        return []

    def labels_of(self, encoded: Sequence[Any], labels: int) -> list[tuple[int, ...]]:
        """The ids of each example's labels, empty for a regression. An example without any has the id `labels`."""
        return []

    def working_feature(self, names: Sequence[str]) -> Any:
        """The type of the encoded column while splits are made."""
        return self.feature

    @abstractmethod
    def sample_labels(self, labels: int) -> Tensor:
        """Labels of two examples, to try a model with."""

    # Losses and answers

    @abstractmethod
    def losses(self, logits: np.ndarray, references: np.ndarray) -> np.ndarray:
        """The training loss `(examples,)` of each example, in fp64."""

    @abstractmethod
    def quality(
        self, logits: np.ndarray, references: np.ndarray, class_weights: np.ndarray | None = None
    ) -> np.ndarray:
        """How good each prediction is `(examples,)`: right or not, share of right labels, or -squared error.

        class_weights: `(labels,)` of the training loss. The mean over the examples is the weighted accuracy.
        """

    @abstractmethod
    def decide(self, logits: np.ndarray, calibration: Calibration) -> np.ndarray:
        """Class ids `(examples,)`, booleans `(examples, labels)`, or numbers `(examples,)`."""

    @abstractmethod
    def scores(self, scaled: Tensor) -> Tensor:
        """Probabilities `(examples, labels)` of logits that were divided by the temperature; numbers as they are."""

    @abstractmethod
    def answer(self, labels: Sequence[str], scores: list[float], decision: Any) -> dict[str, Any]:
        """`label` and `score` of one example."""

    def probabilities(self, logits: Tensor, calibration: Calibration) -> Tensor:
        """The calibrated scores `(examples, labels)`; of a regression the outputs themselves."""
        return self.scores(logits / calibration.scale)

    def predictions(
        self, logits: Tensor, labels: Sequence[str], calibration: Calibration
    ) -> Iterator[dict[str, Any]]:
        """`{"label", "score", "scores"}` of each row."""
        decisions = self.decide(logits.numpy(), calibration).tolist()
        for row, decision in zip(self.probabilities(logits, calibration).tolist(), decisions, strict=True):
            yield {**self.answer(labels, row, decision), "scores": dict(zip(labels, row, strict=True))}

    def changed(self, before: np.ndarray, after: np.ndarray, calibration: Calibration) -> int:
        """How many examples get other labels by two sets of logits; none of a regression."""
        if not self.has_classes:
            return 0
        return int(different(self.decide(before, calibration), self.decide(after, calibration)).sum())

    # Metrics

    @abstractmethod
    def metric_inputs(self, logits: np.ndarray, references: np.ndarray) -> dict[str, np.ndarray]:
        """The arguments of the metrics: `predictions`, `references` and, of classes, `prediction_scores`."""

    def class_errors(
        self, logits: np.ndarray, disabled: np.ndarray, references: np.ndarray, labels: Sequence[str]
    ) -> dict[str, dict[str, int]]:
        """Errors by label with the adapter and without, for metrics.json; empty but for single labels."""
        return {}

    def confusion(self, references: np.ndarray, given: np.ndarray, labels: int) -> Sequence[Sequence[int]]:
        """How often each class `[truth]` was taken for each `[given]`; empty but for single labels."""
        return ()

    # Baselines

    @abstractmethod
    def constant(self, references: np.ndarray, labels: int) -> np.ndarray:
        """The best outputs `(labels,)` without reading the text, from the training references."""

    @abstractmethod
    def probe_fit(self, problem: Problem) -> Fit:
        """The function that fits a linear layer at a strength of the penalty."""

    def example_weights(
        self, references: np.ndarray, class_weights: Sequence[float] | np.ndarray | None
    ) -> np.ndarray:
        """The weight of each example `(examples,)` in the fit of the probe; 1 but for single labels."""
        return np.ones(len(references))

    # Calibration

    def excess(self, logits: np.ndarray, references: np.ndarray) -> np.ndarray | None:
        """How far the logit of each answer is above the true one's `(decisions, answers)`; None: no probabilities."""
        return None

    def thresholds(self, probabilities: np.ndarray, references: np.ndarray) -> tuple[float, ...] | None:
        """A threshold for each label; None: decisions are not made by thresholds."""
        return None

    def calibrate(self, logits: np.ndarray, references: np.ndarray) -> Calibration:
        """Fit temperature and thresholds; neither for a regression or fewer than 20 examples."""
        logits = np.asarray(logits, np.float64)
        excess = self.excess(logits, np.asarray(references)) if len(logits) >= MIN_EXAMPLES else None
        if excess is None:
            return Calibration()
        temperature = fit_temperature(excess)
        return Calibration(temperature, self.thresholds(logits / temperature, references))

    def check_calibration(self, calibration: Calibration, labels: int) -> None:
        """Raise ValueError if a calibration, as a file has it, is not usable with this task."""
        temperature, thresholds = calibration.temperature, calibration.thresholds
        if temperature is not None:
            low, high = TEMPERATURES
            if not self.has_classes:
                raise ValueError(
                    f"a {self.words} has no temperature; got {shortened(temperature)}; expected null"
                )
            if not is_number(temperature) or not low <= temperature <= high:
                raise ValueError(
                    f"temperature is not usable; got {shortened(temperature)}; expected a number from {low:g} to "
                    f"{high:g}, or null"
                )
        if thresholds is not None:
            if not self.has_thresholds:
                raise ValueError(
                    f"thresholds are for multi-label classification; got {shortened(thresholds)} for {self.name}; "
                    "expected null"
                )
            usable = isinstance(thresholds, list | tuple) and len(thresholds) == labels
            if not usable or not all(is_number(value) and 0 < value < 1 for value in thresholds):
                raise ValueError(
                    f"thresholds are not usable; got {shortened(thresholds)}; expected {labels} numbers between 0 "
                    "and 1, one for each label, or null"
                )

    def confidences(self, scaled: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Confidence and correctness `(decisions,)` of each decision; None: there are no probabilities."""
        return None

    def reliability(
        self, logits: np.ndarray, references: np.ndarray, calibration: Calibration
    ) -> Reliability | None:
        """How well the calibrated probabilities match the accuracy; None for a regression."""
        scaled = np.asarray(logits, np.float64) / calibration.scale
        found = self.confidences(scaled, np.asarray(references))
        return None if found is None else reliability(*found)

    # Mistakes

    @abstractmethod
    def truth(self, references: np.ndarray) -> np.ndarray:
        """The references in the form of `decide`."""

    @abstractmethod
    def shown(self, decision: Any, labels: Sequence[str]) -> str:
        """A decision or a truth of one example, for people."""

    def confidence(self, scaled: np.ndarray) -> np.ndarray | None:
        """The probability `(examples,)` of each answer; None but for single labels."""
        return None


def different(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Which examples `(examples,)` have different decisions."""
    unequal = one != other
    return unequal.any(axis=tuple(range(1, unequal.ndim)))


TASKS: Registry[str, Task] = Registry("problem type")


def task_of(name: str | None, labels: int | None = None) -> Task:
    """The task of a problem type. Raises ValueError for an unknown one.

    None, as in a config that does not say: single labels, or, as transformers has it, a number where `labels` is 1.
    """
    return TASKS.get(name or (REGRESSION if labels == 1 else SINGLE))
