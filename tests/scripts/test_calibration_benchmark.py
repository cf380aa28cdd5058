"""The calibration benchmark: losses, the table over seeds, and one small run."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import calibration
import numpy as np
import pytest
from calibration import losses, rows
from conftest import write_texts
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


@pytest.mark.slow
def test_a_run_is_measured_by_its_own_classifier(
    tiny_bert_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "BASE", str(tiny_bert_dir))
    for name in ("train.csv", "test.csv"):
        write_texts(tmp_path / name, 40)
    data: Any = SimpleNamespace(train_file=tmp_path / "train.csv", test_file=tmp_path / "test.csv")
    options = argparse.Namespace(test_samples=20, max_seq_length=16)
    found = calibration.measure(data, 30, 0, options)
    assert found.keys() == {"temperature", "at_1", "calibrated"} and 0 < found["at_1"] < 2
