from __future__ import annotations

import json
import math
import os
import re
import signal
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import write_texts
from helpers_recipe import run_training
from hf_lora.recipe.arguments import DataArguments, ModelArguments
from hf_lora.recipe.run_settings import data_config

from hf_lora import LoRATrainer
from hf_lora.cli import main as cli
from hf_lora.data import prepare_data
from hf_lora.models.loading import load_tokenizer
from hf_lora.recipe import series_progress
from hf_lora.recipe.sweep import Sweep, parse_projections, parse_ranks
from hf_lora.recipe.sweep_results import Result, choose, table_rows
from hf_lora.training.arguments import LoRATrainingArguments

GRID = ["--ranks", "2,1", "--projections", "qv", "--seeds", "2"]
RUNS = ["rank-2-qv/seed-7", "rank-2-qv/seed-8", "rank-1-qv/seed-7", "rank-1-qv/seed-8"]


def arguments(base: Path, texts: Path) -> list[str]:
    argv = ["--model_name_or_path", base, "--train_file", texts, "--validation_fraction", 0.25, "--seed", 7]
    argv += ["--max_seq_length", 32, "--use_cpu", "True", "--precision", "fp32", "--num_train_epochs", 2]
    argv += ["--learning_rate", 2e-2, "--per_device_train_batch_size", 8, "--eval_strategy", "no"]
    return [str(part) for part in argv]


