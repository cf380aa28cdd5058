from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from conftest import BAD, GOOD, LABELS, WORDS, write_texts
from datasets import Dataset, DatasetDict
from helpers_cli import head_on_base, read_texts, scored
from helpers_commands import Captured, mistake
from helpers_recipe import command, run_training
from helpers_serving import peft_logits, plain_logits
from huggingface_hub import ModelCard
from tiny_run import until
from torch import Tensor
from transformers import AutoModel

from hf_lora import (
    FinetuneOptions,
    FinetuneResult,
    LoRAConfig,
    LoRATrainingArguments,
    TextClassifier,
    finetune,
)
from hf_lora.cli import main as cli
from hf_lora.recipe.progress import Progress

Train = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def train(tiny_bert_dir: Path) -> Train:
    def run(output: Path, *flags: object) -> dict[str, Any]:
        return run_training(command(tiny_bert_dir, output, *flags))

    return run


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.csv"
    write_texts(path, 48)
    return path


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A validation and a test file, unbalanced and with some labels wrong so that no score is 0 or 1."""
    folder = tmp_path_factory.mktemp("held_out")
    for name, count in (("validation", 22), ("test", 30)):
        write_texts(folder / f"{name}.csv", count)
        rows = list(csv.reader((folder / f"{name}.csv").open()))
        for row in rows[3::5]:
            row[1] = LABELS[1]
        with (folder / f"{name}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows(rows)
    return folder / "validation.csv", folder / "test.csv"


@pytest.fixture(scope="module")
def trained(
    train: Train, texts: Path, held_out: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The directory and the metrics of a run that learns."""
    output = tmp_path_factory.mktemp("runs") / "sentiment"
    flags = ["--train_file", texts, "--validation_file", held_out[0], "--test_file", held_out[1]]
    flags += ["--num_train_epochs", 12, "--learning_rate", 1e-2, "--lora_rank", 4, "--logging_steps", 3]
    return output, train(output, *flags, "--language", "en", "--model_card_license", "mit")


