"""What evaluations during training gave, against predictions made afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_lora import LoRATrainer
from hf_lora.recipe.compare import watched
from hf_lora.tasks.metrics import compute_metrics
from tests.recipe.test_head_start import prepared
from tests.recipe.test_refit import ENOUGH, Train, files, train  # noqa: F401  (fixtures)


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


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of examples of each pass over a split, in order."""
    seen: list[int] = []
    loop: Callable[..., Any] = LoRATrainer.evaluation_loop

    def counted(self: LoRATrainer, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(dataloader.dataset))
        return loop(self, dataloader, *args, **kwargs)

    monkeypatch.setattr(LoRATrainer, "evaluation_loop", counted)
    return seen


@pytest.mark.parametrize(
    ("flags", "after_training"),
    [
        # With the adapter and with it disabled.
        (("--refit", "never"), 2),
        # And when it is done, whether the refit is kept.
        (("--refit", "always"), 3),
        # Without evaluations, for what the safeguard asks.
        (("--refit", "never", "--eval_strategy", "no"), 3),
    ],
)
def test_no_split_is_predicted_twice_with_the_same_parameters(
    tmp_path: Path,
    train: Train,  # noqa: F811
    passes: list[int],
    flags: tuple[str, ...],
    after_training: int,
) -> None:
    # As good as the probe that it starts from, so that the run does not go back to that.
    start = ("--head_init", "probe", "--head_penalty", 1, "--learning_rate", 1e-6)
    train(tmp_path / "out", *ENOUGH, *start, *flags)
    features = [36, 24, 21]  # of training, validation and test split
    evaluations = [] if "no" in flags else [24, 24]  # after each of two epochs
    assert passes == [*features, *evaluations, *[24] * after_training, 21, 21]
