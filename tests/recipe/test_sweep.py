from __future__ import annotations

import json
import math
import os
import re
import signal
import struct
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import write_texts

from hf_lora import LoRATrainer
from hf_lora.recipe.finetune import Finetuning, finetune
from hf_lora.recipe.grid import Grid, Point, Scores
from hf_lora.recipe.progress import Lines
from hf_lora.recipe.sweep import choose_metric, curve_grid, learning_curve, sweep, sweep_grid
from hf_lora.recipe.sweep_report import Curve, Sweep, write_report
from hf_lora.tasks import REGRESSION, task_of

FAST: dict[str, Any] = {
    **{"seed": 7, "max_seq_length": 32, "use_cpu": True, "precision": "fp32", "num_train_epochs": 2},
    **{"learning_rate": 2e-2, "per_device_train_batch_size": 8, "eval_strategy": "no", "disable_tqdm": True},
}
SETTINGS = ["rank-2-qv/seed-7", "rank-2-qv/seed-8", "rank-1-qv/seed-7", "rank-1-qv/seed-8"]
SIZES = ["shots-4/seed-7", "shots-4/seed-8", "shots-10/seed-7", "shots-10/seed-8"]


@pytest.fixture
def given(tiny_bert_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """A model, 60 texts to train on and 30 to test on, and settings of quick runs."""
    folder = tmp_path / "films"
    folder.mkdir()
    write_texts(folder / "train.csv", 60)
    write_texts(folder / "test.csv", 30)
    files = {"train": folder / "train.csv", "test": folder / "test.csv"}
    return {"model": str(tiny_bert_dir), **files, **FAST}


def settings_of(given: dict[str, Any], output: Path, **more: Any) -> dict[str, Any]:
    """The same for a Grid."""
    names = {"model": "model_name_or_path", "train": "train_file", "test": "test_file"}
    plain = {names.get(name, name): value for name, value in given.items()}
    return {**plain, **more, "output_dir": str(output)}


def swept(given: dict[str, Any], output: Path, **more: Any) -> Sweep:
    grid = {"ranks": (2, 1), "projections": ("qv",), "seeds": 2, "metric": "loss"}
    return sweep(output_dir=output, **{**given, **grid, **more})


def drawn(given: dict[str, Any], output: Path, **more: Any) -> Curve:
    return learning_curve(output_dir=output, **{**given, "shots": (10, 4), "seeds": 2, **more})


def metrics_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())


