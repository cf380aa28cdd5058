"""`evaluate.Metric` subclasses that need no network, and the table of them.

`evaluate.load("f1")` fetches a script from the Hub. These are ordinary classes around scikit-learn and scipy:
they take `add_batch`, fit into `evaluate.combine`, and keep what they are given in memory, not in files.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import evaluate
import numpy as np
from datasets import Features, List, Value

from hf_lora._choices import Registry

_AVERAGES = ("macro", "micro", "weighted")

_CLASS, _SCORE = Value("int64"), Value("float64")
_CLASSES = [
    Features({"predictions": List(_CLASS), "references": List(_CLASS)}),
    Features({"predictions": _CLASS, "references": _CLASS}),
]
_SCORES = Features({"predictions": _SCORE, "references": _SCORE})
_CLASS_SCORES = [
    Features({"prediction_scores": List(_SCORE), "references": List(_CLASS)}),
    Features({"prediction_scores": List(_SCORE), "references": _CLASS}),
    Features({"prediction_scores": _SCORE, "references": _CLASS}),
]


CLASS_F1 = "class_f1_"
"""Before a label's name, the F1 of that label among the metrics that trackers plot."""


BASELINES = {"majority": "majority class", "probe": "linear probe"}
"""What a classifier has to beat: how the names of its results end after a `_`, and what it is called."""


