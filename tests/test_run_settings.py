from __future__ import annotations

import pytest

from hf_lora.arguments import LoRAArguments
from hf_lora.parsing import parse_training
from hf_lora.run_settings import PROBE_CONFIG, choose_epochs, choose_smoothing, lora_config


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


def test_only_single_labels_are_smoothed() -> None:
    args = arguments()
    assert args.label_smoothing_factor == 0.1
    assert (
        choose_smoothing(args, "single_label_classification") is None and args.label_smoothing_factor == 0.1
    )
    assert choose_smoothing(args, "regression") == "label smoothing: off (regression)"
    assert args.label_smoothing_factor == 0.0
    assert choose_smoothing(args, "regression") is None


@pytest.mark.parametrize("flags", [("--num_train_epochs", 7), ("--max_steps", 5)])
def test_what_was_asked_for_stays(flags: tuple) -> None:
    args = arguments(*flags)
    before = args.num_train_epochs
    assert choose_epochs(args, 10) is None
    assert args.num_train_epochs == before


def test_rank_0_is_the_smallest_adapter_there_is() -> None:
    assert lora_config(LoRAArguments(lora_rank=0)) == PROBE_CONFIG
    assert lora_config(LoRAArguments(lora_rank=4)).rank == 4
