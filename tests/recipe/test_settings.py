from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hf_lora.data.splits import FEW_EXAMPLES
from hf_lora.lora.config import LoRAConfig
from hf_lora.recipe.options import FinetuneOptions, all_options
from hf_lora.recipe.settings import (
    PROBE_CONFIG,
    Recipe,
    choose_epochs,
    choose_rate,
    choose_refit,
    choose_smoothing,
    last_layer_only,
    lora_config,
)
from hf_lora.tasks import SINGLE, TASKS, task_of
from hf_lora.training.arguments import LoRATrainingArguments

PLACE = {"model_name_or_path": "base", "train_file": "a.csv", "output_dir": "out", "use_cpu": True}


def recipe(**settings: object) -> Recipe:
    return Recipe.from_settings({**PLACE, **settings})


def data_of(held_out: bool, examples: int) -> Any:
    """Of data only what the choice of a retraining asks for."""
    return SimpleNamespace(held_out=held_out, splits={"train": range(examples - 1), "validation": range(1)})


def arguments(**settings: object):
    return recipe(**settings).args


@pytest.mark.parametrize(
    ("examples", "flags", "epochs"),
    [
        (10, {}, 30),
        (64, {}, 30),
        (65, {}, 20),  # 3 steps of 32
        (224, {}, 9),  # 7
        (608, {}, 4),  # 19
        (640, {}, 3),
        (3200, {}, 2),  # 100 steps of 32
        (3168, {}, 3),  # 99
        (1_000_000, {}, 2),
        (2000, {"per_device_train_batch_size": 16}, 2),
        (2000, {}, 3),
        (3200, {"gradient_accumulation_steps": 2}, 3),
    ],
)
def test_as_many_epochs_as_make_enough_steps(examples: int, flags: dict, epochs: int) -> None:
    args = arguments(**flags)
    line = choose_epochs(args, examples)
    assert args.num_train_epochs == epochs
    assert line.startswith(f"{epochs} epochs of ")


@pytest.mark.parametrize(
    ("examples", "rate"),
    [(1, 8.9e-5), (8, 2.5e-4), (50, 6.3e-4), (125, 1e-3), (320, 1.6e-3), (500, 2e-3), (1_000_000, 2e-3)],
)
def test_the_rate_falls_with_the_root_of_few_examples(examples: int, rate: float) -> None:
    """2e-3 * sqrt(examples / 500) in two digits, by hand."""
    args = arguments()
    line = choose_rate(args, examples)
    assert args.learning_rate == rate
    assert line == f"learning rate {rate:g}"


@pytest.mark.parametrize("rate", [2e-3, 1e-5, 5.0])
def test_a_rate_that_was_asked_for_stays(rate: float) -> None:
    args = arguments(learning_rate=rate)
    assert choose_rate(args, 10) == f"learning rate {rate:g}"
    assert args.learning_rate == rate


def test_only_single_labels_are_smoothed() -> None:
    for task in TASKS:
        args = arguments()
        choose_smoothing(args, task_of(task))
        assert args.label_smoothing_factor == (0.1 if task == SINGLE else 0.0)


@pytest.mark.parametrize(
    ("refit", "held_out", "examples", "expected"),
    [
        ("auto", True, 1_000, True),
        ("auto", True, 1_001, False),
        ("auto", False, 10, False),  # a validation file is not trained on unasked
        ("always", False, 10, True),
        ("always", True, 50_000, True),
        ("never", True, 10, False),
    ],
)
def test_a_few_examples_are_all_trained_on_in_the_end(
    refit: str, held_out: bool, examples: int, expected: bool
) -> None:
    assert choose_refit(FinetuneOptions(refit=refit), arguments(), data_of(held_out, examples)) is expected


