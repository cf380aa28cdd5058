from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import expit, softmax

from hf_lora.adapters.info import AdapterInfo
from hf_lora.tasks.predictions import decided, interpreted, probabilities

MULTI = "multi_label_classification"
LABELS = ("a", "b", "c")
LOGITS = torch.tensor([[2.0, 0.0, -1.0], [-3.0, 0.5, 0.4]])


def test_single_label_by_hand() -> None:
    info = AdapterInfo(LABELS, temperature=2.0)
    # exp of 1, 0 and -0.5, which make up 4.3248.
    first = {"a": math.e / 4.3248127, "b": 1 / 4.3248127, "c": math.exp(-0.5) / 4.3248127}
    results = list(interpreted(LOGITS, info))
    assert results[0] == {"label": "a", "score": pytest.approx(first["a"]), "scores": pytest.approx(first)}
    assert [result["label"] for result in results] == ["a", "b"]
    assert results[1]["score"] == results[1]["scores"]["b"]
    plain = list(interpreted(LOGITS, AdapterInfo(LABELS)))
    assert plain[0]["score"] == pytest.approx(math.exp(2) / (math.exp(2) + 1 + math.exp(-1)))


def test_multi_label_by_hand() -> None:
    info = AdapterInfo(LABELS, MULTI, temperature=0.5, thresholds=(0.99, 0.5, 0.1))
    results = list(interpreted(LOGITS, info))
    # The sigmoids of 4, 0, -2 and of -6, 1, 0.8: only the third of the first text is above its threshold.
    scores = [expit(row / 0.5) for row in LOGITS.double().numpy()]
    for result, row in zip(results, scores, strict=True):
        assert result["scores"] == pytest.approx(dict(zip(LABELS, row, strict=True)))
    assert [result["label"] for result in results] == [["c"], ["b", "c"]]
    assert results[1]["score"] == [results[1]["scores"]["b"], results[1]["scores"]["c"]]
    assert decided(LOGITS, info).tolist() == [[False, False, True], [False, True, True]]
    # Without thresholds those above one half, which a logit of 0 is not.
    plain = list(interpreted(LOGITS, AdapterInfo(LABELS, MULTI, temperature=0.5)))
    assert [result["label"] for result in plain] == [["a"], ["b", "c"]]


def test_regression_is_left_alone() -> None:
    one = AdapterInfo(("stars",), "regression")
    assert list(interpreted(LOGITS[:, :1], one)) == [
        {"label": "stars", "score": 2.0, "scores": {"stars": 2.0}},
        {"label": "stars", "score": -3.0, "scores": {"stars": -3.0}},
    ]
    assert next(interpreted(LOGITS[:1], AdapterInfo(LABELS, "regression"))) == {
        "label": ["a", "b", "c"],
        "score": [2.0, 0.0, -1.0],
        "scores": {"a": 2.0, "b": 0.0, "c": -1.0},
    }


@given(
    logits=arrays(np.float32, (5, 3), elements=st.floats(-50, 50, width=32)),
    temperature=st.floats(0.05, 20),
)
def test_a_temperature_changes_scores_and_no_label(logits: np.ndarray, temperature: float) -> None:
    info = AdapterInfo(LABELS, temperature=temperature)
    outputs = torch.from_numpy(logits)
    results = list(interpreted(outputs, info))
    assert [result["label"] for result in results] == [LABELS[row.argmax()] for row in logits]
    expected = softmax(logits.astype(np.float64) / temperature, axis=1)
    np.testing.assert_allclose(probabilities(outputs, info).numpy(), expected, atol=1e-4)
    for result, row in zip(results, expected, strict=True):
        assert result["score"] == pytest.approx(row.max(), abs=1e-4)