def class_errors(predictions: Any, references: Any, labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return for each label its "support", the examples that have it, and how many are "wrong" or "false_positives".

    Both arrays are class ids `(examples,)`, or for multi-label rows of 0 and 1 `(examples, len(labels))`. An
    example is wrong for a label that it has and is not given, a false positive for one that it is given and has not.
    """
    given, truth = (_one_hot(np.asarray(array), len(labels)) for array in (predictions, references))
    counts = {
        "support": truth.sum(axis=0),
        "wrong": (truth & ~given).sum(axis=0),
        "false_positives": (given & ~truth).sum(axis=0),
    }
    return {
        label: {name: int(count[index]) for name, count in counts.items()}
        for index, label in enumerate(labels)
    }


def class_f1(errors: Mapping[str, int]) -> float:
    """The F1 of a label from its counts, as `class_errors` gives them; 0 where it neither occurs nor is given."""
    right = errors["support"] - errors["wrong"]
    touched = 2 * right + errors["wrong"] + errors["false_positives"]
    return 2 * right / touched if touched else 0.0


def _one_hot(classes: np.ndarray, count: int) -> np.ndarray:
    """Return a boolean array `(examples, count)`; rows of 0 and 1 stay as they are."""
    return classes.astype(bool) if classes.ndim == 2 else classes[:, None] == np.arange(count)


class UndefinedMetricError(ValueError):
    """A metric has no value for these predictions and references; the message says why."""


class LocalMetric(evaluate.Metric):
    """A metric that lives in this package: no script to fetch, and no files unless processes share them.

    Subclasses set `inputs`, the accepted features in the order of trial, and implement `_compute`.
    """

    inputs: Features | list[Features]

    def __init__(self, config_name: str | None = None, **options: Any) -> None:
        options.setdefault("keep_in_memory", options.get("num_process", 1) == 1)
        super().__init__(config_name, **options)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The keyword arguments of `add_batch` and `compute`."""
        return tuple(self._feature_names())

    def _info(self) -> evaluate.MetricInfo:
        description = inspect.getdoc(type(self)) or ""
        return evaluate.MetricInfo(
            description=description, citation="", inputs_description=description, features=self.inputs
        )

    def _build_data_dir(self) -> str:
        """Name the cache directory of the base class, and make it only if something is written there."""
        if not self.keep_in_memory:
            return super()._build_data_dir()
        return os.path.join(self._data_dir_root, self.name, self.config_name)


class Accuracy(LocalMetric):
    """Share of examples that are right; of a multi-label example every label has to be (subset accuracy)."""

    inputs = _CLASSES

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        from sklearn.metrics import accuracy_score

        return {"accuracy": float(accuracy_score(np.asarray(references), np.asarray(predictions)))}


class AveragedMetric(LocalMetric):
    """A score of each class, averaged: "macro" (all alike), "weighted" (by support) or "micro" (pooled).

    The result's key is the metric's name and the average, such as "f1_macro". Classes that occur neither
    in the references nor in the predictions do not count; a class without predictions has precision 0.
    """

    inputs = _CLASSES
    score_name: str

    def __init__(self, config_name: str | None = None, *, average: str = "macro", **options: Any) -> None:
        if average not in _AVERAGES:
            raise ValueError(f"unknown average {average!r}; expected one of {', '.join(_AVERAGES)}")
        self.average = average
        super().__init__(config_name, **options)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        import sklearn.metrics

        score = getattr(sklearn.metrics, f"{self.score_name}_score")
        truth, given = np.asarray(references), np.asarray(predictions)
        value = score(truth, given, average=self.average, zero_division=0)
        return {f"{self.score_name}_{self.average}": float(value)}


class F1(AveragedMetric):
    """Harmonic mean of precision and recall, averaged over classes."""

    score_name = "f1"


class Precision(AveragedMetric):
    """Of the examples given a class, the share that have it, averaged over classes."""

    score_name = "precision"


class Recall(AveragedMetric):
    """Of the examples that have a class, the share given it, averaged over classes."""

    score_name = "recall"


class MatthewsCorrelation(LocalMetric):
    """Correlation between predicted and true classes, -1 to 1; 0 when either is constant."""

    inputs = _CLASSES[-1]

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        from sklearn.metrics import matthews_corrcoef

        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


class RocAuc(LocalMetric):
    """Area under the ROC curve from `prediction_scores`; over classes, the mean of each versus the rest.

    Scores are `(examples,)` of the positive class, or `(examples, classes)`, where references are class ids
    or, for multi-label, rows of 0 and 1.

    Raises:
        UndefinedMetricError: no example or every example has some class.
    """

    inputs = _CLASS_SCORES

    def _compute(self, prediction_scores: Any, references: Any) -> dict[str, float]:
        from sklearn.metrics import roc_auc_score

        scores, truth = np.asarray(prediction_scores), np.asarray(references)
        if truth.ndim < scores.ndim:
            truth = _one_hot(truth, scores.shape[1])
        constant = np.flatnonzero(np.atleast_1d(truth.min(axis=0) == truth.max(axis=0)))
        if constant.size:
            raise UndefinedMetricError(f"no or every example has class {', '.join(map(str, constant))}")
        return {"roc_auc": float(roc_auc_score(truth, scores, average="macro"))}


class Correlation(LocalMetric):
    """A correlation between predicted and true scores, -1 to 1.

    Raises:
        UndefinedMetricError: there are fewer than two examples, or either side is constant.
    """

    inputs = _SCORES
    scipy_name: str

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        import scipy.stats

        if len(predictions) < 2 or not np.ptp(predictions) or not np.ptp(references):
            raise UndefinedMetricError(
                "expected two or more examples, and predictions and references that vary"
            )
        return {self.name: float(getattr(scipy.stats, self.scipy_name)(predictions, references).statistic)}


class Pearson(Correlation):
    """Linear correlation between predicted and true scores."""

    scipy_name = "pearsonr"


class Spearman(Correlation):
    """Correlation between the ranks of predicted and true scores."""

    scipy_name = "spearmanr"


class MeanSquaredError(LocalMetric):
    """Mean of the squared differences, in squared units of the scores, and its square root ("rmse")."""

    inputs = _SCORES

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        mse = float(np.mean(np.square(np.asarray(predictions) - np.asarray(references))))
        return {"mse": mse, "rmse": mse**0.5}


class ClassErrors(LocalMetric):
    """For each of `labels`, how many examples have it and how many of those are not given it."""

    inputs = _CLASSES

    def __init__(self, config_name: str | None = None, *, labels: Sequence[str], **options: Any) -> None:
        self.labels = tuple(labels)
        super().__init__(config_name, **options)

    def _compute(self, predictions: Any, references: Any) -> dict[str, dict[str, dict[str, int]]]:
        return {"class_errors": class_errors(predictions, references, self.labels)}


METRICS: Registry[str, Callable[[], LocalMetric]] = Registry("metric")
METRICS.register("accuracy", Accuracy)
for _average in _AVERAGES:
    METRICS.register(f"f1_{_average}", partial(F1, average=_average))
    METRICS.register(f"precision_{_average}", partial(Precision, average=_average))
    METRICS.register(f"recall_{_average}", partial(Recall, average=_average))
METRICS.register("matthews_correlation", MatthewsCorrelation)
METRICS.register("roc_auc", RocAuc)
METRICS.register("pearson", Pearson)
METRICS.register("spearman", Spearman)
METRICS.register("mse", MeanSquaredError)
