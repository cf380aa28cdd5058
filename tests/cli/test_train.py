from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_lora.cli.train import check_flags, full_help, help_text, parse_settings
from hf_lora.data import DataConfig
from hf_lora.lora.config import LoRAConfig
from hf_lora.recipe.options import COMMON, FinetuneOptions, ModelOptions, all_options, transformers_options
from hf_lora.recipe.settings import Recipe
from hf_lora.training.arguments import LoRATrainingArguments

FLAGS = ["--model_name_or_path", "org/base", "--output_dir", "out", "--use_cpu", "True"]
YAML = "model_name_or_path: org/base\noutput_dir: out\nuse_cpu: true\n"


def recipe_of(argv: list[str]) -> Recipe:
    """The recipe of a command line, on a training file that need not exist."""
    settings = parse_settings(argv)
    del settings["quiet"], settings["dry_run"]
    return Recipe.from_settings({**settings, "train_file": settings["train_file"] or "a.csv"})


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def of_yaml(tmp_path: Path, text: str, *flags: str) -> Recipe:
    return recipe_of([written(tmp_path, text), *flags])


def test_flags_fill_the_recipe() -> None:
    recipe = recipe_of([*FLAGS, "--train_file", "b.csv", "--lora_rank", "4", "--learning_rate", "2e-3"])
    assert recipe.model == ModelOptions(model_name_or_path="org/base")
    assert recipe.data == DataConfig(train_file="b.csv", seed=42)
    assert recipe.lora == LoRAConfig(rank=4)
    assert recipe.options == FinetuneOptions()
    assert isinstance(recipe.args, LoRATrainingArguments)
    assert (recipe.args.output_dir, recipe.args.learning_rate, recipe.args.use_cpu) == ("out", 0.002, True)


def test_our_training_defaults_apply() -> None:
    args = recipe_of(FLAGS).args
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
    args = of_yaml(tmp_path, YAML + "num_train_epochs: 11\n", *flags).args
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
        "text_column: null\n"
        "model_card_license: 'apache-2.0'\n"
        "max_seq_length: 32\n"
    )
    recipe = of_yaml(tmp_path, text)
    data, lora, args = recipe.data, recipe.lora, recipe.args
    assert lora is not None
    assert isinstance(args.learning_rate, float) and args.learning_rate == 0.002
    assert args.weight_decay == 0.01
    assert lora.target_modules == ("query", "value")
    assert lora.layers == (0, -1)
    assert lora.rank_pattern == {"layer.1.*": 2}
    assert lora.train_head is False
    assert (args.lr_scheduler_type, args.lr_scheduler_kwargs) == ("cosine_with_restarts", {"num_cycles": 3})
    assert recipe.options == FinetuneOptions(model_card_license="apache-2.0")
    assert data == DataConfig(train_file="a.csv", text_column=None, max_length=32, seed=42)


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
    assert parse_settings([written(tmp_path, text)]) == parse_settings([*FLAGS, *flags])


def test_flags_override_yaml(tmp_path: Path) -> None:
    text = YAML + "lora_rank: 4\nlora_layers: [0, 1]\ndry_run: true\nseed: 1\n"
    flags = ["--lora_rank", "2", "--lora_layers", "5", "--dry_run", "False"]
    settings = parse_settings([written(tmp_path, text), *flags])
    names = ("lora_rank", "lora_layers", "dry_run", "seed")
    assert [settings[name] for name in names] == [2, [5], False, 1]


@pytest.mark.parametrize("key", ["save_strategy", "eval_strategy"])
def test_yaml_no_is_the_strategy_no(tmp_path: Path, key: str) -> None:
    # YAML 1.1 reads a bare `no` as false, and "no" is what transformers calls these strategies.
    args = of_yaml(tmp_path, YAML + f"{key}: no\n").args
    assert getattr(args, key) == "no"


def test_yaml_value_may_start_with_a_dash(tmp_path: Path) -> None:
    assert of_yaml(tmp_path, YAML + 'text_column: "-text"\n').data.text_column == "-text"


def test_yaml_null_switches_a_default_off(tmp_path: Path) -> None:
    args = of_yaml(tmp_path, YAML + "save_total_limit: null\n").args
    assert args.save_total_limit is None


