"""What differs between problem types: the base class of the tasks, and the table of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy import ndarray
from scipy.special import expit, softmax
from torch import Tensor

from hf_lora._choices import Registry
from hf_lora._files import is_number
from hf_lora._text import shortened
from hf_lora.tasks import calibration as fits
from hf_lora.tasks.calibration import Calibration, Reliability
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
    """The first one chooses between runs."""
    feature: Any
    """The type of the "labels" column."""
    dtype: type
    """The type of what `decide` gives."""
    activation: Callable[[Tensor], Tensor]
    """From logits that were divided by the temperature to probabilities; numbers stay."""
    has_classes = True
    """Whether answers are labels: with probabilities, class weights and few-shot draws."""
    one_label = False
    """Whether each example has exactly one label: splits keep the labels' shares, and labels can be smoothed."""
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
        """An id, a row of `len(names)` zeros and ones, or a number for each value.

        Raises ValueError: a label is missing, is not one of `names`, or is not a number in a regression.
        """

    def labels_of(self, encoded: Sequence[Any], labels: int) -> list[tuple[int, ...]]:
        """The ids of each example's labels, empty for a regression. An example without any has the id `labels`."""
        return []

    def count(self, encoded: Sequence[Any], labels: int) -> list[int]:
        """How many examples have each label; empty for a regression."""
        ids = np.fromiter(chain.from_iterable(self.labels_of(encoded, labels)), int)
        return np.bincount(ids, minlength=labels)[:labels].tolist() if self.has_classes else []

    @abstractmethod
    def sample_labels(self, labels: int) -> Tensor:
        """Labels of two examples, to try a model with."""

    # Losses and answers

    @abstractmethod
    def losses(self, logits: ndarray, references: ndarray) -> ndarray:
        """The training loss `(examples,)` of each example, in fp64."""

    @abstractmethod
    def quality(self, logits: ndarray, references: ndarray, class_weights: ndarray | None = None) -> ndarray:
        """How good each prediction is `(examples,)`: right or not, share of right labels, or -squared error.

        class_weights: `(labels,)` of the training loss. The mean over the examples is the weighted accuracy.
        """

    @abstractmethod
    def decide(self, logits: ndarray, calibration: Calibration) -> ndarray:
        """Class ids `(examples,)`, booleans `(examples, labels)`, or numbers `(examples,)`."""

    def truth(self, references: ndarray) -> ndarray:
        """The references in the form of `decide`."""
        return references.astype(self.dtype)

    @abstractmethod
    def shown(self, decision: Any, labels: Sequence[str]) -> str:
        """A decision or a truth of one example, for people."""

    @abstractmethod
    def answer(self, labels: Sequence[str], scores: list[float], decision: Any) -> dict[str, Any]:
        """`label` and `score` of one example."""

    def probabilities(self, logits: Tensor, calibration: Calibration) -> Tensor:
        """The calibrated scores `(examples, labels)`; of a regression the outputs themselves."""
        return self.activation(logits / calibration.scale)

    def predictions(
        self, logits: Tensor, labels: Sequence[str], calibration: Calibration
    ) -> Iterator[dict[str, Any]]:
        """`{"label", "score", "scores"}` of each row."""
        decisions = self.decide(logits.numpy(), calibration).tolist()
        for row, decision in zip(self.probabilities(logits, calibration).tolist(), decisions, strict=True):
            yield {**self.answer(labels, row, decision), "scores": dict(zip(labels, row, strict=True))}

    def changed(self, before: ndarray, after: ndarray, calibration: Calibration) -> int:
        """How many examples get other labels by two sets of logits; none of a regression."""
        differ = different(self.decide(before, calibration), self.decide(after, calibration))
        return int(differ.sum()) if self.has_classes else 0

    # Metrics

    def ranking(self, logits: ndarray) -> ndarray:
        """What the area under the ROC curve ranks examples by `(examples, labels)`."""
        return logits

    def metric_inputs(self, logits: ndarray, references: ndarray) -> dict[str, ndarray]:
        """The arguments of the metrics."""
        number = np.int64 if self.has_classes else np.float64
        return {
            "predictions": self.decide(logits, Calibration()).astype(number),
            "prediction_scores": self.ranking(logits),
            "references": self.truth(references).astype(number),
        }

    def confusion(self, references: ndarray, given: ndarray, labels: int) -> Sequence[Sequence[int]]:
        """How often each class `[truth]` was taken for each `[given]`; empty but for single labels."""
        from sklearn.metrics import confusion_matrix

        return confusion_matrix(references, given, labels=range(labels)).tolist() if self.one_label else ()

    # Baselines

    @abstractmethod
    def constant(self, references: ndarray, labels: int) -> ndarray:
        """The best outputs `(labels,)` without reading the text, from the training references."""

    @abstractmethod
    def probe_fit(self, problem: Problem) -> Fit:
        """The function that fits a linear layer at a strength of the penalty."""

    def example_weights(self, references: ndarray, class_weights: Sequence[float] | None) -> ndarray:
        """The weight of each example `(examples,)` in the fit of the probe; 1 but for single labels."""
        return np.ones(len(references))

    # Calibration

    def excess(self, logits: ndarray, references: ndarray) -> ndarray | None:
        """How far the logit of each answer is above the true one's `(decisions, answers)`; None: no probabilities."""
        return None

    def calibrate(self, logits: ndarray, references: ndarray) -> Calibration:
        """Fit temperature and thresholds; neither for a regression or fewer than 20 examples."""
        logits = np.asarray(logits, np.float64)
        excess = self.excess(logits, np.asarray(references)) if len(logits) >= fits.MIN_EXAMPLES else None
        if excess is None:
            return Calibration()
        temperature = fits.fit_temperature(excess)
        probabilities = expit(logits / temperature)
        return Calibration(
            temperature, fits.fit_thresholds(probabilities, references) if self.has_thresholds else None
        )

    def check_calibration(self, calibration: Calibration, labels: int) -> None:
        """Raise ValueError if a calibration, as a file has it, is not usable with this task."""

        def check(usable: bool, problem: str, value: Any, expected: str) -> None:
            if not usable:
                raise ValueError(f"{problem}; got {shortened(value)}; expected {expected}")

        if (value := calibration.temperature) is not None:
            low, high = fits.TEMPERATURES
            check(self.has_classes, f"a {self.words} has no temperature", value, "null")
            usable = is_number(value) and low <= value <= high
            check(usable, "temperature is not usable", value, f"a number from {low:g} to {high:g}, or null")
        if (thresholds := calibration.thresholds) is not None:
            problem = f"thresholds are for multi-label classification, not for {self.name}"
            check(self.has_thresholds, problem, thresholds, "null")
            usable = isinstance(thresholds, list | tuple) and len(thresholds) == labels
            usable = usable and all(is_number(each) and 0 < each < 1 for each in thresholds)
            expected = f"{labels} numbers between 0 and 1, one for each label, or null"
            check(usable, "thresholds are not usable", thresholds, expected)

    def confidences(self, scaled: ndarray, references: ndarray) -> tuple[ndarray, ndarray] | None:
        """Confidence and correctness `(decisions,)` of each decision; None: there are no probabilities."""
        return None

    def confidence(self, scaled: ndarray) -> ndarray | None:
        """The probability `(examples,)` of each answer; None but for single labels."""
        return softmax(scaled, 1).max(1) if self.one_label else None

    def reliability(
        self, logits: ndarray, references: ndarray, calibration: Calibration
    ) -> Reliability | None:
        """How well the calibrated probabilities match the accuracy; None for a regression."""
        scaled = np.asarray(logits, np.float64) / calibration.scale
        found = self.confidences(scaled, np.asarray(references))
        return None if found is None else fits.reliability(*found)


def different(one: ndarray, other: ndarray) -> ndarray:
    """Which examples `(examples,)` have different decisions."""
    unequal = one != other
    return unequal.any(axis=tuple(range(1, unequal.ndim)))


TASKS: Registry[str, Task] = Registry("problem type")


def task_of(name: str | None, labels: int | None = None) -> Task:
    """The task of a problem type. Raises ValueError for an unknown one.

    None, as in a config that does not say: single labels, or, as transformers has it, a number where `labels` is 1.
    """
    return TASKS.get(name or (REGRESSION if labels == 1 else SINGLE))