def tensors(directory: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(directory / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    """Whether two adapters have the same tensors, bit for bit."""
    left, right = tensors(one), tensors(other)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def checkpoints(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("checkpoint-*"))


def test_run_writes_an_adapter_and_its_metrics(trained: tuple[Path, dict[str, Any]]) -> None:
    output, metrics = trained
    assert json.loads((output / "metrics.json").read_text()) == metrics
    names = {path.name for path in output.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "hf_lora.json", "README.md"} <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    # transformers would take a directory with this file for a whole model.
    assert "config.json" not in names
    # 48 texts in batches of 8 are 6 steps; the last two of twelve epochs are kept.
    assert checkpoints(output) == ["checkpoint-66", "checkpoint-72"]


def test_metrics_count_parameters_steps_and_bytes(
    trained: tuple[Path, dict[str, Any]], tiny_bert_dir: Path
) -> None:
    output, metrics = trained
    base = sum(p.numel() for p in AutoModel.from_pretrained(tiny_bert_dir).parameters())
    # 2 blocks of 4 projections with A (4, 32) and B (32, 4), and a head of 2 x 32 weights and 2 biases.
    trainable = 2 * 4 * 2 * 4 * 32 + 2 * 32 + 2
    assert metrics["trainable_parameters"] == trainable
    assert metrics["total_parameters"] == base + trainable
    assert (metrics["epochs"], metrics["global_step"]) == (12.0, 72)
    assert metrics["adapter_bytes"] == (output / "adapter_model.safetensors").stat().st_size
    assert 0 < metrics["train_runtime"] < 60
    # Python with torch takes more than 100 MB, and the machine has no 100 GB.
    assert 100 < metrics["peak_memory_mb"] < 100_000


@pytest.mark.parametrize(("index", "prefix"), [(0, "eval"), (1, "test")])
def test_metrics_are_those_of_the_saved_adapter_in_peft(
    index: int,
    prefix: str,
    trained: tuple[Path, dict[str, Any]],
    held_out: tuple[Path, Path],
    tiny_bert_dir: Path,
) -> None:
    output, metrics = trained
    rows, names = read_texts(held_out[index])
    truth = np.array([LABELS.index(name) for name in names])
    enabled = peft_logits(tiny_bert_dir, output, rows)
    disabled = plain_logits(head_on_base(tiny_bert_dir, output), rows)
    for logits, suffix in ((enabled, ""), (disabled, "_disabled")):
        expected = scored(logits.numpy(), truth)
        expected["loss"] = torch.nn.functional.cross_entropy(logits, torch.from_numpy(truth)).item()
        found = {name: metrics[f"{prefix}_{name}{suffix}"] for name in expected}
        assert found == pytest.approx(expected, abs=1e-4)
    assert metrics[f"{prefix}_loss"] != pytest.approx(metrics[f"{prefix}_loss_disabled"], abs=1e-3)


def test_class_errors_are_those_of_the_test_file(
    trained: tuple[Path, dict[str, Any]], held_out: tuple[Path, Path], tiny_bert_dir: Path
) -> None:
    output, metrics = trained
    rows, names = read_texts(held_out[1])
    given = {
        "wrong": peft_logits(tiny_bert_dir, output, rows).argmax(-1).tolist(),
        "wrong_disabled": plain_logits(head_on_base(tiny_bert_dir, output), rows).argmax(-1).tolist(),
    }
    expected = {
        label: {
            "support": names.count(label),
            **{
                kind: sum(LABELS[id] != name == label for id, name in zip(ids, names, strict=True))
                for kind, ids in given.items()
            },
            "false_positives": sum(
                LABELS[id] == label != name for id, name in zip(given["wrong"], names, strict=True)
            ),
        }
        for label in LABELS
    }
    assert metrics["class_errors"] == expected


def test_training_learns(trained: tuple[Path, dict[str, Any]], texts: Path) -> None:
    rows, names = read_texts(texts)
    results = TextClassifier.from_pretrained(trained[0]).predict(rows)
    right = sum(result["label"] == name for result, name in zip(results, names, strict=True))
    # Half of the 48 would be right by chance, and 36 or more with a probability of 0.0004.
    assert right >= 36


def test_sidecar_tells_how_the_adapter_was_made(
    trained: tuple[Path, dict[str, Any]], tiny_bert_dir: Path
) -> None:
    output, metrics = trained
    info = json.loads((output / "hf_lora.json").read_text())
    assert info["labels"] == list(LABELS) and info["problem_type"] == "single_label_classification"
    assert (info["max_length"], info["text_columns"], info["projections"]) == (32, ["text"], "qkvo")
    assert (info["label_columns"], info["label_layout"]) == (["label"], "values")
    assert info["base_model"]["name_or_path"] == str(tiny_bert_dir)
    assert {name: info["metrics"][name] for name in ("eval_accuracy", "test_accuracy")} == {
        name: metrics[name] for name in ("eval_accuracy", "test_accuracy")
    }


def test_card_shows_the_run(trained: tuple[Path, dict[str, Any]]) -> None:
    output, metrics = trained
    text = (output / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert (data.model_name, data.license, data.language) == ("sentiment", "mit", "en")
    results = {(r.dataset_split, r.metric_name): r.metric_value for r in data.eval_results}
    assert results[("validation", "accuracy")] == round(metrics["eval_accuracy"], 6)
    assert results[("test", "f1_macro")] == round(metrics["test_f1_macro"], 6)
    assert f"| accuracy | {metrics['eval_accuracy']:.4f} | {metrics['test_accuracy']:.4f} |" in text
    for row in ("| rank | 4 |", "| learning_rate | 0.01 |", "| num_train_epochs | 12.0 |", "| seed | 42 |"):
        assert row in text
    assert len(re.findall(r"^\| \d+\.00 \| \d+ \| \d\.\d{4} \|", text, flags=re.MULTILINE)) == 12


def test_used_output_dir_is_refused_and_untouched(
    train: Train, trained: tuple[Path, dict[str, Any]], texts: Path
) -> None:
    output, _ = trained
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(ValueError, match=r"in use; got .* with checkpoints .*--overwrite_output_dir"):
        train(output, "--train_file", texts)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_output_dir_with_other_files_is_not_in_use(train: Train, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    train(tmp_path, "--train_file", texts, "--save_strategy", "no")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "adapter_model.safetensors").is_file() and checkpoints(tmp_path) == []
    with pytest.raises(ValueError, match=r"in use; got .* with an adapter"):
        train(tmp_path, "--train_file", texts)


def test_overwriting_leaves_nothing_of_the_earlier_run(
    train: Train, trained: tuple[Path, dict[str, Any]], texts: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(trained[0], tmp_path / "run"))
    (output / "notes.txt").write_text("mine")
    metrics = train(output, "--train_file", texts, "--overwrite_output_dir")
    assert metrics["global_step"] == 5
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert not same(output, trained[0])
    assert (output / "notes.txt").read_text() == "mine"
    # A later --resume_from_checkpoint must not go on from the earlier run's checkpoint.
    assert checkpoints(output) == ["checkpoint-5"]


def test_dry_run_prints_and_writes_nothing(
    tiny_bert_dir: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--train_file", texts, "--dry_run", "--lora_projections", "vq", "--lora_layers", -1]
    flags += ["--num_train_epochs", 2, "--token", "hf_secret", "--hub_token", "hf_secret"]
    argv = command(tiny_bert_dir, tmp_path / "out", *flags)
    del argv[argv.index("--num_train_epochs") : argv.index("--num_train_epochs") + 2]
    assert cli.main(["train", *argv]) == 0
    out = capsys.readouterr().out
    modules = [f"bert.encoder.layer.1.attention.self.{name}" for name in ("query", "value")]
    assert "\n".join(modules) in out and "2 modules;" in out
    settings = json.loads(out[: out.index("\n}\n") + 2])
    assert settings["lora"]["projections"] == "qv" and settings["lora"]["layers"] == [-1]
    assert settings["training"]["learning_rate"] == "from the data"
    assert settings["training"]["num_train_epochs"] == 2
    assert "hf_secret" not in out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_passes_on_trust_in_remote_code(
    tiny_bert_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_lora.models import loading

    passed: dict[str, Any] = {}
    original = loading.meta_classifier

    def recorded(base: str, **options: Any) -> Any:
        passed.update(options)
        return original(base, **options)

    monkeypatch.setattr(loading, "meta_classifier", recorded)
    argv = command(
        tiny_bert_dir, tmp_path / "out", "--train_file", "x.csv", "--trust_remote_code", "--dry_run"
    )
    assert cli.main(["train", *argv]) == 0
    assert passed.get("trust_remote_code") is True


def test_early_stopping_keeps_the_best(train: Train, texts: Path, tmp_path: Path) -> None:
    flags = ["--train_file", texts, "--num_train_epochs", 9, "--learning_rate", 1e-12]
    flags += ["--load_best_model_at_end", "--metric_for_best_model", "accuracy"]
    metrics = train(tmp_path / "run", *flags, "--early_stopping_patience", 2)
    # Nothing is learned: the first evaluation stays the best, and two more are waited for.
    assert metrics["epochs"] == 3.0
    assert same(tmp_path / "run", tmp_path / "run" / "checkpoint-5")
    assert not same(tmp_path / "run", tmp_path / "run" / "checkpoint-15")


def test_early_stopping_needs_no_other_flag(train: Train, texts: Path, tmp_path: Path) -> None:
    # Steps this small change no loss: one evaluation after the first is waited for.
    flags = ["--train_file", texts, "--num_train_epochs", 9, "--learning_rate", 1e-30]
    metrics = train(tmp_path / "run", *flags, "--early_stopping_patience", 1)
    assert metrics["epochs"] == 2.0
    assert same(tmp_path / "run", tmp_path / "run" / "checkpoint-5")


def test_best_checkpoint_is_loaded_at_the_end(train: Train, texts: Path, tmp_path: Path) -> None:
    flags = ["--train_file", texts, "--num_train_epochs", 3, "--learning_rate", 0.3]
    flags += ["--load_best_model_at_end", "--save_total_limit", 9]
    metrics = train(tmp_path, *flags)
    losses = {}
    state = json.loads((tmp_path / "checkpoint-15" / "trainer_state.json").read_text())
    for entry in state["log_history"]:
        if "eval_loss" in entry:
            losses[entry["step"]] = entry["eval_loss"]
    best = min(losses, key=losses.__getitem__)
    assert metrics["eval_loss"] == pytest.approx(losses[best], abs=1e-5)
    assert same(tmp_path, tmp_path / f"checkpoint-{best}")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sentence(row: int) -> str:
    words = GOOD if row % 2 else BAD
    return f"the {WORDS[5 + row % 5]} was {words[row % 10]} and {words[(row + 3) % 10]}"


TASKS = {
    "regression": (
        lambda row: {"sentence": sentence(row), "label": row % 2 + row / 100},
        ("regression", ["label"], ["sentence"]),
        {"pearson", "spearman", "mse", "rmse"},
    ),
    "multi-label": (
        lambda row: {"text": sentence(row), "labels": ["good"] * (row % 2) + ["third"] * (row % 3 == 0)},
        ("multi_label_classification", ["good", "third"], ["text"]),
        {"accuracy", "f1_macro", "f1_micro", "precision_micro", "recall_micro", "roc_auc"},
    ),
    "pairs": (
        lambda row: {"premise": sentence(row), "hypothesis": sentence(row * 2), "label": row % 2},
        ("single_label_classification", ["0", "1"], ["premise", "hypothesis"]),
        {"accuracy", "f1_macro", "f1_weighted", "matthews_correlation", "roc_auc"},
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_other_tasks_train_and_evaluate_to_the_same_numbers(
    task: str, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, (problem_type, labels, columns), names = TASKS[task]
    data = write_jsonl(tmp_path / "train.jsonl", [make(row) for row in range(40)])
    test = write_jsonl(tmp_path / "test.jsonl", [make(row) for row in range(40, 64)])
    run = tmp_path / "run"
    metrics = train(run, "--train_file", data, "--test_file", test, "--learning_rate", 1e-2)
    info = json.loads((run / "hf_lora.json").read_text())
    assert (info["problem_type"], info["labels"], info["text_columns"]) == (problem_type, labels, columns)
    assert {f"eval_{name}" for name in names} <= metrics.keys()
    capsys.readouterr()
    flags = ["--adapter", str(run), "--test_file", str(test), "--precision", "fp32", "--json"]
    assert cli.main(["evaluate", *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert names <= report["metrics"].keys()
    for suffix, found in (("", report["metrics"]), ("_disabled", report["metrics_disabled"])):
        in_training = {name: metrics[f"test_{name}{suffix}"] for name in found}
        assert found == pytest.approx(in_training, abs=1e-5)


def unbalanced(path: Path) -> Path:
    rows = [{"text": sentence(row), "label": LABELS[row % 2]} for row in range(24)]
    return write_jsonl(path, rows + [{"text": sentence(2 * row), "label": LABELS[0]} for row in range(6)])


@pytest.mark.slow
def test_balanced_class_weights_are_inverse_frequencies(train: Train, tmp_path: Path) -> None:
    data = unbalanced(tmp_path / "train.jsonl")
    validation = write_jsonl(tmp_path / "validation.jsonl", [{"text": "good", "label": LABELS[1]}])
    flags = ["--train_file", data, "--validation_file", validation]
    # 18 of 30 are negative, 12 positive: n / (classes * n_class) is 30 / 36 and 30 / 24.
    weights = {"balanced": "balanced", "by_hand": f"{30 / 36},{30 / 24}", "none": None}
    for name, value in weights.items():
        train(tmp_path / name, *flags, *(["--class_weights", value] if value else []))
    for key, tensor in tensors(tmp_path / "balanced").items():
        torch.testing.assert_close(tensor, tensors(tmp_path / "by_hand")[key], rtol=0, atol=1e-6)
    assert not same(tmp_path / "balanced", tmp_path / "none")


def test_class_weights_are_refused_for_regression(train: Train, tmp_path: Path) -> None:
    rows = [{"text": sentence(row), "label": row / 7} for row in range(12)]
    data = write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(ValueError, match="class_weights cannot be used for regression"):
        train(tmp_path / "run", "--train_file", data, "--class_weights", "balanced")


def test_frozen_head_is_not_trained(train: Train, texts: Path, tmp_path: Path) -> None:
    flags = ["--train_file", texts, "--no_train_head", "--save_strategy", "steps", "--save_steps", 1]
    metrics = train(tmp_path, *flags, "--save_total_limit", 9)
    assert metrics["trainable_parameters"] == 2 * 4 * 2 * 8 * 32
    first, last = tensors(tmp_path / "checkpoint-1"), tensors(tmp_path)
    changed = {key for key in last if not torch.equal(first[key], last[key])}
    assert changed == {key for key in last if ".lora_" in key}


LONG_RUN = ["--num_train_epochs", 5, "--per_device_train_batch_size", 4, "--save_strategy", "steps"]
LONG_RUN += ["--save_steps", 4, "--save_total_limit", 20, "--eval_strategy", "no", "--lora_dropout", 0.1]


@pytest.fixture(scope="module")
def undisturbed(train: Train, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    train(output, "--train_file", texts, *LONG_RUN)
    return output


@pytest.mark.slow
def test_killed_and_resumed_run_equals_the_undisturbed_one(
    train: Train, undisturbed: Path, tiny_bert_dir: Path, texts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    argv = command(tiny_bert_dir, output, "--train_file", texts, *LONG_RUN)
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_lora.cli.main", "train", *argv],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_json(output / "checkpoint-4" / "trainer_state.json", process)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (output / "metrics.json").exists() and not (output / "adapter_model.safetensors").exists()
    metrics = train(output, "--train_file", texts, *LONG_RUN, "--resume_from_checkpoint")
    # 38 texts in batches of 4 are 10 steps in each of 5 epochs.
    assert metrics["global_step"] == 50
    assert same(output, undisturbed)
    assert not same(output / "checkpoint-4", undisturbed)


def wait_for_json(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until a file is whole: it exists for a moment before its contents do."""

    def whole() -> bool:
        try:
            return json.loads(path.read_text()) is not None
        except (OSError, json.JSONDecodeError):
            return process.poll() is not None

    assert until(whole, pause=0.002) and path.exists(), f"the process ended with {process.poll()}"


def copied_up_to(run: Path, step: int, target: Path) -> Path:
    """What a run would have left, had it been stopped after its checkpoint of `step`."""
    shutil.copytree(run / f"checkpoint-{step}", target / f"checkpoint-{step}")
    return target


@pytest.mark.slow
def test_resuming_from_a_named_checkpoint(
    train: Train, undisturbed: Path, texts: Path, tmp_path: Path
) -> None:
    checkpoint = undisturbed / "checkpoint-44"
    train(tmp_path / "run", "--train_file", texts, *LONG_RUN, "--resume_from_checkpoint", checkpoint)
    assert same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_resuming_passes_over_a_half_written_checkpoint(
    train: Train, undisturbed: Path, texts: Path, tmp_path: Path
) -> None:
    output = copied_up_to(undisturbed, 44, tmp_path / "run")
    # A run killed while it writes a checkpoint has written the adapter, but not yet the trainer's state.
    shutil.copytree(undisturbed / "checkpoint-48", output / "checkpoint-48")
    (output / "checkpoint-48" / "trainer_state.json").unlink()
    train(output, "--train_file", texts, *LONG_RUN, "--resume_from_checkpoint")
    assert same(output, undisturbed)


def test_resuming_without_a_checkpoint_starts_from_the_beginning(
    train: Train, texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = train(tmp_path / "run", "--train_file", texts, "--resume_from_checkpoint")
    assert metrics["global_step"] == 5
    assert "no checkpoint in" in caplog.text and "starting from the beginning" in caplog.text


def test_resuming_with_another_scaling_is_refused(
    train: Train, undisturbed: Path, texts: Path, tmp_path: Path
) -> None:
    output = copied_up_to(undisturbed, 44, tmp_path / "run")
    with pytest.raises(ValueError, match=r"another scaling .*; got 2; expected 4"):
        train(output, "--train_file", texts, *LONG_RUN, "--resume_from_checkpoint", "--lora_alpha", 32)


@pytest.mark.slow
def test_training_time_of_a_resumed_run_is_its_own(
    train: Train, undisturbed: Path, texts: Path, tmp_path: Path
) -> None:
    output = copied_up_to(undisturbed, 44, tmp_path / "run")
    path = output / "checkpoint-44" / "trainer_state.json"
    state = json.loads(path.read_text())
    # Evaluations of the process that was killed took longer than all of what is left.
    state["log_history"].append({"eval_loss": 0.5, "eval_runtime": 1000.0, "epoch": 4.0, "step": 40})
    path.write_text(json.dumps(state))
    metrics = train(output, "--train_file", texts, *LONG_RUN, "--resume_from_checkpoint")
    assert 0 < metrics["train_runtime"] < 60


@pytest.mark.slow
def test_yaml_file_starts_the_same_run(
    train: Train, texts: Path, tiny_bert_dir: Path, tmp_path: Path
) -> None:
    flags = ["--train_file", texts, "--learning_rate", 2e-3, "--lora_projections", "qv"]
    train(tmp_path / "flags", *flags)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {tiny_bert_dir}\ntrain_file: {texts}\noutput_dir: {tmp_path / 'yaml'}\n"
        "max_seq_length: 32\nuse_cpu: true\nper_device_train_batch_size: 8\nnum_train_epochs: 1\n"
        "disable_tqdm: true\nlearning_rate: 2e-3\nlora_projections: qv\nprecision: fp32\nhead_init: random\n"
    )
    assert cli.main(["train", str(config)]) == 0
    assert same(tmp_path / "yaml", tmp_path / "flags")


def test_a_budget_of_tokens_sets_the_number_of_steps(
    train: Train, texts: Path, held_out: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = ["--train_file", texts, "--validation_file", held_out[0], "--max_tokens_per_batch", 32]
    metrics = train(tmp_path / "run", *flags)
    # 48 texts of 8 tokens each: four to a batch, and not the eight of per_device_train_batch_size.
    assert metrics["global_step"] == 12


@pytest.mark.slow
def test_grouping_by_length_is_the_default_of_the_command_line_and_can_be_left(
    train: Train, texts: Path, tmp_path: Path
) -> None:
    runs = {name: tmp_path / name for name in ("default", "grouped", "random")}
    train(runs["default"], "--train_file", texts)
    train(runs["grouped"], "--train_file", texts, "--train_sampling_strategy", "group_by_length")
    train(runs["random"], "--train_file", texts, "--train_sampling_strategy", "random")
    assert same(runs["default"], runs["grouped"]) and not same(runs["default"], runs["random"])


def test_a_run_in_bf16_says_so_and_gives_an_ordinary_adapter(
    tiny_bert_dir: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = command(tiny_bert_dir, tmp_path / "run", "--train_file", texts)
    argv[argv.index("--precision") + 1] = "bf16"
    metrics = run_training(argv)
    assert "encoder: bf16, native pooling (" in capsys.readouterr().out
    tensors = safetensors.torch.load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    rows, names = read_texts(texts)
    classifier = TextClassifier.from_pretrained(tmp_path / "run", precision="fp32")
    assert classifier.model.dtype == torch.float32 and 0 <= metrics["eval_accuracy"] <= 1
    assert len(classifier.predict(rows)) == len(names)


def test_the_flags_of_transformers_keep_their_meaning(
    tiny_bert_dir: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = command(tiny_bert_dir, tmp_path / "run", "--train_file", texts, "--bf16", "True")
    argv[argv.index("--precision") + 1] = "auto"
    run_training(argv)
    assert "encoder: fp32, native pooling (" in capsys.readouterr().out


# What `finetune` is told on the tiny encoder; the same as `command` tells the command line.
QUICK = {
    "max_seq_length": 32,
    "use_cpu": True,
    "precision": "fp32",
    "head_init": "random",
    "per_device_train_batch_size": 8,
    "num_train_epochs": 1,
}


@pytest.fixture(scope="module")
def tuned(tiny_bert_dir: Path, texts: Path, held_out: tuple[Path, Path], tmp_path_factory) -> FinetuneResult:
    output = tmp_path_factory.mktemp("tuned") / "run"
    return finetune(str(tiny_bert_dir), texts, test=held_out[1], output_dir=output, **QUICK)


def test_data_in_memory_give_the_same_adapter_as_files_and_the_command_line(
    tuned: FinetuneResult, tiny_bert_dir: Path, texts: Path, held_out: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = {
        name: list(csv.DictReader(path.open())) for name, path in (("train", texts), ("test", held_out[1]))
    }
    forms: dict[str, dict[str, Any]] = {
        "dicts": rows,
        "frames": {name: pd.DataFrame(table) for name, table in rows.items()},
        "datasets": {name: Dataset.from_list(table) for name, table in rows.items()},
        "splits": {"train": DatasetDict({name: Dataset.from_list(table) for name, table in rows.items()})},
    }
    for name, tables in forms.items():
        result = finetune(str(tiny_bert_dir), output_dir=tmp_path / name, **tables, **QUICK)
        assert same(result.output_dir, tuned.output_dir), name
        assert result.test is not None and result.test.accuracy == tuned.metrics["test_accuracy"]
    run_training(command(tiny_bert_dir, tmp_path / "cli", "--train_file", texts, "--test_file", held_out[1]))
    assert same(tmp_path / "cli", tuned.output_dir)


def test_a_result_has_metrics_by_split_and_side(tuned: FinetuneResult, held_out: tuple[Path, Path]) -> None:
    assert json.loads((tuned.output_dir / "metrics.json").read_text()) == tuned.metrics
    assert tuned.test is not None
    for side, ending in (
        ("adapter", ""),
        ("disabled", "_disabled"),
        ("probe", "_probe"),
        ("baseline", "_majority"),
    ):
        assert getattr(tuned.test, side).accuracy == tuned.metrics[f"test_accuracy{ending}"]
        assert getattr(tuned.validation, side)["f1_macro"] == tuned.metrics[f"eval_f1_macro{ending}"]
    assert tuned.test.class_errors == tuned.metrics["class_errors"]
    with pytest.raises(AttributeError, match="no metric 'bleu'; expected one of loss, accuracy"):
        tuned.test.bleu  # noqa: B018
    rows, names = read_texts(held_out[1])
    answers = tuned.classifier.predict(rows)
    right = [answer["label"] == name for answer, name in zip(answers, names, strict=True)]
    assert tuned.test.accuracy == pytest.approx(np.mean(right))
    assert tuned.labels == LABELS and tuned.parameters.trainable == tuned.metrics["trainable_parameters"]


def test_the_same_call_again_gives_the_same_adapter_and_leaves_its_arguments_alone(
    tiny_bert_dir: Path, texts: Path, tmp_path: Path
) -> None:
    args = LoRATrainingArguments(
        str(tmp_path / "a"), use_cpu=True, learning_rate=0.0, num_train_epochs=0, max_steps=3
    )
    given = {"args": args, "lora": LoRAConfig(rank=2), "options": FinetuneOptions(head_init="random")}
    for name in "ab":
        finetune(str(tiny_bert_dir), texts, output_dir=tmp_path / name, max_seq_length=32, **given)
    assert same(tmp_path / "a", tmp_path / "b")
    assert (args.output_dir, args.learning_rate) == (str(tmp_path / "a"), 0.0)


class Told(Progress):
    """Everything that a run tells."""

    def __init__(self) -> None:
        self.facts: dict[str, str] = {}
        self.stages: list[str] = []
        self.bars: dict[str, tuple[int, int]] = {}
        self.epochs: list[float] = []

    def fact(self, topic: str, text: str) -> None:
        self.facts[topic] = text

    def begin(self, stage: str) -> None:
        self.stages.append(stage)

    def advance(self, done: int, total: int) -> None:
        self.bars[self.stages[-1]] = done, total

    def evaluated(self, epoch: float, metrics: Any) -> None:
        self.epochs.append(epoch)
        assert {"loss", "accuracy"} <= set(metrics)


def test_a_run_tells_what_it_understood_and_how_far_it_is(
    tiny_bert_dir: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = Told()
    settings = {**QUICK, "num_train_epochs": 2}
    finetune(str(tiny_bert_dir), texts, output_dir=tmp_path / "run", progress=told, **settings)
    assert told.facts["task"] == "single label classification of 'text'; labels negative 19, positive 19"
    assert told.facts["reason"] == "the labels are text"
    assert told.facts["examples"] == "train 38, validation 10; validation is held out of train"
    assert told.facts["lengths"] == "at most 8 tokens; none is cut at 32"
    assert told.facts["training"].startswith("learning rate 0.00055, 2 epochs of 5 steps")
    stages = [stage for stage in told.stages if stage != "validation"]
    assert stages == ["features", "epoch 1/2", "epoch 2/2", "retraining on all 48 examples"]
    assert told.bars["epoch 2/2"] == (5, 5)
    assert told.bars["retraining on all 48 examples"] == (12, 12)
    assert told.bars["features"][0] == told.bars["features"][1] > 0
    assert told.epochs == [1.0, 2.0]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rnk": 4}, "unknown option lora_rnk; did you mean 'lora_rank'?"),
        ({"output_dir": None}, "output_dir is missing; expected such as 'runs/mine'"),
        ({"train": None}, "no data given; expected a train_file or a dataset_name"),
        ({"train": 3}, "train"),
    ],
)
def test_a_mistake_is_one_line(
    settings: dict[str, Any], message: str, tiny_bert_dir: Path, texts: Path, tmp_path: Path
) -> None:
    given = {"train": texts, "output_dir": tmp_path / "run", **QUICK, **settings}
    with pytest.raises(ValueError) as error:
        finetune(str(tiny_bert_dir), **given)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            {"train_file": "unknown.csv"},
            "does not know most of the texts; got 100% of their tokens as '[UNK]'",
        ),
        ({"max_seq_length": 65}, "max_length is 65; the tokenizer's model takes at most 64"),
        (
            {"model_name_or_path": "runs/my/base"},
            "no such base model; got 'runs/my/base', which is not there",
        ),
        ({"model_name_or_path": "./base"}, "no such base model; got './base', which is not there"),
        ({"model_name_or_path": "adapter"}, "which is an adapter; expected its base model, '"),
        ({"model_name_or_path": "bert-base-uncased"}, "it hides the Hub's 'bert-base-uncased'"),
        (
            {"model_name_or_path": "unnamed"},
            "the tokenizer is not that of the model; got 5 tokens for 64 embeddings",
        ),
    ],
)
def test_a_base_that_is_none_or_does_not_fit_is_refused_before_its_weights_are_read(
    flags: dict[str, Any],
    words: str,
    tiny_bert_dir: Path,
    adapter_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoModelForSequenceClassification.from_pretrained", None)
    write_texts(tmp_path / "texts.csv", 40)
    (tmp_path / "bert-base-uncased").mkdir()
    shutil.copytree(adapter_dir, tmp_path / "adapter")
    shutil.copytree(tiny_bert_dir, tmp_path / "unnamed", ignore=shutil.ignore_patterns("*token*"))
    rows = [f"Wort{index} sagt nichts,{LABELS[index % 2]}" for index in range(40)]
    (tmp_path / "unknown.csv").write_text("text,label\n" + "\n".join(rows))
    argv = command(tiny_bert_dir, tmp_path / "out", "--train_file", tmp_path / "texts.csv")
    line = mistake(
        capsys, "train", *argv, *(word for name, value in flags.items() for word in (f"--{name}", value))
    )
    assert words in line and line.startswith("hf-lora: ")
