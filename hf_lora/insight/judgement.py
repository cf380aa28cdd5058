"""Results on labelled data, with the adapter and with it disabled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hf_lora.adapters.info import AdapterInfo
from hf_lora.tasks.calibration import Reliability
from hf_lora.tasks.mistakes import Mistake, findings, measurer


@dataclass(frozen=True)
class Judgement:
    """Results on labelled data with the adapter, and with it disabled. What a problem type has not is empty.

    classes: by label, `support`, `wrong` and `wrong_disabled`. confusion: `[truth][given]`.
    mistakes: the worst first, `wrong` how many there are in all. points: of a regression, (truth, given).
    """

    examples: int
    metrics: Mapping[str, float]
    metrics_disabled: Mapping[str, float]
    classes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    confusion: Sequence[Sequence[int]] = ()
    confusion_disabled: Sequence[Sequence[int]] = ()
    calibration: Reliability | None = None
    calibration_disabled: Reliability | None = None
    mistakes: Sequence[Mistake] = ()
    wrong: int = 0
    points: Sequence[tuple[float, float]] = ()


def judge(
    info: AdapterInfo,
    texts: Sequence[str],
    references: np.ndarray,
    logits: np.ndarray,
    disabled: np.ndarray,
    *,
    mistakes: int = 12,
) -> Judgement:
    """Compare outputs `(examples, labels)`, with the adapter and with it disabled, with the references.

    info: labels, problem type and calibration, with which `predict` makes answers of the outputs.
    references: class ids, rows of 0 and 1, or numbers. mistakes: how many of the worst to keep.
    """
    measure = measurer(info.task, info.labels, info.calibration)
    both = [np.asarray(outputs, np.float64) for outputs in (logits, disabled)]
    return Judgement(
        examples=len(texts),
        metrics=measure(both[0], references),
        metrics_disabled=measure(both[1], references),
        **findings(
            info.task, info.labels, info.calibration, texts, np.asarray(references), *both, mistakes=mistakes
        ),
    )
