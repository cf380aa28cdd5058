"""Drawing a few examples of each label, and holding a part of them out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import datasets
import numpy as np

from hf_lora.data.config import DataConfig
from hf_lora.data.splits import ENCODED, MOST_HELD_OUT
from hf_lora.tasks.labels import LabelScheme

_LISTED = 5


def few_shot(
    splits: Mapping[str, datasets.Dataset], scheme: LabelScheme, config: DataConfig
) -> tuple[dict[str, datasets.Dataset], tuple[str, ...]]:
    """Return the splits with `config.few_shot` examples of each label in training, and warnings.

    A validation split stays whole; where there is none it is held out of the few. Both parts of a smaller draw are in
    those of a larger one with the same seed. Multi-label examples without a label count as one more label.
    Raises ValueError: a regression, which has no labels to draw by, or nothing is left to hold out.
    """
    assert config.few_shot is not None
    if not scheme.task.has_classes:
        raise ValueError(
            f"few_shot draws examples of each label, and a regression has none; got {config.few_shot}; "
            "use max_train_samples"
        )
    train = splits["train"]
    carried = scheme.task.labels_of(train[ENCODED][:], len(scheme.names))
    drawn = draw(carried, config.few_shot, config.split_seed)
    warnings = _shortages(carried, scheme, config.few_shot)
    if "validation" in splits:
        return {**splits, "train": train.select(drawn)}, warnings
    is_held_out = divide([carried[row] for row in drawn], config.validation_fraction or MOST_HELD_OUT)
    if not any(is_held_out):
        raise ValueError(
            f"few_shot {config.few_shot} leaves nothing to hold out for validation, since one example of each label "
            "stays in training; expected 2 or more, or a validation_file"
        )
    kept, held_out = (
        train.select([row for row, held in zip(drawn, is_held_out, strict=True) if held is part])
        for part in (False, True)
    )
    return {**splits, "train": kept, "validation": held_out}, warnings


def draw(carried: Sequence[Sequence[int]], shots: int, seed: int) -> list[int]:
    """Rows in the order they are drawn: each label that a row carries gets `shots` rows, or all it has.

    carried: the labels of each row. In round n every label, the rarest first, is brought to n rows, so that a smaller
    draw is the beginning of a larger one.
    """
    waiting: dict[int, list[int]] = {}
    for row in np.random.default_rng(seed).permutation(len(carried)).tolist():
        for label in carried[row]:
            waiting.setdefault(label, []).append(row)
    rarest_first = sorted(waiting, key=lambda label: (len(waiting[label]), label))
    drawn: dict[int, None] = {}
    counts: Counter[int] = Counter()
    for goal in range(1, shots + 1):
        for label in rarest_first:
            while counts[label] < goal and waiting[label]:
                row = waiting[label].pop()
                if row not in drawn:
                    drawn[row] = None
                    counts.update(carried[row])
    return list(drawn)


def divide(carried: Sequence[Sequence[int]], fraction: float) -> list[bool]:
    """Whether each row, in the order drawn, is held out.

    Of n rows of a label `fraction` times n are held out, at least one, but none before each of its labels has a row in
    training. A row with several labels goes by the one with the fewest rows before it. The decision depends on the
    rows before it alone, so that a longer draw does not change it.
    """
    kept: Counter[int] = Counter()
    held: Counter[int] = Counter()
    decided = []
    for labels in carried:
        rarest = min(labels, key=lambda label: kept[label] + held[label])
        due = max(1, math.floor(fraction * (kept[rarest] + held[rarest] + 1) + 0.5))
        held_out = held[rarest] < due and all(kept[label] for label in labels)
        (held if held_out else kept).update(labels)
        decided.append(held_out)
    return decided


def _shortages(carried: Sequence[Sequence[int]], scheme: LabelScheme, shots: int) -> tuple[str, ...]:
    counts = Counter(label for labels in carried for label in labels)
    pairs = zip(scheme.names, (counts[label] for label in range(len(scheme.names))), strict=True)
    few = [f"{name!r} ({count:,})" for name, count in pairs if 0 < count < shots]
    shown = ", ".join(few[:_LISTED]) + (", ..." if len(few) > _LISTED else "")
    warning = (
        f"train: {len(few):,} of {len(scheme.names):,} labels have fewer than {shots:,} examples, and all of theirs "
        f"are taken: {shown}"
    )
    return (warning,) if few else ()
