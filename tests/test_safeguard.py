from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel
from test_warm_start import prepared

from hf_lora.data.labels import MULTI, REGRESSION, SINGLE
from hf_lora.safeguard import Snapshot, clearly_better, keep_the_better, quality
from hf_lora.warm_start import output_layer, start_head


def test_quality_by_hand() -> None:
    logits = np.array([[1.0, -1.0], [0.5, 2.0]])
    assert quality(logits, np.array([0, 0]), SINGLE).tolist() == [1.0, 0.0]
    assert quality(logits, np.array([[1, 0], [0, 1]]), MULTI).tolist() == [1.0, 0.5]
    assert quality(logits[:, :1], np.array([1.0, 2.5]), REGRESSION).tolist() == [0.0, -4.0]


@pytest.mark.parametrize("shift", [-0.5, 0.05, 0.5])
def test_clearly_is_more_than_a_standard_error(shift: float) -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=40) + shift, rng.normal(size=40)
    assert clearly_better(one, other) == (ttest_rel(one, other).statistic > 1.0)


def test_equal_or_too_few_are_not_clearly_better() -> None:
    assert not clearly_better(np.ones(5), np.ones(5))
    assert not clearly_better(np.ones(1), np.zeros(1))
    assert clearly_better(np.ones(5), np.zeros(5))


def test_training_that_made_it_worse_is_taken_back(tmp_path: Path, tiny_bert_dir: Path) -> None:
    trainer, data = prepared(tmp_path, tiny_bert_dir)
    start = start_head(trainer, "probe")
    assert start.warm is not None
    before = Snapshot.of(trainer.model)
    probe = trainer.predict(data.splits["validation"]).predictions
    assert (probe.argmax(1) == data.splits["validation"]["labels"]).mean() > 0.8
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(-3).add_(0.1)
    message = keep_the_better(trainer, data, before, start.warm)
    assert (
        message is not None
        and "LoRA did worse than the linear probe on the 12 validation examples" in message
    )
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, before.values[name]), name
    np.testing.assert_array_equal(trainer.predict(data.splits["validation"]).predictions, probe)


def test_training_that_is_as_good_is_kept(tmp_path: Path, tiny_bert_dir: Path) -> None:
    trainer, data = prepared(tmp_path, tiny_bert_dir)
    start = start_head(trainer, "probe")
    assert start.warm is not None
    before = Snapshot.of(trainer.model)
    layer = output_layer(trainer.model)
    with torch.no_grad():
        layer.weight.mul_(1.5)  # other logits, the same answers
        layer.bias.mul_(1.5)
    assert keep_the_better(trainer, data, before, start.warm) is None
    assert not torch.equal(layer.weight, before.values["pooled_head.weight"])