def same(one: Path, other: Path) -> bool:
    left, right = (safetensors.torch.load_file(run / "adapter_model.safetensors") for run in (one, other))
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs that measure what their rank, size and seed say, in place of training; the list of those that were run.

    There is no majority class where all examples are used.
    """
    runs: list[str] = []

    class Pretended(Finetuning):
        def run(self) -> Any:
            recipe, output = self.recipe, Path(self.recipe.args.output_dir)
            runs.append(output.relative_to(output.parents[1]).as_posix())
            shots, seed, rank = recipe.data.few_shot, recipe.args.seed, recipe.lora_config.rank
            score = (shots or 0) / 100 + seed / 1000
            found = {"eval_loss": rank / 10 + seed**2 / 1000, "eval_accuracy": 0.5, "test_loss": seed / 10}
            found |= {"test_accuracy": score, "test_accuracy_probe": score / 2, "trainable_parameters": 66}
            found |= {"warm_start_runtime": 0.5, "train_runtime": 1.0, "refit_runtime": seed / 10}
            found |= {} if shots is None else {"test_accuracy_majority": 0.5}
            found["trainable_parameters"] += 256 * rank
            (output / "metrics.json").write_text(json.dumps(found))
            print("a line of the run")
            return SimpleNamespace(metrics=found)

    monkeypatch.setattr("hf_lora.recipe.grid.Finetuning", Pretended)
    return runs


def test_a_sweep_is_the_arithmetic_of_its_runs(
    given: dict[str, Any], tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = swept(given, tmp_path / "sweep")
    assert trained == SETTINGS
    report = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert report == json.loads(json.dumps(found.as_json()))
    assert (report["metric"], report["lower_is_better"], report["validation_examples"]) == ("loss", True, 12)
    for rank, setting in zip((2, 1), report["settings"], strict=True):
        scores = [rank / 10 + 0.049, rank / 10 + 0.064]
        assert setting["scores"] == pytest.approx({"7": scores[0], "8": scores[1]})
        assert setting["test_scores"] == {"7": 0.7, "8": 0.8}
        assert (setting["mean"], setting["spread"]) == pytest.approx((fmean(scores), stdev(scores)))
        assert setting["seconds"] == pytest.approx(1.5 + 0.75)
        # 2 blocks of 2 projections with A (r, 32) and B (32, r); a head of 2 x 32 weights and 2 biases.
        assert (setting["rank"], setting["projections"]) == (rank, "qv")
        assert (setting["lora_parameters"], setting["trainable_parameters"]) == (256 * rank, 256 * rank + 66)
    assert report["best"] == report["smallest_within_noise"] == {"rank": 1, "projections": "qv"}
    assert report["noise"] == pytest.approx(stdev([0.049, 0.064]))
    assert found.smallest.options == {"lora_rank": 1, "lora_projections": "qv"}
    assert found.smallest.directory == tmp_path / "sweep/rank-1-qv/seed-7"
    # What a run prints is in its file.
    assert capsys.readouterr().out == ""
    assert "a line of the run" in (found.smallest.directory / "train.log").read_text()


def test_what_is_done_is_used_and_what_is_not_is_trained(
    given: dict[str, Any], tmp_path: Path, trained: list[str]
) -> None:
    first, told = swept(given, tmp_path / "sweep"), list[str]()
    # Another spelling, and what has no effect, make no other run.
    more = {"disable_tqdm": False, "learning_rate": float("0.020"), "progress": Lines(told.append)}
    assert swept(given, tmp_path / "sweep", **more).as_json() == first.as_json()
    assert "runs: 4 of 4 runs are done already" in told
    assert swept(given, tmp_path / "sweep", metric=None).metric == "accuracy"
    assert trained == SETTINGS
    (tmp_path / "sweep" / SETTINGS[2] / "metrics.json").unlink()
    assert swept(given, tmp_path / "sweep", **more).as_json() == first.as_json()
    assert trained[4:] == SETTINGS[2:3]
    assert "runs: 3 of 4 runs are done already" in told
    assert re.fullmatch(r"4 of 4: rank-1-qv, seed 7: loss 0\.1490, \d+\.\d s; 0:00:00 left", told[-1])


def test_other_settings_are_refused_and_replaced_on_request(
    given: dict[str, Any], tmp_path: Path, trained: list[str]
) -> None:
    swept(given, tmp_path / "sweep")
    other = {"ranks": (1,), "seeds": 1, "learning_rate": 0.01}
    message = r"other settings; got learning_rate=0\.02; expected 0\.01; pass --overwrite_output_dir"
    with pytest.raises(ValueError, match=message):
        swept(given, tmp_path / "sweep", **other)
    swept(given, tmp_path / "sweep", **other, overwrite_output_dir=True)
    assert trained[4:] == ["rank-1-qv/seed-7"]
    given["train"].write_text(given["train"].read_text().replace("film", "book"))
    with pytest.raises(ValueError, match="other settings; got data_sha256="):
        swept(given, tmp_path / "sweep")
    (tmp_path / "sweep/rank-2-qv/seed-7/run.json").unlink()
    with pytest.raises(ValueError, match=r"not a run of a sweep; got .* without run\.json"):
        swept(given, tmp_path / "sweep")


def test_a_curve_refuses_other_data_under_the_same_name(
    given: dict[str, Any], tmp_path: Path, trained: list[str]
) -> None:
    drawn(given, tmp_path / "curve")
    given["train"].write_text(given["train"].read_text().replace("film", "book"))
    with pytest.raises(ValueError, match="other settings; got data_sha256="):
        drawn(given, tmp_path / "curve")


def test_a_metric_that_a_run_could_not_measure_is_told(
    given: dict[str, Any], tmp_path: Path, trained: list[str]
) -> None:
    message = r"rank-2-qv, seed 7: eval_roc_auc could not be measured; see train\.log in '.*/seed-7'"
    with pytest.raises(ValueError, match=message):
        swept(given, tmp_path / "sweep", metric="roc_auc")


@pytest.mark.slow
def test_a_run_is_the_plain_training_with_the_same_options(given: dict[str, Any], tmp_path: Path) -> None:
    found, curve = swept(given, tmp_path / "sweep"), drawn(given, tmp_path / "curve")
    assert not list(tmp_path.rglob("checkpoint-*")), "checkpoints of a run that is done are of no use"
    # The last runs: nothing of those before them may be left in them.
    options = {**found.points[-1].options, "seed": 8, "split_seed": 7}
    finetune(output_dir=tmp_path / "alone", **{**given, **options})
    assert same(tmp_path / "alone", tmp_path / "sweep" / SETTINGS[-1])
    finetune(output_dir=tmp_path / "few", **{**given, **curve.points[-1].options, "seed": 8})
    assert same(tmp_path / "few", tmp_path / "curve" / SIZES[-1])
    for output, runs in (("sweep", SETTINGS), ("curve", SIZES)):
        losses = {metrics_of(tmp_path / output / run)["test_loss"] for run in runs}
        assert len(losses) == 4


@pytest.mark.slow
def test_a_sweep_that_sigterm_stopped_goes_on_from_its_checkpoint(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept(given, tmp_path / "whole", ranks=(1,))
    output = tmp_path / "sweep"
    own, steps, told = LoRATrainer.training_step, list[int](), list[str]()

    def stepping(self: LoRATrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        steps.append(self.args.seed)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(LoRATrainer, "training_step", stepping)
    with pytest.raises(SystemExit) as exit:
        swept(given, output, ranks=(1,), progress=Lines(told.append))
    assert exit.value.code == 143
    assert told[-1] == "runs: stopped with 0 of 2 runs done; the same command goes on"
    grid = sweep_grid(settings_of(given, output), [1], ["qv"], 2)
    assert [run.state for run in grid.runs] == ["goes on from checkpoint-3", "to do"]
    steps[:] = [0] * 3  # no signal this time
    (setting,) = swept(given, output, ranks=(1,)).points
    # 48 texts in batches of 8 are 6 steps in each of 2 epochs, of which one run had done 3; in the end, with
    # the 12 that are held out, 8 steps in each.
    assert [steps[3:].count(seed) for seed in (7, 8)] == [9 + 16, 12 + 16]
    for run in ("rank-1-qv/seed-7", "rank-1-qv/seed-8"):
        assert same(output / run, tmp_path / "whole" / run)
    # The seconds of a run that was stopped are not those of a whole one.
    whole = metrics_of(output / "rank-1-qv/seed-8")
    assert setting.seconds == sum(
        whole[name] for name in ("warm_start_runtime", "train_runtime", "refit_runtime")
    )


def texts_of(grid: Grid, split: str) -> list[list[str]]:
    return [grid.data_of(run).texts[split]["text"][:] for run in grid.runs]


def test_all_runs_of_a_sweep_share_one_split(given: dict[str, Any], tmp_path: Path) -> None:
    for more, seed in (({}, 7), ({"split_seed": 3}, 3)):
        grid = sweep_grid(settings_of(given, tmp_path, **more), [1], ["q"], 2)
        assert all(grid.settings_of(run)["split_seed"] == seed for run in grid.runs)
        for split in ("train", "validation"):
            one, other = texts_of(grid, split)
            assert one == other


@pytest.mark.parametrize(("more", "equal"), [({}, False), ({"split_seed": 3}, True)])
def test_each_seed_of_a_curve_draws_its_own_unless_told(
    more: dict[str, Any], equal: bool, given: dict[str, Any], tmp_path: Path
) -> None:
    train = texts_of(curve_grid(settings_of(given, tmp_path, **more), [4, 10], 2), "train")
    assert (train[0] == train[1]) is (train[2] == train[3]) is equal
    for smaller, larger in ((0, 2), (1, 3)):
        assert set(train[smaller]) <= set(train[larger])


def test_without_test_data_a_curve_is_measured_on_one_held_out_part(
    given: dict[str, Any], tmp_path: Path
) -> None:
    del given["test"]
    grid = curve_grid(settings_of(given, tmp_path), [4, 10], 2)
    tests = texts_of(grid, "test")
    assert len(tests[0]) == 12 and all(texts == tests[0] for texts in tests)
    assert [len(texts) for texts in texts_of(grid, "train")] == [6, 6, 16, 16]


def test_a_curve_has_the_lines_that_are_measured(
    given: dict[str, Any], tmp_path: Path, trained: list[str]
) -> None:
    found = drawn(given, tmp_path / "curve", shots=(None, 4))
    report = json.loads((tmp_path / "curve/curve.json").read_text())
    assert trained == ["shots-4/seed-7", "shots-4/seed-8", "shots-all/seed-7", "shots-all/seed-8"]
    assert report == json.loads(json.dumps(found.as_json()))
    assert (report["metric"], report["split"], report["measured_on"]) == ("accuracy", "test", 30)
    assert (report["data"], report["seeds"], report["lower_is_better"]) == ("films/train.csv", [7, 8], False)
    assert report["model"] == given["model"]
    sizes = report["sizes"]
    assert [(size["shots"], size["examples"], size["held_out"]) for size in sizes] == [
        ("4", 8, 2),
        ("all", 60, 12),
    ]
    lines = [{name: (line["mean"], line["scores"]) for name, line in size["lines"].items()} for size in sizes]
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
    assert sizes[0]["lines"]["LoRA"]["spread"] == pytest.approx(stdev([0.047, 0.048]))
    assert sizes[0]["seconds"] == pytest.approx(2.25)
    record = json.loads((tmp_path / "curve/shots-4/seed-7/run.json").read_text())
    assert record["examples"] == {"train": 6, "validation": 2, "test": 30}
    columns = found.table()
    assert list(columns) == [
        *("of each label", "examples", "held out", "LoRA", "spread of LoRA", "linear probe"),
        *("spread of linear probe", "majority class", "spread of majority class", "seconds"),
    ]
    assert [column[1] for column in columns.values()] == [
        *("all", 60, 12, pytest.approx(0.0075), pytest.approx(0.0007, abs=1e-5)),
        *(pytest.approx(0.00375), pytest.approx(0.00035, abs=1e-5), None, None, "2.2"),
    ]
    # matplotlib writes each text of a picture as a comment beside its glyphs.
    write_report(found, tmp_path, tmp_path / "pictures" / "curve.svg")
    texts = re.findall(r"<!-- (.*?) -->", (tmp_path / "pictures" / "curve.svg").read_text())
    shown = {"LoRA", "linear probe", "majority class", "films/train.csv", "(4 each)", "(all)", "60"}
    assert shown <= {*texts}
    assert any("30 test examples; seeds 7, 8; mean, and standard deviation as a band" in t for t in texts)


def test_a_validation_file_is_none_of_the_examples(
    given: dict[str, Any], tmp_path: Path, trained: list[str]
) -> None:
    found = drawn(given, tmp_path / "curve", validation=given["test"], shots=(4,))
    assert found.points[0].facts == {"examples": 8, "held_out": 0}
    assert found.table()["held out"] == [None]


def test_data_in_memory(given: dict[str, Any], tmp_path: Path, trained: list[str]) -> None:
    rows = [{"text": f"film {row}", "label": "ab"[row % 2]} for row in range(20)]
    del given["test"]
    found = drawn({**given, "train": rows}, tmp_path / "curve", seeds=1)
    assert (found.data, found.measured_on) == ("", 4)
    rows[0]["text"] = "another"
    with pytest.raises(ValueError, match="got data_sha256="):
        drawn({**given, "train": rows}, tmp_path / "curve", seeds=1)


MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no ranks": (swept, {"ranks": ()}, "ranks are not usable; got ''; expected whole numbers above 0"),
    "rank 0": (swept, {"ranks": (0, 1)}, "ranks are not usable; got '0,1'"),
    "ranks twice": (swept, {"ranks": (4, 1, 4)}, "ranks has 4 twice; got '4,1,4'; expected each once"),
    "all ranks": (swept, {"ranks": (None,)}, "ranks are not usable"),
    "sets twice": (swept, {"projections": ("q", "vq", "qv")}, "projections has qv twice"),
    "no seed": (swept, {"seeds": 0}, "seeds is not usable; got 0"),
    "rank of all": (swept, {"lora_rank": 4}, "--lora_rank is not for a sweep; use --ranks"),
    "unknown option": (
        swept,
        {"learning_rte": 1.0},
        "unknown option learning_rte; did you mean 'learning_rate'",
    ),
    "shots twice": (drawn, {"shots": (8, None, 8)}, "shots has 8 twice"),
    "all twice": (drawn, {"shots": (None, None)}, "shots has all twice"),
    "one shot": (drawn, {"shots": (1, 8)}, "few_shot 1 leaves nothing to hold out"),
    "metric": (
        drawn,
        {"metric": "speed"},
        "unknown metric for these labels; got 'speed'; expected one of loss,",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_anything_is_written(
    name: str, given: dict[str, Any], tmp_path: Path, trained: list[str]
) -> None:
    function, more, message = MISTAKES[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        function(given, tmp_path / "new", **more)
    assert not (tmp_path / "new").exists() and trained == []


def test_few_shot_of_a_regression_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"text": "the film was good", "label": row / 7} for row in range(40)]
    del given["test"]
    with pytest.raises(ValueError, match="a regression has none; got 4; use max_train_samples"):
        drawn({**given, "train": rows}, tmp_path / "new")


def test_settings_and_sizes_are_in_order(given: dict[str, Any], tmp_path: Path) -> None:
    settings = settings_of(given, tmp_path)
    names = [v.name for v in sweep_grid(settings, [8, 1], ["q", "oqkv"], 1).points]
    assert names == ["rank-8-q", "rank-1-q", "rank-8-qkvo", "rank-1-qkvo"]
    names = [v.name for v in curve_grid(settings, [None, 32, 8], 1).points]
    assert names == ["shots-8", "shots-32", "shots-all"]


def test_the_metric_of_a_regression_is_not_accuracy() -> None:
    task = task_of(REGRESSION)
    assert (choose_metric(None, task), choose_metric("eval_rmse", task)) == ("pearson", "rmse")
    with pytest.raises(ValueError, match="got 'accuracy'; expected one of loss, pearson"):
        choose_metric("accuracy", task)


def setting(rank: int, size: int, *scores: float, projections: str = "qv") -> Point:
    facts = {"lora_parameters": size - 10, "trainable_parameters": size}
    options = {"lora_rank": rank, "lora_projections": projections}
    lines = {"validation": Scores(enumerate(scores))}
    return Point("", options, {"rank": rank, "projections": projections}, lines, facts)


def sweep_of(*points: Point, metric: str = "accuracy", examples: int = 100) -> Sweep:
    seeds = list(points[0].lines["validation"])
    return Sweep(metric, "validation", examples, "d", "m", seeds, points)


BEST = setting(8, 800, 0.90, 0.92, 0.94)  # mean 0.92, variance 0.0004
NEAR = setting(4, 400, 0.89, 0.91, 0.93)  # mean 0.91, variance 0.0004
FAR = setting(1, 100, 0.85, 0.87, 0.89)  # mean 0.87, variance 0.0004


def test_smallest_within_one_standard_error_of_the_difference() -> None:
    found = sweep_of(FAR, NEAR, BEST)
    assert found.noise[0] == pytest.approx(math.sqrt(0.0004 / 3 + 0.0004 / 3))  # 0.0163
    assert (found.best, found.smallest) == (BEST, NEAR)
    assert "one standard error of the difference between two means over 3 seeds" in found.noise[1]


def test_an_unsteady_setting_is_not_good_for_that_alone() -> None:
    found = sweep_of(setting(1, 100, 0.75, 0.87, 0.99), NEAR, BEST)
    assert found.noise[0] == pytest.approx(math.sqrt(2 * 0.0004 / 3))
    assert found.smallest is NEAR


def test_equal_means_are_within_no_noise() -> None:
    # 4 and 6 right of 12 are 5 and 5 of 12; in floating point their mean is a bit less.
    small, large = setting(1, 100, 4 / 12, 6 / 12), setting(8, 800, 5 / 12, 5 / 12)
    assert small.mean < large.mean
    one, other = setting(1, 100, small.mean), setting(8, 800, large.mean)
    assert sweep_of(one, other, metric="f1_macro", examples=12).smallest is one


def test_of_one_size_it_is_the_better_one() -> None:
    q, v = (setting(4, 400, s, s + 0.02, s + 0.04, projections=p) for p, s in (("q", 0.890), ("v", 0.891)))
    assert sweep_of(q, v, BEST).smallest is v


def test_a_loss_is_better_when_lower() -> None:
    small, large = setting(1, 100, 0.30, 0.32, 0.34), setting(8, 800, 0.20, 0.22, 0.24)
    found = sweep_of(small, large, metric="loss")
    assert found.best is found.smallest is large
    near = setting(2, 200, 0.21, 0.23, 0.25)
    assert sweep_of(small, near, large, metric="loss").smallest is near


def test_one_seed_has_the_noise_of_its_examples() -> None:
    small, large = setting(1, 100, 0.87), setting(8, 800, 0.90)
    found = sweep_of(small, large)
    assert found.noise[0] == pytest.approx(math.sqrt(0.9 * 0.1 / 100))  # 0.03
    assert found.smallest is small
    assert sweep_of(small, large, examples=400).smallest is large
    unknown = sweep_of(small, large, metric="f1_macro")
    assert (unknown.noise[0], unknown.smallest) == (0.0, large)
    assert "give --seeds 3" in unknown.noise[1]


def test_the_table_marks_the_choice() -> None:
    columns = sweep_of(FAR, NEAR, BEST).table()
    assert [column[0] for column in columns.values()] == [
        *(1, "qv", 90, 100, pytest.approx(0.87), pytest.approx(0.02), None, None, None),
    ]
    assert columns[""] == [None, "smallest within noise", "best"]
    columns = sweep_of(setting(1, 100, 0.87)).table()
    assert columns["spread"] == [None] and columns[""] == ["best, and smallest within noise"]


def curve_of(*shots: int, seeds: int = 2, data: str = "d") -> Curve:
    points = [
        Point(
            "",
            {"few_shot": n},
            {"shots": str(n)},
            {"LoRA": Scores({seed: n / (98 + seed) for seed in range(seeds)})},
            {"examples": 2 * n, "held_out": 0},
        )
        for n in shots
    ]
    return Curve("accuracy", "test", 10, data, "m", list(range(seeds)), points)


def test_lines_that_nothing_measured_are_left_out() -> None:
    found = curve_of(49, seeds=1)
    assert found.lines == ["LoRA"]
    columns = {"of each label": ["49"], "examples": [98], "held out": [None], "LoRA": [0.5]}
    assert found.table() == {**columns, "spread of LoRA": [None], "seconds": [None]}


@pytest.mark.parametrize(
    ("found", "size"), [(sweep_of(FAR, NEAR, BEST), (1200, 720)), (curve_of(8, 9, 32), (1140, 720))]
)
def test_same_numbers_give_the_same_picture(
    found: Sweep | Curve, size: tuple[int, int], tmp_path: Path
) -> None:
    for name in ("one.png", "two.png"):
        assert write_report(found, tmp_path, tmp_path / name).files[-1] == tmp_path / name
    content = (tmp_path / "one.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content == (tmp_path / "two.png").read_bytes()
    assert struct.unpack(">II", content[16:24]) == size
    import matplotlib.image

    pixels = matplotlib.image.imread(tmp_path / "one.png")
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20


def test_dollars_and_control_characters_of_a_name_are_no_mathematics(tmp_path: Path) -> None:
    assert write_report(curve_of(8, data="a$b$\x1b[31m"), tmp_path).files[-1].is_file()


def test_without_matplotlib_there_is_a_report_and_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert write_report(curve_of(8), tmp_path).files == (tmp_path / "curve.json",)
    assert "no picture, since matplotlib is not installed" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["curve.json"]
