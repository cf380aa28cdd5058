"""The start along the gradient against plain autograd on a model without LoRA, and exact singular vectors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize
from datasets import Dataset
from tiny_models import tiny_inputs, tiny_model
from torch.testing import assert_close
from transformers import default_data_collator

from hf_lora import LoRAConfig, LoRATrainer, LoRATrainingArguments, inject_lora, start_lora
from hf_lora.lora.inject import injection, lora_layers
from hf_lora.training.gradient_init import (
    ROW_NORM,
    awaits_start,
    choose_start,
    leading_rows,
    weight_gradients,
)

# Linear, tied blocks, Conv1D, fused in three ways, a bypassed weight, grouped convolutions, bare parameters.
KINDS = ["bert", "albert", "gpt2", "gpt_neox", "bloom", "falcon", "deberta", "squeezebert", "xlnet"]


def examples(model_type: str, count: int = 10) -> Dataset:
    """Rows of different lengths for models that take token ids."""
    torch.manual_seed(3)
    inputs = tiny_inputs(model_type)
    rows = []
    for row in range(count):
        rows.append({name: values[row % len(values)].tolist() for name, values in inputs.items()})
        rows[-1]["input_ids"] = torch.randint(5, 60, (len(rows[-1]["input_ids"]),)).tolist()
        rows[-1]["labels"] = row % 3
    return Dataset.from_list(rows)


def trainer_of(
    model_type: str, folder: Path, config: LoRAConfig | None = None, size: int = 10, **settings: Any
) -> tuple[LoRATrainer, Any]:
    """A LoRATrainer of a tiny model with random weights, and a copy of the model as it was before."""
    torch.manual_seed(0)
    model = tiny_model(model_type)
    before = copy.deepcopy(model)
    inject_lora(model, config or LoRAConfig(rank=2, dropout=0.3))
    args = LoRATrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", **settings
    )
    data = examples(model_type, size)
    return LoRATrainer(
        model=model, args=args, train_dataset=data, data_collator=default_data_collator
    ), before


def plain_gradients(plain: Any, data: Dataset, names: list[tuple[str, str]]) -> list[torch.Tensor]:
    """The gradients of a stock model's weights of the loss summed over all examples, in one batch."""
    plain.eval()
    weights = [plain.get_submodule(module).get_parameter(tensor) for module, tensor in names]
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    loss = plain(**default_data_collator(list(data))).loss * len(data)
    return list(torch.autograd.grad(loss, weights, allow_unused=True))


