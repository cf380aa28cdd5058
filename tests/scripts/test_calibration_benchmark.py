"""The calibration benchmark without its runs: losses and the table over seeds."""

from __future__ import annotations

import numpy as np
import pytest
from calibration import losses, rows
from scipy.special import softmax
from sklearn.metrics import log_loss


def test_losses_are_sklearns() -> None:
    generator = np.random.default_rng(0)
    logits, answers = generator.normal(size=(40, 3)), generator.integers(0, 3, 40)
    found = losses(logits, answers, 2.5)
    assert found["temperature"] == 2.5
    for name, temperature in (("at_1", 1.0), ("calibrated", 2.5)):
        expected = log_loss(answers, softmax(logits / temperature, axis=1), labels=range(3))
        assert found[name] == pytest.approx(expected)


def test_a_row_has_means_over_the_seeds_and_the_paired_difference() -> None:
    runs = {
        "tweets/100/0": {"temperature": 1.5, "at_1": 0.5, "calibrated": 0.4},
        "tweets/100/1": {"temperature": 0.9, "at_1": 0.3, "calibrated": 0.4},
        "tweets/400/0": {"temperature": 1.0, "at_1": 0.25, "calibrated": 0.25},
    }
    assert rows(runs) == [
        ("tweets", "100", "2", "0.90 to 1.50", "0.4000", "0.4000", "+0.0000 ± 0.1000"),
        ("tweets", "400", "1", "1.00 to 1.00", "0.2500", "0.2500", "+0.0000 ± nan"),
    ]
