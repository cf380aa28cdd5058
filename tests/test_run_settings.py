from __future__ import annotations

import pytest

from hf_lora.arguments import LoRAArguments
from hf_lora.parsing import parse_training
from hf_lora.run_settings import PROBE_CONFIG, choose_epochs, lora_config


def arguments(*flags: object):
    argv = ["--model_name_or_path", "base", "--output_dir", "out", "--use_cpu", "True", *map(str, flags)]
    return parse_training(argv)[-1]


@pytest.mark.parametrize(
    ("examples", "flags", "epochs"),
    [
        (2752, (), 3),  # 86 steps of 32, 258 in three epochs
        (2720, (), 4),  # 85 steps, 255 in three
        (10, (), 4),
        (2720, ("--per_device_train_batch_size", 16), 3),
        (2752, ("--gradient_accumulation_steps", 2), 4),
    ],
)
def test_three_epochs_or_four_where_they_are_short(examples: int, flags: tuple, epochs: int) -> None:
    args = arguments(*flags)
    line = choose_epochs(args, examples)
    assert args.num_train_epochs == epochs
    assert line is not None and line.startswith(f"epochs: {epochs} (")


@pytest.mark.parametrize("flags", [("--num_train_epochs", 7), ("--max_steps", 5)])
def test_what_was_asked_for_stays(flags: tuple) -> None:
    args = arguments(*flags)
    before = args.num_train_epochs
    assert choose_epochs(args, 10) is None
    assert args.num_train_epochs == before


def test_rank_0_is_the_smallest_adapter_there_is() -> None:
    assert lora_config(LoRAArguments(lora_rank=0)) == PROBE_CONFIG
    assert lora_config(LoRAArguments(lora_rank=4)).rank == 4