@pytest.mark.parametrize("problem", ["early stopping", "best model", "sharded"])
def test_what_needs_a_held_out_part_or_whole_weights_is_not_refitted(
    problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(load_best_model_at_end=problem == "best model")
    if problem == "sharded":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    patience = 2 if problem == "early stopping" else None

    def chosen(refit: str) -> bool:
        return choose_refit(
            FinetuneOptions(refit=refit, early_stopping_patience=patience), args, data_of(True, 10)
        )

    assert not chosen("auto")
    assert not chosen("never")
    words = "FSDP" if problem == "sharded" else "early stopping"
    with pytest.raises(ValueError, match=f"^refit=always cannot be done; got {words}.*; use refit=never$"):
        chosen("always")


def test_help_says_how_few_are_few() -> None:
    (entry,) = (entry for entry in all_options()["run"] if entry.name == "refit")
    assert f"held out of up to {FEW_EXAMPLES:,} examples" in entry.help


def test_an_unknown_refit_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown refit; got 'yes'; expected one of auto, always, never"):
        choose_refit(FinetuneOptions(refit="yes"), arguments(), data_of(True, 10))


@pytest.mark.parametrize("flags", [{"num_train_epochs": 7}, {"max_steps": 5}])
def test_what_was_asked_for_stays(flags: dict) -> None:
    args = arguments(**flags)
    before = args.num_train_epochs
    assert choose_epochs(args, 10) in ("7 epochs of 1 steps", "5 steps")
    assert args.num_train_epochs == before


def test_rank_0_is_the_smallest_adapter_there_is() -> None:
    assert lora_config({"rank": 0}) is None
    assert recipe(lora_rank=0).lora_config == PROBE_CONFIG
    assert recipe(lora_rank=4).lora_config == LoRAConfig(rank=4, init="gradient")


@pytest.mark.parametrize(
    ("is_probe", "flags", "reason"),
    [
        (True, {}, None),
        (True, {"cache_frozen_prefix": "memory"}, "the states of frozen layers are cached"),
        (False, {}, "LoRA makes as much of it"),
    ],
)
def test_why_a_head_reads_the_last_layer_alone(is_probe: bool, flags: dict, reason: str | None) -> None:
    assert last_layer_only(arguments(**flags), is_probe) == reason


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, LoRAConfig(init="gradient")),
        ({"lora_init": "pissa"}, LoRAConfig(init="pissa")),
        ({"lora_rank": 3, "lora_alpha": 2.5}, LoRAConfig(rank=3, alpha=2.5, init="gradient")),
        ({"lora_dropout": 0.25, "lora_bias": "all"}, LoRAConfig(dropout=0.25, bias="all", init="gradient")),
        ({"lora_projections": "vq"}, LoRAConfig(projections="qv", init="gradient")),
        ({"lora_alpha_pattern": '{"query": 0.5}'}, LoRAConfig(alpha_pattern={"query": 0.5}, init="gradient")),
        (
            {"lora_variant": "dora", "lora_scaling": "rslora"},
            LoRAConfig(variant="dora", scaling="rslora", init="gradient"),
        ),
        ({"lora_target_modules": ["query"]}, LoRAConfig(target_modules=("query",), init="gradient")),
        ({"lora_target_modules": [".*query"]}, LoRAConfig(target_modules=".*query", init="gradient")),
        ({"lora_target_modules": ["all-linear"]}, LoRAConfig(target_modules="all-linear", init="gradient")),
        ({"lora_rank_pattern": '{"query": 4}'}, LoRAConfig(rank_pattern={"query": 4}, init="gradient")),
        ({"lora_rank_pattern": {"query": 4}}, LoRAConfig(rank_pattern={"query": 4}, init="gradient")),
        (
            {"lora_layers": [0, -1], "train_head": False},
            LoRAConfig(layers=(0, -1), train_head=False, init="gradient"),
        ),
    ],
)
def test_settings_become_a_lora_config(settings: dict, expected: LoRAConfig) -> None:
    assert recipe(**settings).lora_config == expected


def test_objects_stand_in_the_place_of_options() -> None:
    lora, options = LoRAConfig(rank=2, init="pissa"), FinetuneOptions(refit="never")
    found = Recipe.from_settings(PLACE, objects={"lora": lora, "options": options})
    assert (found.lora, found.options, found.lora_config) == (lora, options, lora)


@pytest.mark.parametrize(
    ("settings", "objects", "message"),
    [
        (
            {"lora_rank": 4},
            {"lora": LoRAConfig()},
            "lora= and lora_rank are both given; expected one of the two",
        ),
        (
            {"weight_decay": 0.1},
            {"args": LoRATrainingArguments("out", use_cpu=True)},
            "args= and use_cpu are both given; expected one of the two",
        ),
        ({}, {"lora": {"rank": 4}}, "lora is no LoRAConfig; got dict"),
        ({"output_dir": None}, {}, "output_dir is missing; expected such as 'runs/mine'"),
        ({"train_file": None}, {}, "no data given; expected a train_file or a dataset_name"),
        (
            {"lora_rank_pattern": "[1]"},
            {},
            "lora_rank_pattern is not a JSON object; got '\\[1\\]'; expected .*",
        ),
    ],
)
def test_what_contradicts_or_is_missing_is_refused(settings: dict, objects: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Recipe.from_settings({**PLACE, **settings}, objects=objects)
