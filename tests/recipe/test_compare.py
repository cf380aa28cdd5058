"""Which of two models is the better: what evaluations gave, snapshots, and training taken back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers_recipe import prepared
from scipy.stats import ttest_rel
from torch import nn

from hf_lora import LoRATrainer
from hf_lora.recipe.compare import Snapshot, clearly_better, keep_the_better, watched
from hf_lora.recipe.head_start import install, output_layer, start_head
from hf_lora.tasks.metrics import compute_metrics


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


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    made[0].weight.requires_grad_(False)
    return made


def test_a_snapshot_keeps_the_trained_parameters_and_gives_them_back() -> None:
    made = model()
    snapshot = Snapshot.of(made)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    assert snapshot.values.keys() == {"0.bias", "1.weight", "1.bias"}
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1.0)
    snapshot.restore(made)
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name] + (name == "0.weight")), name


def test_a_snapshot_tells_whether_the_trained_parameters_are_the_same() -> None:
    made = model()
    snapshot = Snapshot.of(made)
    assert snapshot.is_of(made)
    with torch.no_grad():
        made[0].weight.add_(1.0)  # frozen
    assert snapshot.is_of(made)
    with torch.no_grad():
        made[1].bias[1] = torch.nextafter(made[1].bias[1], torch.tensor(9.0))
    assert not snapshot.is_of(made)
    snapshot.restore(made)
    assert snapshot.is_of(made)
    made[0].weight.requires_grad_(True)
    assert not snapshot.is_of(made)


def evaluated(folder: Path, base: Path, **settings: Any) -> LoRATrainer:
    trainer, data = prepared(
        folder, base, eval_strategy="epoch", num_train_epochs=2, learning_rate=1e-2, **settings
    )
    trainer.compute_metrics = compute_metrics(data.problem_type, data.labels)
    return trainer


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_the_last_evaluations_outputs_are_those_of_the_trained_model(
    tmp_path: Path, tiny_bert_dir: Path, sampling: str
) -> None:
    trainer = evaluated(tmp_path, tiny_bert_dir, train_sampling_strategy=sampling)
    own = trainer.compute_metrics
    with watched(trainer) as evaluations:
        assert evaluations.outputs() is None
        trainer.train()
    assert trainer.compute_metrics is own
    entries = [entry for entry in trainer.state.log_history if "eval_runtime" in entry]
    assert len(entries) == 2
    assert evaluations.seconds == pytest.approx(sum(entry["eval_runtime"] for entry in entries))
    outputs = evaluations.outputs()
    assert outputs is not None
    expected = trainer.predict(trainer.eval_dataset).predictions
    torch.testing.assert_close(torch.from_numpy(outputs), torch.from_numpy(expected))
    assert np.ptp(expected, axis=0).max() > 1e-3, "all outputs are alike: any order would do"


def test_outputs_of_other_parameters_are_not_given(tmp_path: Path, tiny_bert_dir: Path) -> None:
    trainer = evaluated(tmp_path, tiny_bert_dir)
    with watched(trainer) as evaluations:
        trainer.train()
    last = next(p for p in reversed(list(trainer.model.parameters())) if p.requires_grad)
    with torch.no_grad():
        before = last.flatten()[0].item()
        last.view(-1)[0] = before + 1e-3
    assert evaluations.outputs() is None
    with torch.no_grad():
        last.view(-1)[0] = before
    assert evaluations.outputs() is not None


def test_without_evaluations_there_are_no_outputs(tmp_path: Path, tiny_bert_dir: Path) -> None:
    trainer, _ = prepared(tmp_path, tiny_bert_dir, max_steps=1)
    with watched(trainer) as evaluations:
        trainer.train()
    assert evaluations.outputs() is None and evaluations.seconds == 0.0
