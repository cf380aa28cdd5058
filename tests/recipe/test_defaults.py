from __future__ import annotations

import pytest

from hf_lora.cli.parsing import parse_training
from hf_lora.data.splits import FEW_EXAMPLES
from hf_lora.recipe.arguments import LoRAArguments, help_text
from hf_lora.recipe.run_settings import (
    PROBE_CONFIG,
    choose_epochs,
    choose_rate,
    choose_refit,
    choose_smoothing,
    last_layer_only,
    lora_config,
)


def arguments(*flags: object):
    argv = ["--model_name_or_path", "base", "--output_dir", "out", "--use_cpu", "True", *map(str, flags)]
    return parse_training(argv)[-1]


@pytest.mark.parametrize(
    ("examples", "flags", "epochs"),
    [
        (10, (), 30),
        (64, (), 30),
        (65, (), 20),  # 3 steps of 32
        (224, (), 9),  # 7
        (608, (), 4),  # 19
        (640, (), 3),
        (3200, (), 2),  # 100 steps of 32
        (3168, (), 3),  # 99
        (1_000_000, (), 2),
        (2000, ("--per_device_train_batch_size", 16), 2),
        (2000, (), 3),
        (3200, ("--gradient_accumulation_steps", 2), 3),
    ],
)
def test_as_many_epochs_as_make_enough_steps(examples: int, flags: tuple, epochs: int) -> None:
    args = arguments(*flags)
    line = choose_epochs(args, examples)
    assert args.num_train_epochs == epochs
    assert line is not None and line.startswith(f"epochs: {epochs} of ")


@pytest.mark.parametrize(
    ("examples", "rate"),
    [(1, 8.9e-5), (8, 2.5e-4), (50, 6.3e-4), (125, 1e-3), (320, 1.6e-3), (500, 2e-3), (1_000_000, 2e-3)],
)
def test_the_rate_falls_with_the_root_of_few_examples(examples: int, rate: float) -> None:
    """2e-3 * sqrt(examples / 500) in two digits, by hand."""
    args = arguments()
    line = choose_rate(args, examples)
    assert args.learning_rate == rate
    assert line is not None and line.startswith(f"learning rate: {rate:g} (")


@pytest.mark.parametrize("rate", [2e-3, 1e-5, -1.0])
def test_a_rate_that_was_asked_for_stays(rate: float) -> None:
    args = arguments("--learning_rate", rate)
    assert choose_rate(args, 10) is None
    assert args.learning_rate == rate


def test_only_single_labels_are_smoothed() -> None:
    args = arguments()
    assert args.label_smoothing_factor == 0.1
    assert (
        choose_smoothing(args, "single_label_classification") is None and args.label_smoothing_factor == 0.1
    )
    assert choose_smoothing(args, "regression") == "label smoothing: off (regression)"
    assert args.label_smoothing_factor == 0.0
    assert choose_smoothing(args, "regression") is None


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
    assert choose_refit(refit, arguments(), held_out=held_out, examples=examples) is expected


@pytest.mark.parametrize("problem", ["early stopping", "best model", "sharded"])
def test_what_needs_a_held_out_part_or_whole_weights_is_not_refitted(
    problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments("--load_best_model_at_end", problem == "best model")
    if problem == "sharded":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    given = {"held_out": True, "examples": 10, "stopping": problem == "early stopping"}
    assert not choose_refit("auto", args, **given)
    assert not choose_refit("never", args, **given)
    words = "FSDP" if problem == "sharded" else "early stopping"
    with pytest.raises(ValueError, match=f"^refit=always cannot be done; got {words}.*; use refit=never$"):
        choose_refit("always", args, **given)


def test_help_says_how_few_are_few() -> None:
    assert f"held out of up to {FEW_EXAMPLES:,} examples" in help_text()


def test_an_unknown_refit_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown refit; got 'yes'; expected one of auto, always, never"):
        choose_refit("yes", arguments(), held_out=True, examples=10)


@pytest.mark.parametrize("flags", [("--num_train_epochs", 7), ("--max_steps", 5)])
def test_what_was_asked_for_stays(flags: tuple) -> None:
    args = arguments(*flags)
    before = args.num_train_epochs
    assert choose_epochs(args, 10) is None
    assert args.num_train_epochs == before


def test_rank_0_is_the_smallest_adapter_there_is() -> None:
    assert lora_config(LoRAArguments(lora_rank=0)) == PROBE_CONFIG
    assert lora_config(LoRAArguments(lora_rank=4)).rank == 4


@pytest.mark.parametrize(
    ("rank", "flags", "reason"),
    [
        (0, (), None),
        (0, ("--cache_frozen_prefix", "memory"), "the states of frozen layers are cached"),
        (8, (), "LoRA makes as much of it"),
    ],
)
def test_why_a_head_reads_the_last_layer_alone(rank: int, flags: tuple[str, ...], reason: str | None) -> None:
    assert last_layer_only(arguments(*flags), rank) == reason
