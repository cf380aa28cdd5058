from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_lora.cli.parsing import Parsed, make_parser, option_names, parse_training
from hf_lora.recipe.arguments import DataArguments, LoRAArguments, ModelArguments, RunArguments
from hf_lora.training.arguments import LoRATrainingArguments

FLAGS = ["--model_name_or_path", "org/base", "--output_dir", "out", "--use_cpu", "True"]
YAML = "model_name_or_path: org/base\noutput_dir: out\nuse_cpu: true\n"


def parse_yaml(tmp_path: Path, text: str, *flags: str) -> Parsed:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return parse_training([str(path), *flags])


def test_flags_fill_the_dataclasses() -> None:
    model, data, lora, run, args = parse_training(
        [*FLAGS, "--train_file", "a.csv", "--lora_rank", "4", "--dry_run", "--learning_rate", "2e-3"]
    )
    assert model == ModelArguments(model_name_or_path="org/base")
    assert data == DataArguments(train_file="a.csv")
    assert lora == LoRAArguments(lora_rank=4)
    assert run == RunArguments(dry_run=True)
    assert isinstance(args, LoRATrainingArguments)
    assert (args.output_dir, args.learning_rate, args.use_cpu) == ("out", 0.002, True)


def test_our_training_defaults_apply() -> None:
    *_, args = parse_training(FLAGS)
    assert args.learning_rate == args.num_train_epochs == 0.0  # chosen when the data are known
    assert args.per_device_train_batch_size == 32
    assert args.label_smoothing_factor == 0.1
    assert args.per_device_eval_batch_size == 64
    assert args.warmup_steps == 0.06
    assert args.eval_strategy == args.save_strategy == "epoch"
    assert args.save_total_limit == 2
    assert args.logging_steps == 20


def test_our_training_defaults_can_be_overridden(tmp_path: Path) -> None:
    flags = [
        "--learning_rate",
        "5e-4",
        "--eval_strategy",
        "no",
        "--logging_steps",
        "7",
        "--save_total_limit",
        "9",
    ]
    *_, args = parse_yaml(tmp_path, YAML + "num_train_epochs: 11\n", *flags)
    assert (args.learning_rate, args.eval_strategy, args.logging_steps) == (5e-4, "no", 7)
    assert (args.num_train_epochs, args.save_total_limit) == (11.0, 9)


def test_yaml_keys_are_flags(tmp_path: Path) -> None:
    text = YAML + (
        "learning_rate: 2e-3\n"  # YAML 1.1 takes this for a string: it has no dot
        "weight_decay: 0.01\n"
        "lora_target_modules: [query, value]\n"
        "lora_layers: [0, -1]\n"
        'lora_rank_pattern: {"layer.1.*": 2}\n'
        "lr_scheduler_type: cosine_with_restarts\n"
        "lr_scheduler_kwargs: {num_cycles: 3}\n"
        "train_head: false\n"
        "dry_run: true\n"
        "text_column: null\n"
        "model_card_license: 'apache-2.0'\n"
        "max_seq_length: 32\n"
    )
    _, data, lora, run, args = parse_yaml(tmp_path, text)
    assert isinstance(args.learning_rate, float) and args.learning_rate == 0.002
    assert args.weight_decay == 0.01
    assert lora.lora_target_modules == ["query", "value"]
    assert lora.lora_layers == [0, -1]
    assert json.loads(lora.lora_rank_pattern) == {"layer.1.*": 2}
    assert lora.train_head is False
    assert (args.lr_scheduler_type, args.lr_scheduler_kwargs) == ("cosine_with_restarts", {"num_cycles": 3})
    assert run == RunArguments(dry_run=True, model_card_license="apache-2.0")
    assert data == DataArguments(text_column=None, max_seq_length=32)


def test_yaml_and_flags_give_the_same(tmp_path: Path) -> None:
    flags = [
        "--lora_layers",
        "0",
        "-1",
        "--learning_rate",
        "2e-3",
        "--train_head",
        "False",
        "--lora_alpha",
        "4",
    ]
    text = YAML + "lora_layers: [0, -1]\nlearning_rate: 2e-3\ntrain_head: false\nlora_alpha: 4\n"
    from_yaml, from_flags = parse_yaml(tmp_path, text), parse_training([*FLAGS, *flags])
    assert from_yaml[:4] == from_flags[:4]
    assert from_yaml[4].to_dict() == from_flags[4].to_dict()


