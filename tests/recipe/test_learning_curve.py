from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import write_texts
from helpers_recipe import run_training

from hf_lora.cli import main as cli
from hf_lora.recipe import series_progress
from hf_lora.recipe.learning_curve import Curve, CurveRuns, Point, Scores, Size, parse_shots
from hf_lora.recipe.learning_curve_plot import plot_curve

RUNS = ["shots-4/seed-7", "shots-4/seed-8", "shots-10/seed-7", "shots-10/seed-8"]
GRID = ["--shots", "10,4", "--seeds", "2"]


@pytest.fixture(scope="module")
def train_argv(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("texts") / "films"
    folder.mkdir()
    write_texts(folder / "train.csv", 60)
    write_texts(folder / "test.csv", 30)
    argv = ["--model_name_or_path", tiny_bert_dir, "--train_file", folder / "train.csv"]
    argv += ["--test_file", folder / "test.csv", "--seed", 7, "--max_seq_length", 32, "--use_cpu", "True"]
    argv += ["--precision", "fp32", "--max_steps", 3, "--learning_rate", 2e-2, "--eval_strategy", "no"]
    return [str(part) for part in argv]


@pytest.fixture(scope="module")
def drawn(train_argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("curves") / "curve"
    assert cli.main(["curve", *train_argv, *GRID, "--output_dir", str(output)]) == 0
    return output


def metrics(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())


def same(one: Path, other: Path) -> bool:
    left, right = (safetensors.torch.load_file(run / "adapter_model.safetensors") for run in (one, other))
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def pretended(argv: list[str], **_: Any) -> dict[str, Any]:
    """A run that measures what its size and seed say, in place of training; no majority class where all is used."""
    output = Path(argv[len(argv) - 1 - argv[::-1].index("--output_dir") + 1])
    shots, seed = (argv[argv.index(flag) + 1] if flag in argv else None for flag in ("--few_shot", "--seed"))
    seed = argv[len(argv) - 1 - argv[::-1].index("--seed") + 1]
    score = (0 if shots is None else int(shots)) / 100 + int(seed) / 1000
    found = {"test_accuracy": score, "test_accuracy_probe": score / 2, "train_runtime": 1.5}
    found |= {} if shots is None else {"test_accuracy_majority": 0.5}
    (output / "metrics.json").write_text(json.dumps(found))
    return found


def no_training(*_: Any, **__: Any) -> None:
    raise AssertionError("a run that is done was trained again")


@pytest.mark.slow
def test_every_size_and_seed_has_its_run(drawn: Path) -> None:
    found = {p.parent.relative_to(drawn).as_posix() for p in drawn.glob("*/*/adapter_model.safetensors")}
    assert found == set(RUNS)
    assert not list(drawn.rglob("checkpoint-*"))
    for run, train, held_out in zip(RUNS, (6, 6, 16, 16), (2, 2, 4, 4), strict=True):
        record = json.loads((drawn / run / "run.json").read_text())
        assert record["examples"] == {"train": train, "validation": held_out, "test": 30}
    assert len({metrics(drawn / run)["test_loss"] for run in RUNS}) == 4


def test_report_is_the_arithmetic_of_the_runs_metrics(drawn: Path, train_argv: list[str]) -> None:
    report = json.loads((drawn / "curve.json").read_text())
    assert (report["metric"], report["split"], report["measured_on"]) == ("accuracy", "test", 30)
    assert (report["data"], report["seeds"], report["lower_is_better"]) == ("films/train.csv", [7, 8], False)
    assert report["model"] == train_argv[1]
    assert [(size["shots"], size["examples"], size["held_out"]) for size in report["sizes"]] == [
        ("4", 8, 2),
        ("10", 20, 4),
    ]
    for size, runs in zip(report["sizes"], (RUNS[:2], RUNS[2:]), strict=True):
        scores = [metrics(drawn / run)["test_accuracy"] for run in runs]
        line = size["lines"]["LoRA"]
        assert line["scores"] == {"7": scores[0], "8": scores[1]}
        assert line["mean"] == pytest.approx(fmean(scores))
        assert line["spread"] == pytest.approx(stdev(scores))
        found = [metrics(drawn / run) for run in runs]
        assert size["seconds"] == pytest.approx(
            fmean(
                one["warm_start_runtime"] + one["train_runtime"] + one.get("refit_runtime", 0.0)
                for one in found
            )
        )


def test_a_run_is_the_plain_training_of_the_same_arguments(
    drawn: Path, train_argv: list[str], tmp_path: Path
) -> None:
    flags = ["--few_shot", "10", "--seed", "8", "--output_dir", str(tmp_path / "alone")]
    run_training([*train_argv, *flags])
    assert same(tmp_path / "alone", drawn / "shots-10/seed-8")


def test_what_is_done_is_used_and_what_is_not_is_trained(
    drawn: Path,
    train_argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = Path(shutil.copytree(drawn, tmp_path / "curve"))
    argv = ["curve", *train_argv, *GRID, "--output_dir", str(output), "--json"]
    (output / RUNS[2] / "metrics.json").unlink()
    trained = []

    def training(argv: list[str], **options: Any) -> Any:
        trained.append(argv)
        return run_training(argv, **options)

    monkeypatch.setattr("hf_lora.recipe.run_series.run_training", training)
    capsys.readouterr()
    assert cli.main(argv) == 0
    captured = capsys.readouterr()
    assert len(trained) == 1 and same(output / RUNS[2], drawn / RUNS[2])
    assert "3 of 4 runs are done already" in captured.err
    monkeypatch.setattr("hf_lora.recipe.run_series.run_training", no_training)
    assert cli.main(argv) == 0
    again, before = json.loads(capsys.readouterr().out), json.loads((drawn / "curve.json").read_text())
    assert again == json.loads(captured.out) == json.loads((output / "curve.json").read_text())
    assert [size["lines"] for size in again["sizes"]] == [size["lines"] for size in before["sizes"]]


def test_other_data_under_the_same_name_are_refused(
    drawn: Path, train_argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = Path(train_argv[3])
    content = texts.read_text()
    texts.write_text(content.replace("film", "book"))
    try:
        assert cli.main(["curve", *train_argv, *GRID, "--output_dir", str(drawn)]) == 2
    finally:
        texts.write_text(content)
    assert "other settings; got data_sha256=" in capsys.readouterr().err


def test_baselines_are_lines_where_they_are_measured(
    train_argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hf_lora.recipe.run_series.run_training", pretended)
    picture = tmp_path / "pictures" / "curve.svg"
    argv = ["curve", *train_argv, "--shots", "all,4", "--seeds", "2", "--output_dir", str(tmp_path / "c")]
    assert cli.main([*argv, "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "c" / "curve.json").read_text())
    assert [size["shots"] for size in report["sizes"]] == ["4", "all"]
    assert [size["examples"] for size in report["sizes"]] == [8, 60]
    lines = [
        {name: (line["mean"], line["scores"]) for name, line in size["lines"].items()}
        for size in report["sizes"]
    ]
    assert lines == [
        {
            "LoRA": (pytest.approx(0.0475), {"7": 0.047, "8": 0.048}),
            "linear probe": (pytest.approx(0.02375), {"7": 0.0235, "8": 0.024}),
            "majority class": (0.5, {"7": 0.5, "8": 0.5}),
        },
        {
            "LoRA": (pytest.approx(0.0075), {"7": 0.007, "8": 0.008}),
            "linear probe": (pytest.approx(0.00375), {"7": 0.0035, "8": 0.004}),
        },
    ]
    assert re.search(r"│ 4 +│ +8 +│ +2 +│ +0\.0475 +│ +0\.0007 +│ +0\.0238 .*│ +0\.5000 +│ +0\.0000 ", shown)
    assert re.search(r"│ all +│ +60 +│ +12 +│ +0\.0075 +│ +0\.0007 +│ +0\.0037 .*│ {3,}│ {3,}│ +1\.5 ", shown)
    assert f"{tmp_path / 'c' / 'curve.json'} and {picture}" in shown
    # matplotlib writes each text of a picture as a comment beside its glyphs.
    texts = re.findall(r"<!-- (.*?) -->", picture.read_text())
    assert {"LoRA", "linear probe", "majority class", "films/train.csv", "(4 each)", "(all)", "60"} <= {
        *texts
    }
    assert any("30 test examples; seeds 7, 8; mean, and standard deviation as a band" in t for t in texts)


def test_a_validation_file_is_none_of_the_examples(
    train_argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hf_lora.recipe.run_series.run_training", pretended)
    argv = [*train_argv, "--validation_file", train_argv[5], "--output_dir", str(tmp_path / "c")]
    assert cli.main(["curve", *argv, "--shots", "4", "--seeds", "1"]) == 0
    assert "held out" not in capsys.readouterr().out
    (size,) = json.loads((tmp_path / "c" / "curve.json").read_text())["sizes"]
    assert (size["examples"], size["held_out"]) == (8, 0)


def test_lines_that_nothing_measured_are_left_out() -> None:
    point = Point(Size(8), 16, 0, {"LoRA": Scores({1: 0.5})}, None)
    curve = Curve("accuracy", "test", 10, "d", "m", [1], [point])
    assert curve.lines == ["LoRA"]
    assert curve.table() == (["of each label", "examples", "LoRA"], [["8", 16, 0.5]])
    assert point.lines["LoRA"].spread is None


def test_dry_run_lists_the_runs_and_leaves_nothing(
    train_argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["curve", *train_argv, *GRID, "--output_dir", str(tmp_path / "new"), "--dry_run", "--json"]
    assert cli.main(argv) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"of each label": shots, "seed": seed, "state": "to do", "directory": str(tmp_path / "new" / run)}
        for (shots, seed), run in zip((("4", 7), ("4", 8), ("10", 7), ("10", 8)), RUNS, strict=True)
    ]
    assert not (tmp_path / "new").exists()


def test_the_picture_is_one(drawn: Path) -> None:
    content = (drawn / "curve.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", content[16:24]) == (1140, 720)


def test_same_numbers_give_the_same_file(tmp_path: Path) -> None:
    points = [Point(Size(n), 2 * n, 0, {"LoRA": Scores({1: n / 99, 2: n / 98})}, None) for n in (8, 32)]
    for name in ("one.png", "two.png"):
        # Dollars and control characters of a name are no mathematics, and no error.
        plot_curve(Curve("accuracy", "test", 10, "a$b$\x1b[31m", "m", [1, 2], points), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_without_matplotlib_there_is_a_table_and_a_line(
    drawn: Path,
    train_argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = Path(shutil.copytree(drawn, tmp_path / "curve"))
    for name in ("curve.png", "curve.json"):
        (output / name).unlink()
    monkeypatch.setattr("hf_lora.recipe.run_series.run_training", no_training)
    monkeypatch.setattr(series_progress.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["curve", *train_argv, *GRID, "--output_dir", str(output)]) == 0
    captured = capsys.readouterr()
    assert "no picture, since matplotlib is not installed" in captured.err
    assert "curve.png" not in captured.out and not (output / "curve.png").exists()
    assert (output / "curve.json").is_file()


def plan(train_argv: list[str], output: Path, *more: str) -> CurveRuns:
    return CurveRuns([*train_argv, *more], output=output, shots="4,10", seeds=2)


@pytest.mark.parametrize(("more", "equal"), [((), False), (("--split_seed", "3"), True)])
def test_each_seed_draws_its_own_unless_told(
    more: tuple[str, ...], equal: bool, train_argv: list[str], tmp_path: Path
) -> None:
    runs = plan(train_argv, tmp_path, *more)
    data = [runs.data_of(run).texts for run in runs.runs]
    for one, other in ((0, 1), (2, 3)):
        assert (data[one]["train"]["text"][:] == data[other]["train"]["text"][:]) is equal
    for smaller, larger in ((0, 2), (1, 3)):
        assert set(data[smaller]["train"]["text"]) <= set(data[larger]["train"]["text"])


def test_without_test_data_all_runs_are_measured_on_one_held_out_part(
    train_argv: list[str], tmp_path: Path
) -> None:
    alone = [word for word in train_argv if word != "--test_file" and not word.endswith("test.csv")]
    runs = plan(alone, tmp_path)
    tests = [runs.data_of(run).texts["test"]["text"][:] for run in runs.runs]
    assert len(tests[0]) == 12 and all(texts == tests[0] for texts in tests)
    assert [len(runs.data_of(run).texts["train"]) for run in runs.runs] == [6, 6, 16, 16]


LINES = {
    "--shots 8,,32": ["shots", "'8,,32'", "8,32,128,all"],
    "--shots 0,8": ["shots", "'0,8'", "above 0"],
    "--shots 8,most": ["shots", "'8,most'", "'all'"],
    "--shots 8,all,8": ["shots has 8 twice"],
    "--shots all,all": ["shots has all twice"],
    "--shots 1,8": ["few_shot 1 leaves nothing to hold out", "2 or more"],
    "--seeds 0": ["seeds", "got 0"],
    "--metric speed": ["metric", "'speed'", "f1_macro"],
    "--plot curve.doc": ["plot is no picture", "'curve.doc'", ".png"],
    "--few_shot 8": ["--few_shot is not for a curve", "--shots"],
    "--max_train_samples 8": ["--max_train_samples is not for a curve", "--shots"],
    "--push_to_hub": ["--push_to_hub", "hf-lora push"],
    "--resume_from_checkpoint": ["--resume_from_checkpoint", "a curve goes on by itself"],
    "--bogus 1": ["--bogus"],
    "--model_name_or_path @tmp/nobase": ["nobase"],
}


@pytest.mark.parametrize("line", LINES)
def test_mistake_is_told_in_one_line(
    line: str, train_argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = line.replace("@tmp", str(tmp_path)).split()
    assert cli.main(["curve", *train_argv, "--output_dir", str(tmp_path / "new"), *flags]) == 2
    captured = capsys.readouterr()
    message = captured.err.splitlines()[-1]
    assert message.startswith("hf-lora: ") and "Traceback" not in captured.err
    assert [words for words in LINES[line] if words not in message] == []
    assert not list(tmp_path.glob("new/*"))


def test_few_shot_of_a_regression_is_refused(
    train_argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "scores.csv"
    texts.write_text("text,label\n" + "".join(f"the film was good,{row / 7:.3f}\n" for row in range(40)))
    argv = [*train_argv[:2], "--train_file", str(texts), *train_argv[6:]]
    argv = [word for word in argv if word != "--test_file" and not word.endswith("test.csv")]
    assert cli.main(["curve", *argv, *GRID, "--output_dir", str(tmp_path / "new")]) == 2
    assert "a regression has none; got 4; use max_train_samples" in capsys.readouterr().err


def test_sizes_are_in_order() -> None:
    assert parse_shots("all, 32,8") == [Size(8), Size(32), Size(None)]
    assert [size.name for size in parse_shots("2,all")] == ["2", "all"]


def test_help_says_where_the_other_arguments_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["curve", "--help"])
    assert exit.value.code == 0
    assert "hf-lora train --help" in " ".join(capsys.readouterr().out.split())
