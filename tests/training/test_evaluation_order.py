from __future__ import annotations

import numpy as np
from torch.utils.data import DataLoader
from transformers import EvalPrediction

from hf_lora.training.batching import LongestFirst, metrics_in_order, order_of, restored

LENGTHS = np.array([2, 9, 4, 9, 1])
# By falling length, equal ones as they come: examples 1, 3, 2, 0, 4.
ORDER = np.array([1, 3, 2, 0, 4])


def test_the_longest_come_first() -> None:
    sampler = LongestFirst(LENGTHS)
    assert list(sampler) == ORDER.tolist() and len(sampler) == 5


def test_the_order_of_a_loader_is_found() -> None:
    sampler = LongestFirst(LENGTHS)
    order = order_of(DataLoader(list(range(5)), batch_size=2, sampler=sampler))
    assert order is not None and np.array_equal(order, ORDER)
    assert order_of(DataLoader(list(range(5)), batch_size=2)) is None


def test_rows_come_back_in_the_order_of_the_data_set() -> None:
    values = np.array([[10.0], [30.0], [20.0], [0.0], [40.0]])
    nested = restored({"a": (values, [values[:, 0], None])}, ORDER)
    np.testing.assert_array_equal(nested["a"][0], [[0.0], [10.0], [20.0], [30.0], [40.0]])
    np.testing.assert_array_equal(nested["a"][1][0], [0.0, 10.0, 20.0, 30.0, 40.0])
    assert nested["a"][1][1] is None and isinstance(nested["a"], tuple)


def test_rows_that_the_loader_dropped_stay_out() -> None:
    # Examples 0 and 4 came last.
    np.testing.assert_array_equal(restored(np.array([10, 30, 20]), ORDER), [10, 20, 30])


def test_metrics_see_the_order_of_the_data_set() -> None:
    seen = {}

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        for name in ("predictions", "label_ids", "inputs", "losses"):
            seen[name] = getattr(prediction, name)
        return {"rows": 5.0}

    compute_in_order = metrics_in_order(compute, ORDER)
    assert compute_in_order is not None
    rows = ORDER.copy()
    assert compute_in_order(EvalPrediction(predictions=rows, label_ids=10 * rows, losses=rows / 2)) == {
        "rows": 5.0
    }
    for name, factor in (("predictions", 1), ("label_ids", 10), ("losses", 0.5)):
        np.testing.assert_array_equal(seen[name], factor * np.arange(5))
    assert seen["inputs"] is None
    assert metrics_in_order(None, ORDER) is None
