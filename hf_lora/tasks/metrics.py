"""The metrics, and the function that the Trainer calls for those of a task.

`evaluate.load("f1")` fetches a script from the Hub. These metrics stand on scikit-learn and scipy and need no
network; they are `evaluate.Metric`s: they take `add_batch` and fit into `evaluate.combine`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import evaluate
import numpy as np
from datasets import Features, List, Value
from numpy import ndarray
from transformers import EvalPrediction

from hf_lora._choices import Registry
from hf_lora.tasks.task import task_of

logger = logging.getLogger(__name__)

CLASS_F1 = "class_f1_"
"""Before a label's name, the F1 of that label among the metrics that trackers plot."""
BASELINES = {"majority": "majority class", "probe": "linear probe"}
"""What a classifier has to beat: how the names of its results end after a `_`, and what it is called."""

_CLASS, _SCORE = Value("int64"), Value("float64")
# The accepted inputs of a metric, in the order of trial.
_CLASSES = [Features({"predictions": kind, "references": kind}) for kind in (List(_CLASS), _CLASS)]
_SCORES = [Features({"predictions": _SCORE, "references": _SCORE})]
_CLASS_SCORES = [
    Features({"prediction_scores": scores, "references": references})
    for scores, references in ((List(_SCORE), List(_CLASS)), (List(_SCORE), _CLASS), (_SCORE, _CLASS))
]


class UndefinedMetricError(ValueError):
    """A metric has no value for these predictions and references; the message says why."""


class LocalMetric(evaluate.Metric):
    """A metric that needs no script, and no files unless processes share them.

    function: from the inputs, as arrays, to a number, or to several by name. name: its key in `METRICS`.
    """

    def __init__(
        self, function: Callable[..., Any], inputs: list[Features], name: str, **options: Any
    ) -> None:
        self._function, self._inputs = function, inputs
        options.setdefault("keep_in_memory", options.get("num_process", 1) == 1)
        super().__init__(name, **options)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The keyword arguments of `add_batch` and `compute`."""
        return tuple(self._feature_names())

    def _info(self) -> evaluate.MetricInfo:
        text = getattr(self._function, "func", self._function).__doc__ or ""
        return evaluate.MetricInfo(text, citation="", inputs_description=text, features=self._inputs)

    def _build_data_dir(self) -> str:
        """Name the cache directory of the base class, and make it only if something is written there."""
        if not self.keep_in_memory:
            return super()._build_data_dir()
        return os.path.join(self._data_dir_root, self.name, self.config_name)

    def _compute(self, **inputs: Any) -> dict[str, float]:
        result = self._function(**{name: np.asarray(values) for name, values in inputs.items()})
        return result if isinstance(result, dict) else {self.config_name: float(result)}


def of_classes(predictions: ndarray, references: ndarray, *, score: str, **options: Any) -> float:
    """A score of scikit-learn. Averages: "macro" (classes alike), "weighted" (by support) or "micro" (pooled).

    Classes that neither occur nor are predicted do not count; a class without predictions has precision 0. Of a
    multi-label example every label has to be right for its accuracy.
    """
    import sklearn.metrics

    return getattr(sklearn.metrics, score)(references, predictions, **options)


def roc_auc(prediction_scores: ndarray, references: ndarray) -> float:
    """Area under the ROC curve; over classes, the mean of each versus the rest.

    Scores are `(examples,)` of the positive class, or `(examples, classes)`, where references are class ids
    or, for multi-label, rows of 0 and 1. Raises UndefinedMetricError if no or every example has some class.
    """
    from sklearn.metrics import roc_auc_score

    if references.ndim < prediction_scores.ndim:
        references = _one_hot(references, prediction_scores.shape[1])
    constant = np.flatnonzero(np.atleast_1d(references.min(axis=0) == references.max(axis=0)))
    if constant.size:
        raise UndefinedMetricError(f"no or every example has class {', '.join(map(str, constant))}")
    return roc_auc_score(references, prediction_scores, average="macro")


def correlation(predictions: ndarray, references: ndarray, *, kind: str) -> float:
    """A correlation of scipy between predicted and true numbers, -1 to 1.

    Raises UndefinedMetricError for fewer than two examples, or where either side is constant.
    """
    import scipy.stats

    if len(predictions) < 2 or not np.ptp(predictions) or not np.ptp(references):
        raise UndefinedMetricError("expected two or more examples, and predictions and references that vary")
    return getattr(scipy.stats, kind)(predictions, references).statistic


def mean_squared_error(predictions: ndarray, references: ndarray) -> dict[str, float]:
    """Mean of the squared differences, in squared units of the scores, and its square root ("rmse")."""
    mse = float(np.mean(np.square(predictions - references)))
    return {"mse": mse, "rmse": mse**0.5}


METRICS: Registry[str, Callable[..., LocalMetric]] = Registry("metric")


def _register(inputs: list[Features], **functions: Callable[..., Any]) -> None:
    for name, function in functions.items():
        METRICS.register(name, partial(LocalMetric, function, inputs, name))


_register(_CLASSES, accuracy=partial(of_classes, score="accuracy_score"))
for _average, _name in product(("macro", "micro", "weighted"), ("f1", "precision", "recall")):
    _score = partial(of_classes, score=f"{_name}_score", average=_average, zero_division=0)
    _register(_CLASSES, **{f"{_name}_{_average}": _score})
_register(_CLASSES[-1:], matthews_correlation=partial(of_classes, score="matthews_corrcoef"))
_register(_CLASS_SCORES, roc_auc=roc_auc)
_correlations = {"pearson": "pearsonr", "spearman": "spearmanr"}
_register(_SCORES, **{name: partial(correlation, kind=kind) for name, kind in _correlations.items()})
_register(_SCORES, mse=mean_squared_error)


def compute_metrics(
    problem_type: str, labels: Sequence[str], *, by_class: bool = False
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the function that the Trainer calls with logits `(examples, len(labels))` and label ids.

    by_class: the F1 of every label too, under "class_f1_<label>", as trackers plot them.
    A metric that is undefined, such as ROC AUC where a class is absent, is left out; the reason is logged once.
    Raises ValueError: the problem type is unknown; the function: logits are not finite or not one for each label.
    """
    task = task_of(problem_type)
    metrics = {name: METRICS.get(name)() for name in task.metric_names}
    explained: set[str] = set()

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        references = np.asarray(prediction.label_ids)
        inputs = task.metric_inputs(_logits(prediction.predictions, len(references), len(labels)), references)
        results: dict[str, float] = {}
        for name, metric in metrics.items():
            try:
                results.update(metric.compute(**{key: inputs[key] for key in metric.input_names}))
            except UndefinedMetricError as error:
                if name not in explained:
                    explained.add(name)
                    logger.warning("%s is left out of the results: %s", name, error)
        if by_class and task.has_classes:
            errors = class_errors(inputs["predictions"], inputs["references"], labels)
            results |= {f"{CLASS_F1}{label}": class_f1(counts) for label, counts in errors.items()}
        return results

    return compute