@pytest.fixture(scope="module")
def train_argv(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    texts = tmp_path_factory.mktemp("texts") / "texts.csv"
    write_texts(texts, 48)
    return arguments(tiny_bert_dir, texts)


@pytest.fixture(scope="module")
def swept(train_argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sweeps") / "sweep"
    argv = ["sweep", *train_argv, *GRID, "--output_dir", str(output), "--metric", "loss"]
    assert cli.main(argv) == 0
    return output


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    left, right = adapter(one), adapter(other)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def seconds(metrics: dict[str, float]) -> float:
    return metrics["warm_start_runtime"] + metrics["train_runtime"] + metrics["refit_runtime"]


def no_training(*_: Any, **__: Any) -> None:
    raise AssertionError("a run that is done was trained again")


def test_every_setting_and_seed_has_its_run(swept: Path) -> None:
    found = {
        path.parent.relative_to(swept).as_posix() for path in swept.glob("*/*/adapter_model.safetensors")
    }
    assert found == set(RUNS)
    assert not list(swept.rglob("checkpoint-*")), "checkpoints of a run that is done are of no use"
    ranks = {run: adapter(swept / run) for run in RUNS}
    for run, tensors in ranks.items():
        shapes = {t.shape[0] for key, t in tensors.items() if key.endswith("lora_A.weight")}
        assert shapes == {int(run[5])}
        assert len([key for key in tensors if "lora_A" in key]) == 4
    assert not same(swept / RUNS[0], swept / RUNS[1])


def test_report_is_the_arithmetic_of_the_runs_metrics(swept: Path) -> None:
    report = json.loads((swept / "sweep.json").read_text())
    measured = {run: json.loads((swept / run / "metrics.json").read_text()) for run in RUNS}
    assert (report["metric"], report["validation_examples"]) == ("loss", 12)
    variances = []
    for setting, runs in zip(report["settings"], (RUNS[:2], RUNS[2:]), strict=True):
        scores = [measured[run]["eval_loss"] for run in runs]
        assert len(set(scores)) == 2
        assert list(setting["scores"].items()) == [("7", scores[0]), ("8", scores[1])]
        assert setting["mean"] == pytest.approx(np.mean(scores))
        assert setting["spread"] == pytest.approx(np.std(scores, ddof=1))
        assert setting["seconds"] == pytest.approx(np.mean([seconds(measured[run]) for run in runs]))
        # 2 blocks of 2 projections with A (r, 32) and B (32, r); a head of 2 x 32 weights and 2 biases.
        assert setting["lora_parameters"] == 2 * 2 * 2 * 32 * setting["rank"]
        assert setting["trainable_parameters"] == setting["lora_parameters"] + 66
        variances.append(np.var(scores, ddof=1))
    best = min(range(2), key=lambda index: report["settings"][index]["mean"])
    assert report["best"]["rank"] == report["settings"][best]["rank"]
    assert report["noise"] == pytest.approx(np.sqrt(variances[best] * (1 / 2 + 1 / 2)))


def test_a_run_is_the_plain_training_of_the_same_arguments(
    swept: Path, train_argv: list[str], tmp_path: Path
) -> None:
    # The last run of the sweep: nothing of those before it may be left in it.
    plan = Sweep(train_argv, output=swept, ranks="2,1", projections="qv", seeds=2)
    assert plan.runs[-1].directory == swept / "rank-1-qv/seed-8"
    run_training([*plan.argv(plan.runs[-1]), "--output_dir", str(tmp_path / "alone")])
    assert same(tmp_path / "alone", swept / "rank-1-qv/seed-8")


@pytest.mark.parametrize(("split_seed", "equal"), [(7, True), (None, False)])
def test_seeds_share_a_split_by_split_seed(
    split_seed: int | None, equal: bool, train_argv: list[str], tiny_bert_dir: Path, tmp_path: Path
) -> None:
    model = ModelArguments(str(tiny_bert_dir))
    data = DataArguments(
        train_file=train_argv[3], max_seq_length=32, max_train_samples=20, split_seed=split_seed
    )
    tokenizer = load_tokenizer(str(tiny_bert_dir))
    one, other = (
        prepare_data(data_config(data, model, LoRATrainingArguments(str(tmp_path), seed=seed)), tokenizer)
        for seed in (7, 8)
    )
    for split in ("train", "validation"):
        assert (one.texts[split]["text"][:] == other.texts[split]["text"][:]) is equal


def test_what_is_done_is_used(
    swept: Path, train_argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hf_lora.recipe.run_series.run_training", no_training)
    before = (swept / "sweep.json").read_text()
    argv = ["sweep", *train_argv, *GRID, "--output_dir", str(swept), "--json"]
    assert cli.main([*argv, "--metric", "eval_loss"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads(before) == json.loads((swept / "sweep.json").read_text())
    assert "4 of 4 runs are done already" in captured.err
    assert cli.main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    measured = [json.loads((swept / run / "metrics.json").read_text())["eval_accuracy"] for run in RUNS]
    assert report["metric"] == "accuracy"
    assert [score for entry in report["settings"] for score in entry["scores"].values()] == measured
    (swept / "sweep.json").write_text(before)


def test_arguments_without_effect_do_not_make_another_run(
    swept: Path, train_argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_lora.recipe.run_series.run_training", no_training)
    argv = [*train_argv, "--disable_tqdm", "True", "--learning_rate", "0.020"]
    assert cli.main(["sweep", *argv, *GRID, "--output_dir", str(swept)]) == 0


def copied(swept: Path, target: Path) -> Path:
    import shutil

    return Path(shutil.copytree(swept, target))


def test_other_settings_are_refused_and_replaced_on_request(
    swept: Path, train_argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = copied(swept, tmp_path / "sweep")
    argv = ["sweep", *train_argv, "--learning_rate", "0.01", "--output_dir", str(output)]
    argv += ["--ranks", "1", "--projections", "qv", "--seeds", "1"]
    capsys.readouterr()
    assert cli.main(argv) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"other settings; got learning_rate=0\.02; expected 0\.01; pass --overwrite_output", message
    )
    assert cli.main([*argv, "--overwrite_output_dir"]) == 0
    assert not same(output / "rank-1-qv/seed-7", swept / "rank-1-qv/seed-7")
    assert same(output / "rank-1-qv/seed-8", swept / "rank-1-qv/seed-8")


def test_another_data_set_under_the_same_name_is_other_settings(
    swept: Path, train_argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = Path(train_argv[3])
    content = texts.read_text()
    texts.write_text(content.replace("film", "book"))
    try:
        assert cli.main(["sweep", *train_argv, *GRID, "--output_dir", str(swept)]) == 2
    finally:
        texts.write_text(content)
    assert "other settings; got data_sha256=" in capsys.readouterr().err


def test_a_sweep_that_sigterm_stopped_goes_on_from_its_checkpoint(
    swept: Path,
    train_argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["sweep", *train_argv, "--ranks", "1", "--projections", "qv", "--seeds", "2"]
    argv += ["--output_dir", str(tmp_path / "sweep")]
    stopped, left = (tmp_path / "sweep" / "rank-1-qv" / f"seed-{seed}" for seed in (7, 8))
    own, steps = LoRATrainer.training_step, []

    def stepping(self: LoRATrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        steps.append(self.args.seed)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(LoRATrainer, "training_step", stepping)
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == 143
    assert "stopped with 0 of 2 runs done; the same command goes on" in capsys.readouterr().err
    assert [path.name for path in stopped.glob("checkpoint-*")] == ["checkpoint-3"]
    cli.main([*argv, "--dry_run", "--json"])
    states = [row["state"] for row in json.loads(capsys.readouterr().out)]
    assert states == ["goes on from checkpoint-3", "to do"]
    steps[:] = [0] * 3  # no signal this time
    assert cli.main(argv) == 0
    # 36 texts in batches of 8 are 5 steps in each of 2 epochs, of which one run had done 3; in the end, with
    # the 9 that are held out, 6 steps in each.
    assert [steps[3:].count(seed) for seed in (7, 8)] == [7 + 12, 10 + 12]
    assert same(stopped, swept / "rank-1-qv/seed-7") and same(left, swept / "rank-1-qv/seed-8")
    (setting,) = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["settings"]
    # The seconds of a run that was stopped are not those of a whole one.
    assert setting["seconds"] == seconds(json.loads((left / "metrics.json").read_text()))


def test_dry_run_lists_the_runs_and_leaves_nothing(
    train_argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["sweep", *train_argv, *GRID, "--output_dir", str(tmp_path / "new"), "--dry_run", "--json"]
    assert cli.main(argv) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["directory"] for row in rows] == [str(tmp_path / "new" / run) for run in RUNS]
    assert [(row["rank"], row["projections"], row["seed"], row["state"]) for row in rows] == [
        (2, "qv", 7, "to do"),
        (2, "qv", 8, "to do"),
        (1, "qv", 7, "to do"),
        (1, "qv", 8, "to do"),
    ]
    assert [row["LoRA parameters"] for row in rows] == [512, 512, 256, 256]
    assert not (tmp_path / "new").exists()


def test_the_picture_is_one(swept: Path) -> None:
    content = (swept / "sweep.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width > 600 and height > 400
    import matplotlib.image

    pixels = matplotlib.image.imread(swept / "sweep.png")
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20


def test_without_matplotlib_there_is_a_table_and_a_line(
    swept: Path,
    train_argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = copied(swept, tmp_path / "sweep")
    (output / "sweep.png").unlink()
    monkeypatch.setattr("hf_lora.recipe.run_series.run_training", no_training)
    monkeypatch.setattr(series_progress.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["sweep", *train_argv, *GRID, "--output_dir", str(output)]) == 0
    captured = capsys.readouterr()
    assert "no picture, since matplotlib is not installed" in captured.err
    assert "sweep.png" not in captured.out and not (output / "sweep.png").exists()


LINES = {
    "--ranks 1,,2": ["ranks", "'1,,2'", "1,2,4,8"],
    "--ranks 0,1": ["ranks", "'0,1'", "above 0"],
    "--ranks 4,x": ["ranks", "'4,x'"],
    "--ranks 4,1,4": ["ranks has 4 twice"],
    "--projections q,vq,qv": ["projections has qv twice"],
    "--projections q,w": ["'w'", "qkvo"],
    "--seeds 0": ["seeds", "got 0"],
    "--metric speed": ["metric", "'speed'", "f1_macro"],
    "--lora_rank 4": ["--lora_rank", "--ranks"],
    "--lora-rank=4": ["--lora_rank", "--ranks"],
    "--lora_target_modules query": ["--lora_target_modules", "--projections"],
    "--resume_from_checkpoint": ["--resume_from_checkpoint", "by itself"],
    "--push_to_hub": ["--push_to_hub", "hf-lora push"],
    "--accelerate_config cpu_2": ["--accelerate_config", "one process"],
    "--bogus 1": ["--bogus"],
    "--model_name_or_path @tmp/nobase": ["nobase"],
}


@pytest.mark.parametrize("line", LINES)
def test_mistake_is_told_in_one_line(
    line: str, train_argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = line.replace("@tmp", str(tmp_path)).split()
    assert cli.main(["sweep", *train_argv, "--output_dir", str(tmp_path / "new"), *flags]) == 2
    captured = capsys.readouterr()
    message = captured.err.splitlines()[-1]
    assert message.startswith("hf-lora: ") and "Traceback" not in captured.err
    assert [words for words in LINES[line] if words not in message] == []
    assert not list(tmp_path.glob("new/*"))


def test_a_yaml_file_holds_the_runs_arguments(
    train_argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    pairs = zip(train_argv[::2], train_argv[1::2], strict=True)
    config.write_text("".join(f"{name[2:]}: {value}\n" for name, value in pairs))
    flags = [*GRID, "--output_dir", str(tmp_path / "new"), "--dry_run", "--json"]
    assert cli.main(["sweep", str(config), *flags]) == 0
    assert [row["seed"] for row in json.loads(capsys.readouterr().out)] == [7, 8, 7, 8]
    config.write_text(config.read_text() + "lora_rank: 3\n")
    assert cli.main(["sweep", str(config), *flags]) == 2
    assert "--lora_rank is not for a sweep; use --ranks" in capsys.readouterr().err


def test_help_says_where_the_other_arguments_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["sweep", "--help"])
    assert exit.value.code == 0
    assert "hf-lora train --help" in " ".join(capsys.readouterr().out.split())


def test_lists_are_read_in_order() -> None:
    assert parse_ranks("8, 1,4") == [8, 1, 4]
    assert parse_projections("q, vq,oqkv") == ["q", "qv", "qkvo"]


def test_the_metric_of_a_regression_is_not_accuracy(tiny_bert_dir: Path, tmp_path: Path) -> None:
    texts = tmp_path / "scores.csv"
    texts.write_text("text,label\n" + "".join(f"the film was good,{row / 7:.3f}\n" for row in range(20)))
    plan = Sweep(arguments(tiny_bert_dir, texts), output=tmp_path / "s", ranks="1", projections="q", seeds=1)
    assert (plan.metric(None), plan.metric("eval_rmse")) == ("pearson", "rmse")
    with pytest.raises(ValueError, match="got 'accuracy'; expected one of loss, pearson"):
        plan.metric("accuracy")


def result(rank: int, size: int, *scores: float, projections: str = "qv") -> Result:
    return Result(rank, projections, size - 10, size, dict(enumerate(scores)))


BEST = result(8, 800, 0.90, 0.92, 0.94)  # mean 0.92, variance 0.0004
NEAR = result(4, 400, 0.89, 0.91, 0.93)  # mean 0.91, variance 0.0004
FAR = result(1, 100, 0.85, 0.87, 0.89)  # mean 0.87, variance 0.0004


def test_smallest_within_one_standard_error_of_the_difference() -> None:
    choice = choose([FAR, NEAR, BEST], "accuracy", 100)
    assert choice.noise.value == pytest.approx(math.sqrt(0.0004 / 3 + 0.0004 / 3))  # 0.0163
    assert (choice.best, choice.smallest) == (BEST, NEAR)
    assert "one standard error of the difference between two means over 3 seeds" in choice.noise.rule


def test_an_unsteady_setting_is_not_good_for_that_alone() -> None:
    unsteady = result(1, 100, 0.75, 0.87, 0.99)
    choice = choose([unsteady, NEAR, BEST], "accuracy", 100)
    assert choice.noise.value == pytest.approx(math.sqrt(2 * 0.0004 / 3))
    assert choice.smallest is NEAR


def test_equal_means_are_within_no_noise() -> None:
    # 4 and 6 right of 12 are 5 and 5 of 12; in floating point their mean is a bit less.
    small, large = result(1, 100, 4 / 12, 6 / 12), result(8, 800, 5 / 12, 5 / 12)
    assert small.mean < large.mean
    one, other = result(1, 100, small.mean), result(8, 800, large.mean)
    assert choose([one, other], "f1_macro", 12).smallest is one


def test_of_one_size_it_is_the_better_one() -> None:
    q, v = (result(4, 400, s, s + 0.02, s + 0.04, projections=p) for p, s in (("q", 0.890), ("v", 0.891)))
    assert choose([q, v, BEST], "accuracy", 100).smallest is v


def test_a_loss_is_better_when_lower() -> None:
    small, large = result(1, 100, 0.30, 0.32, 0.34), result(8, 800, 0.20, 0.22, 0.24)
    choice = choose([small, large], "loss", 100)
    assert choice.best is choice.smallest is large
    near = result(2, 200, 0.21, 0.23, 0.25)
    assert choose([small, near, large], "loss", 100).smallest is near


def test_one_seed_has_the_noise_of_its_examples() -> None:
    small, large = result(1, 100, 0.87), result(8, 800, 0.90)
    choice = choose([small, large], "accuracy", 100)
    assert choice.noise.value == pytest.approx(math.sqrt(0.9 * 0.1 / 100))  # 0.03
    assert choice.smallest is small
    assert choose([small, large], "accuracy", 400).smallest is large
    unknown = choose([small, large], "f1_macro", 100)
    assert (unknown.noise.value, unknown.smallest) == (0.0, large)
    assert "give --seeds 3" in unknown.noise.rule


def test_table_marks_the_choice_and_leaves_empty_columns_out() -> None:
    names, rows = table_rows([FAR, NEAR, BEST], choose([FAR, NEAR, BEST], "accuracy", 100))
    assert names == ["rank", "projections", "LoRA", "trainable", "mean", "spread", ""]
    assert [row[-1] for row in rows] == [None, "smallest within noise", "best"]
    assert rows[0][:5] == [1, "qv", 90, 100, pytest.approx(0.87)]
    one = result(1, 100, 0.87)
    names, rows = table_rows([one], choose([one], "accuracy", 100))
    assert "spread" not in names and rows[0][-1] == "best, and smallest within noise"