def test_resume_without_a_value_means_the_last(tmp_path: Path) -> None:
    args = recipe_of([*FLAGS, "--resume_from_checkpoint"]).args
    assert args.resume_from_checkpoint == "last"
    args = recipe_of([*FLAGS, "--resume_from_checkpoint", "out/checkpoint-5"]).args
    assert args.resume_from_checkpoint == "out/checkpoint-5"
    args = recipe_of(FLAGS).args
    assert args.resume_from_checkpoint is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            YAML + "learing_rate: 1\nrank: 4\n",
            ["run.yaml", "unknown key", "learing_rate", "'learning_rate'?"],
        ),
        ("- a\n- b\n", ["run.yaml", "no configuration", "learning_rate: 1e-3"]),
        ("", ["run.yaml", "no configuration"]),
        ("a: [1\n", ["run.yaml", "not valid YAML", "line 2"]),
        (YAML + "help: me\n", ["run.yaml", "unknown key", "help"]),
    ],
)
def test_bad_yaml_is_one_clear_error(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        parse_settings([written(tmp_path, text)])
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_missing_yaml_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the configuration '.*none\.yaml': No such file"):
        parse_settings([str(tmp_path / "none.yaml")])


@pytest.mark.parametrize("missing", ["--model_name_or_path", "--output_dir"])
def test_required_flags_are_asked_for(missing: str) -> None:
    at = FLAGS.index(missing)
    with pytest.raises(ValueError, match=f"arguments are required: {missing}"):
        parse_settings([*FLAGS[:at], *FLAGS[at + 2 :]])


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--lora_rnk", "lora_rank"),
        ("--learning_rat", "learning_rate"),
        ("--modle_name_or_path", "model_name_or_path"),
        ("--gradient_acumulation_steps=4", "gradient_accumulation_steps"),
        ("--max-seq-lenght", "max_seq_length"),
    ],
)
def test_an_unknown_flag_is_answered_with_the_nearest(flag: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"^unknown option .*; did you mean '--{near}'\\?$"):
        check_flags([*FLAGS, flag, "1"])


@pytest.mark.parametrize(
    ("option", "value", "near"),
    [
        ("optim", "adamm", "adamw_torch"),
        ("lr_scheduler_type", "cosin", "cosine"),
        ("eval_strategy", "epochs", "epoch"),
        ("cache_frozen_prefix", "memry", "memory"),
        ("log_level", "inof", "info"),
        ("metric_for_best_model", "acuracy", "accuracy"),
        ("report_to", "tensorbord", "tensorboard"),
        ("problem_type", "regresion", "regression"),
        ("quoting", "dubble", "double"),
        ("lora_variant", "dorra", "dora"),
        ("lora_bias", "lora", "lora_only"),
        ("lora_init", "gradint", "gradient"),
        ("pooling", "men", "mean"),
        ("precision", "bf1", "bf16"),
        ("refit", "alway", "always"),
        ("head_init", "prob", "probe"),
    ],
)
def test_an_unknown_word_is_answered_with_the_nearest_before_data_are_read(
    option: str, value: str, near: str
) -> None:
    with pytest.raises(ValueError, match=f"got '{value}'|invalid choice: '{value}'") as refused:
        recipe_of([*FLAGS, f"--{option}", value])
    assert str(refused.value).endswith(f"; did you mean '{near}'?")


def test_flags_of_every_kind_are_known() -> None:
    flags = ["--lora-rank=4", "--no_train_head", "--accelerate_config", "cpu_2", "--num_processes", "2"]
    check_flags([*FLAGS, *flags, "--quiet", "--dry_run", "--weight_decay", "-1"])


def test_an_unknown_flag_is_answered_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys; from hf_lora.cli.main import main; code = main(['train', '--lora_rnk', '4']); "
        "print(code, sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "2 []\n"
    assert run.stderr == "hf-lora: unknown option --lora_rnk; did you mean '--lora_rank'?\n"


@pytest.mark.parametrize("name", ["head_learning_rate", "lora_plus_ratio"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_rates_must_be_above_zero(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not usable; got .*; expected a number above 0"):
        recipe_of([*FLAGS, f"--{name}", value])


def test_help_shows_what_people_use_and_no_more() -> None:
    text = help_text()
    shown = re.findall(r"^  --(\w+)", text, flags=re.MULTILINE)
    assert shown == [*COMMON, "quiet", "dry_run"]
    assert text.count("  hf-lora train --") == 2
    assert max(map(len, text.splitlines())) <= 120


def test_full_help_has_every_option_with_its_text() -> None:
    text = full_help()
    shown = re.findall(r"^  --(\w+)", text, flags=re.MULTILINE)
    ours = [entry for group in all_options().values() for entry in group]
    assert len(shown) == len(set(shown))
    assert {entry.name for entry in ours} | transformers_options() <= set(shown)
    words = " ".join(text.split())
    assert [entry.name for entry in ours if " ".join(entry.help.split()) not in words] == []