def test_flags_override_yaml(tmp_path: Path) -> None:
    text = YAML + "lora_rank: 4\nlora_layers: [0, 1]\ndry_run: true\nseed: 1\n"
    flags = ["--lora_rank", "2", "--lora_layers", "5", "--dry_run", "False"]
    _, _, lora, run, args = parse_yaml(tmp_path, text, *flags)
    assert (lora.lora_rank, lora.lora_layers, run.dry_run, args.seed) == (2, [5], False, 1)


@pytest.mark.parametrize("key", ["save_strategy", "eval_strategy"])
def test_yaml_no_is_the_strategy_no(tmp_path: Path, key: str) -> None:
    # YAML 1.1 reads a bare `no` as false, and "no" is what transformers calls these strategies.
    *_, args = parse_yaml(tmp_path, YAML + f"{key}: no\n")
    assert getattr(args, key) == "no"


def test_yaml_value_may_start_with_a_dash(tmp_path: Path) -> None:
    _, data, *_ = parse_yaml(tmp_path, YAML + 'text_column: "-text"\n')
    assert data.text_column == "-text"


def test_yaml_null_switches_a_default_off(tmp_path: Path) -> None:
    *_, args = parse_yaml(tmp_path, YAML + "save_total_limit: null\n")
    assert args.save_total_limit is None


def test_resume_without_a_value_means_the_last(tmp_path: Path) -> None:
    *_, args = parse_training([*FLAGS, "--resume_from_checkpoint"])
    assert args.resume_from_checkpoint == "last"
    *_, args = parse_training([*FLAGS, "--resume_from_checkpoint", "out/checkpoint-5"])
    assert args.resume_from_checkpoint == "out/checkpoint-5"
    *_, args = parse_training(FLAGS)
    assert args.resume_from_checkpoint is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            YAML + "learing_rate: 1\nrank: 4\n",
            ["run.yaml", "unknown keys", "['learing_rate', 'rank']", "--help"],
        ),
        (YAML + "1: x\nzz: y\n", ["run.yaml", "unknown keys", "1", "zz"]),
        ("- a\n- b\n", ["run.yaml", "no configuration", "learning_rate: 1e-3"]),
        ("", ["run.yaml", "no configuration"]),
        ("a: [1\n", ["run.yaml", "not valid YAML", "line 2"]),
        (YAML + "help: me\n", ["run.yaml", "unknown keys", "help"]),
    ],
)
def test_bad_yaml_is_one_clear_error(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        parse_yaml(tmp_path, text)
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_missing_yaml_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the configuration '.*none\.yaml': No such file"):
        parse_training([str(tmp_path / "none.yaml")])


@pytest.mark.parametrize("missing", ["--model_name_or_path", "--output_dir"])
def test_required_flags_are_asked_for(missing: str) -> None:
    at = FLAGS.index(missing)
    with pytest.raises(ValueError, match=f"arguments are required: {missing}"):
        parse_training([*FLAGS[:at], *FLAGS[at + 2 :]])


@pytest.mark.parametrize("flag", ["--bogus", "--learning_rat"])
def test_unknown_and_shortened_flags_are_refused(flag: str) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        parse_training([*FLAGS, flag, "1"])
    if isinstance(error.value, SystemExit):
        assert error.value.code == 2
    else:
        assert flag in str(error.value)


@pytest.mark.parametrize("name", ["head_learning_rate", "lora_plus_ratio"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_rates_must_be_above_zero(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not usable; got .*; expected a number above 0"):
        parse_training([*FLAGS, f"--{name}", value])


def test_option_names_are_those_of_the_parser() -> None:
    destinations = {action.dest for action in make_parser()._actions} - {"help"}
    # Fields that are not set by the user (init=False) are no options.
    assert destinations <= option_names()
    assert {"lora_rank", "model_name_or_path", "class_weights", "learning_rate"} <= destinations


def test_full_help_can_be_printed() -> None:
    text = make_parser().format_help()
    assert "--lora_rank" in text and "--gradient_accumulation_steps" in text