@pytest.mark.parametrize("model_type", KINDS)
def test_gradients_are_those_of_the_model_without_lora(model_type: str, tmp_path: Path) -> None:
    # Batches of 4, 4 and 2: the last one counts as much as its examples.
    trainer, plain = trainer_of(model_type, tmp_path, per_device_train_batch_size=4)
    found = weight_gradients(trainer, list(trainer.train_dataset))
    places = [
        (placement.target.module, placement.target.tensor)
        for placement in injection(trainer.model).placements
    ]
    expected = plain_gradients(plain, trainer.train_dataset, places)
    assert len(found) == len(expected) == len(lora_layers(trainer.model))
    for gradient, by_hand in zip(found.values(), expected, strict=True):
        assert_close(gradient, by_hand, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("model_type", KINDS)
def test_rows_are_the_gradients_first_right_singular_vectors(model_type: str, tmp_path: Path) -> None:
    trainer, _ = trainer_of(model_type, tmp_path, LoRAConfig(rank=3))
    gradients = weight_gradients(trainer, list(trainer.train_dataset))
    start_lora(trainer)
    for name, layer in lora_layers(trainer.model).items():
        matrix = layer.layout.to_matrix(gradients[name]).double()
        parts = [matrix] if layer.parts is None else [matrix[list(rows)] for rows in layer.parts]
        assert layer.lora_A.shape[0] == 3 * len(parts)
        for part, rows in zip(parts, layer.lora_A.detach().double().split(3), strict=True):
            _, values, right = torch.linalg.svd(part)
            # No product with three rows of this length gets more of the gradient.
            caught = (part @ rows.T).norm() ** 2
            assert_close(caught, (ROW_NORM * values[:3]).norm() ** 2, rtol=1e-3, atol=1e-20)
            if values[2] > 1.1 * values[3:4].sum():
                projection = rows.T @ rows / ROW_NORM**2
                assert_close(projection, right[:3].T @ right[:3], rtol=1e-3, atol=1e-4)


def test_the_model_computes_what_it_did_and_nothing_else_has_changed(tmp_path: Path) -> None:
    trainer, plain = trainer_of("bert", tmp_path)
    model: Any = trainer.model
    model.train()
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    others = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" not in name}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    start = start_lora(trainer)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert name not in others or torch.equal(parameter, others[name]), name
    assert injection(model).config.init == "gradient" and trainer.lora_start is start
    assert str(start).startswith("gradient (A along the gradient of 10 examples, ")
    batch = default_data_collator(list(trainer.train_dataset))
    assert_close(model.eval()(**batch).logits, plain.eval()(**batch).logits)


def test_the_first_step_moves_b_along_the_gradient(tmp_path: Path) -> None:
    """dL/dB = scaling * G A^T, caught whole where the rank is that of the gradient."""
    trainer, _ = trainer_of("bert", tmp_path, LoRAConfig(rank=32, alpha=64.0))
    gradients = weight_gradients(trainer, list(trainer.train_dataset))
    start_lora(trainer)
    model: Any = trainer.model.eval()
    model(**default_data_collator(list(trainer.train_dataset))).loss.backward()
    for name, layer in lora_layers(model).items():
        assert layer.lora_B.grad is not None
        assert_close(
            layer.lora_B.grad.norm(), 2 * ROW_NORM * gradients[name].norm() / 10, rtol=1e-3, atol=1e-7
        )


def test_the_examples_are_shared_between_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = trainer_of("bert", tmp_path)
    whole = weight_gradients(trainer, list(trainer.train_dataset)[:9])
    sums = [torch.zeros_like(gradient) for gradient in whole.values()]
    args = type(trainer.args)
    monkeypatch.setattr(args, "world_size", 2)
    for rank in range(2):
        monkeypatch.setattr(args, "process_index", rank)
        for total, gradient in zip(
            sums, weight_gradients(trainer, list(trainer.train_dataset)[:9]).values(), strict=True
        ):
            total += gradient
    for total, gradient in zip(sums, whole.values(), strict=True):
        assert_close(total, gradient, rtol=1e-4, atol=1e-7)


def test_a_budget_of_tokens_bounds_these_batches_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = trainer_of("bert", tmp_path, max_tokens_per_batch=30)
    width = len(trainer.train_dataset[0]["input_ids"])
    seen: list[torch.Size] = []
    collate: Callable[..., Any] = trainer.data_collator

    def watched(rows: list[Any]) -> Any:
        batch = collate(rows)
        seen.append(batch["input_ids"].shape)
        return batch

    monkeypatch.setattr(trainer, "data_collator", watched)
    weight_gradients(trainer, list(trainer.train_dataset))
    assert sum(shape[0] for shape in seen) == 10
    assert {shape[0] for shape in seen[:-1]} == {30 // width}


def test_a_weight_without_a_gradient_keeps_its_random_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = trainer_of("bert", tmp_path)
    layers = lora_layers(trainer.model)
    drawn = {name: layer.lora_A.detach().clone() for name, layer in layers.items()}
    unread = next(iter(layers))

    def without(*args: Any) -> dict[str, torch.Tensor]:
        gradients = weight_gradients(*args)
        gradients[unread].zero_()
        return gradients

    monkeypatch.setattr("hf_lora.training.gradient_init.weight_gradients", without)
    assert f"without one: 1 of {len(layers)} weights" in str(start_lora(trainer))
    unchanged = [name for name, layer in layers.items() if torch.equal(layer.lora_A, drawn[name])]
    assert unchanged == [unread]


def test_rows_beyond_the_smaller_side_stay_random() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(5, 40)
    rows = leading_rows(matrix, 8)
    assert rows.shape == (5, 40)
    assert_close(rows @ rows.T, torch.eye(5), rtol=0, atol=1e-5)
    assert_close(matrix @ rows.T @ rows, matrix, rtol=1e-4, atol=1e-4)


def test_training_starts_there_where_the_config_says_so(tmp_path: Path) -> None:
    runs = []
    for asked in (True, False):
        config = LoRAConfig(rank=2, init="gradient" if asked else "kaiming")
        trainer, _ = trainer_of("bert", tmp_path, config, max_steps=2, learning_rate=1e-2)
        if not asked:
            start_lora(trainer)
        torch.manual_seed(1)
        trainer.train()
        assert trainer.lora_start is not None
        runs.append([layer.lora_B.detach() for layer in lora_layers(trainer.model).values()])
    for by_config, by_hand in zip(*runs, strict=True):
        assert by_config.any() and torch.equal(by_config, by_hand)


def test_a_second_training_goes_on_from_the_first(tmp_path: Path) -> None:
    trainer, _ = trainer_of("bert", tmp_path, LoRAConfig(rank=2, init="gradient"), max_steps=1)
    assert awaits_start(trainer)
    trainer.train()
    assert not awaits_start(trainer)
    again = LoRATrainer(
        model=trainer.model,
        args=trainer.args,
        train_dataset=trainer.train_dataset,
        data_collator=default_data_collator,
    )
    assert not awaits_start(again)
    again.train()


def test_automatic_is_the_gradient_but_with_a_random_head(tmp_path: Path) -> None:
    for head, init in (("probe", "gradient"), ("checkpoint", "gradient"), ("random", "kaiming")):
        trainer, _ = trainer_of("bert", tmp_path, LoRAConfig(rank=2, init="gradient"))
        start = choose_start(trainer, "auto", head)
        assert start.init == injection(trainer.model).config.init == init
        assert not awaits_start(trainer)
    assert str(start) == "kaiming (the gradient of a random head says nothing)"
    assert choose_start(trainer, "gradient", "random").init == "gradient"
    trainer, _ = trainer_of("bert", tmp_path, LoRAConfig(rank=2, init="pissa"))
    assert str(choose_start(trainer, "pissa", "probe")) == "pissa (as asked for)"


def _merge(trainer: LoRATrainer) -> None:
    randomize(trainer.model)
    for layer in lora_layers(trainer.model).values():
        torch.nn.init.zeros_(layer.lora_B)
        layer.merge()


def _break(trainer: LoRATrainer) -> None:
    with torch.no_grad():
        next(iter(lora_layers(trainer.model).values())).frozen_weight.fill_(torch.inf)


MISTAKES: dict[str, tuple[LoRAConfig, Callable[[LoRATrainer], Any], str]] = {
    "another start": (LoRAConfig(rank=2, init="pissa"), lambda trainer: None, "init='pissa'"),
    "trained": (
        LoRAConfig(rank=2),
        lambda trainer: randomize(trainer.model),
        "factors that have been trained",
    ),
    "merged": (LoRAConfig(rank=2), _merge, "a merged adapter"),
    "no data": (
        LoRAConfig(rank=2),
        lambda t: setattr(t, "train_dataset", None),
        "no training data",
    ),
    "empty": (LoRAConfig(rank=2), lambda t: setattr(t, "train_dataset", []), "no training data"),
    "sharded": (LoRAConfig(rank=2), lambda t: setattr(t, "is_fsdp_enabled", True), "FSDP or DeepSpeed"),
    "infinite": (LoRAConfig(rank=2), _break, "is not finite"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_is_one_line_and_automatic_says_why(mistake: str, tmp_path: Path) -> None:
    config, spoil, match = MISTAKES[mistake]
    trainer, _ = trainer_of("bert", tmp_path, config)
    spoil(trainer)
    before = [layer.lora_A.detach().clone() for layer in lora_layers(trainer.model).values()]
    for start in (start_lora, lambda trainer: choose_start(trainer, "gradient", "probe")):
        with pytest.raises(ValueError, match=match) as raised:
            start(trainer)
        assert "\n" not in str(raised.value) and "kaiming" in str(raised.value)
    assert match in str(choose_start(trainer, "auto", "probe"))
    for layer, lora_A in zip(lora_layers(trainer.model).values(), before, strict=True):
        assert torch.equal(layer.lora_A, lora_A)
