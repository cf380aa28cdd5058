from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel

from hf_lora.recipe.compare import Snapshot, clearly_better, keep_the_better
from hf_lora.recipe.head_start import install, output_layer, start_head
from tests.recipe.test_head_start import prepared


def test_what_helps_a_heavy_label_is_not_taken_back(tmp_path: Path, tiny_bert_dir: Path) -> None:
    """All of the heavy label right and all of the other wrong: worse by accuracy, better by the weights."""
    trainer, data = prepared(tmp_path, tiny_bert_dir)
    start = start_head(trainer, "probe")
    assert start.warm is not None
    labels = np.asarray(data.splits["validation"]["labels"])
    rare, other = labels[0], labels[labels != labels[0]][0]
    all_but_one = np.where(np.arange(len(labels)) == 0, other, labels)
    warm = replace(start.warm, validation=5.0 * np.eye(len(data.labels))[all_but_one])
    logits = 5.0 * np.eye(len(data.labels))[np.full(len(labels), rare)]
    trainer.predict = lambda split: SimpleNamespace(predictions=logits)  # type: ignore[method-assign, assignment]
    before = Snapshot.of(trainer.model)
    assert keep_the_better(trainer, data, before, warm) is not None
    trainer.class_weights = torch.ones(len(data.labels))
    trainer.class_weights[rare] = 1000.0
    assert keep_the_better(trainer, data, before, warm) is None


@pytest.mark.parametrize(("shift", "clearly"), [(-1.0, False), (0.05, False), (0.6, False), (1.0, True)])
def test_clearly_is_more_than_two_standard_errors(shift: float, clearly: bool) -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=40) + shift, rng.normal(size=40)
    assert clearly_better(one, other) == clearly == (ttest_rel(one, other).statistic > 2.0)


def test_equal_or_too_few_are_not_clearly_better() -> None:
    assert not clearly_better(np.ones(5), np.ones(5))
    assert not clearly_better(np.ones(1), np.zeros(1))
    assert clearly_better(np.ones(5), np.zeros(5))


def test_training_that_made_it_worse_is_taken_back(tmp_path: Path, tiny_bert_dir: Path) -> None:
    trainer, data = prepared(tmp_path, tiny_bert_dir)
    start = start_head(trainer, "probe")
    assert start.warm is not None
    before = Snapshot.of(trainer.model)
    install(trainer.model, start.warm.probe)
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
        if parameter.requires_grad and not name.startswith("pooled_head."):
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
