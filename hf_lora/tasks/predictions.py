"""From a classifier's outputs to what `predict` gives: probabilities, the labels that are decided, one dict a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lora.adapters.info import AdapterInfo
from hf_lora.tasks.calibration import decision_outputs, scale_of


@dataclass(frozen=True)
class _Reading:
    """How outputs `(texts, labels)` of a problem type are read.

    scores: of logits divided by the temperature. decide: what was decided about each text, `(texts, ...)`.
    answers: label and score of each text, from its scores and decisions.
    """

    scores: Callable[[Tensor], Tensor]
    decide: Callable[[Tensor, AdapterInfo], Tensor]
    answers: Callable[[Sequence[str], list[float], list[Any]], dict[str, Any]]


def interpreted(logits: Tensor, info: AdapterInfo) -> Iterator[dict[str, Any]]:
    """`{"label", "score", "scores"}` of each row of `logits` `(texts, labels)`."""
    rows = probabilities(logits, info).tolist()
    answers = _READINGS[info.problem_type].answers
    for row, decisions in zip(rows, decided(logits, info).tolist(), strict=True):
        scores = dict(zip(info.labels, row, strict=True))
        yield {**answers(info.labels, row, decisions), "scores": scores}


def probabilities(logits: Tensor, info: AdapterInfo) -> Tensor:
    """The scores `(texts, labels)`, calibrated where there is a temperature; of a regression the outputs themselves."""
    return _READINGS[info.problem_type].scores(logits / scale_of(info))


def decided(logits: Tensor, info: AdapterInfo) -> Tensor:
    """The best label of each text `(texts, 1)`, or which labels it has `(texts, labels)`; 0 for a regression."""
    return _READINGS[info.problem_type].decide(logits, info)


def _above_thresholds(logits: Tensor, info: AdapterInfo) -> Tensor:
    return torch.from_numpy(decision_outputs(logits.numpy(), info)) > 0


def _one_label(labels: Sequence[str], row: list[float], decisions: list[int]) -> dict[str, Any]:
    # Not by the scores: two logits that differ by little may round to one probability.
    (best,) = decisions
    return {"label": labels[best], "score": row[best]}


def _some_labels(labels: Sequence[str], row: list[float], decisions: list[bool]) -> dict[str, Any]:
    chosen = [column for column, given in enumerate(decisions) if given]
    return {"label": [labels[column] for column in chosen], "score": [row[column] for column in chosen]}


def _numbers(labels: Sequence[str], row: list[float], _: list[float]) -> dict[str, Any]:
    return {"label": labels[0], "score": row[0]} if len(row) == 1 else {"label": list(labels), "score": row}


_READINGS = {
    "single_label_classification": _Reading(
        lambda scaled: scaled.softmax(-1), lambda logits, _: logits.argmax(-1, keepdim=True), _one_label
    ),
    "multi_label_classification": _Reading(torch.sigmoid, _above_thresholds, _some_labels),
    "regression": _Reading(
        lambda outputs: outputs, lambda logits, _: logits.new_zeros(len(logits), 1), _numbers
    ),
}