def first_output(predictions: Any) -> Any:
    """The logits, where a model gives hidden states or attentions besides."""
    return predictions[0] if isinstance(predictions, tuple | list) else predictions


def class_errors(predictions: Any, references: Any, labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """For each label its "support", the examples that have it, and how many are "wrong" or "false_positives".

    Both arrays are class ids `(examples,)`, or for multi-label rows of 0 and 1 `(examples, len(labels))`. An
    example is wrong for a label that it has and is not given, a false positive for one that it is given and has not.
    """
    given, truth = (_one_hot(np.asarray(array), len(labels)) for array in (predictions, references))
    counts = np.stack([truth, truth & ~given, given & ~truth]).sum(axis=1).T.tolist()
    names = "support", "wrong", "false_positives"
    return {label: dict(zip(names, row, strict=True)) for label, row in zip(labels, counts, strict=True)}


def errors_beside(
    given: ndarray, given_disabled: ndarray, references: ndarray, labels: Sequence[str]
) -> dict[str, dict[str, int]]:
    """`class_errors` of a classifier and, as "wrong_disabled", of the same one with its adapter disabled."""
    without = class_errors(given_disabled, references, labels)
    enabled = class_errors(given, references, labels)
    return {label: {**row, "wrong_disabled": without[label]["wrong"]} for label, row in enabled.items()}


def class_f1(errors: Mapping[str, int]) -> float:
    """The F1 of a label from its counts, as `class_errors` gives them; 0 where it neither occurs nor is given."""
    right = errors["support"] - errors["wrong"]
    touched = 2 * right + errors["wrong"] + errors["false_positives"]
    return 2 * right / touched if touched else 0.0


def _one_hot(classes: ndarray, count: int) -> ndarray:
    """A boolean array `(examples, count)`; rows of 0 and 1 stay as they are."""
    return classes.astype(bool) if classes.ndim == 2 else classes[:, None] == np.arange(count)


def _logits(predictions: Any, examples: int, outputs: int) -> ndarray:
    """The logits as fp64 `(examples, outputs)`."""
    logits = np.asarray(first_output(predictions), dtype=np.float64).reshape(examples, -1)
    if logits.shape[1] != outputs:
        raise ValueError(f"the logits have {logits.shape[1]} columns; expected {outputs}, one for each label")
    if bad := int((~np.isfinite(logits)).sum()):
        raise ValueError(
            f"{bad:,} of {logits.size:,} logits are NaN or infinite; the training diverged; "
            "try a lower learning rate"
        )
    return logits
