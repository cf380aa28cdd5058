"""The facts of a report: from the files of an adapter, whatever stands in them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from hf_lora.adapters.directory import read_adapter
from hf_lora.insight.page import render
from hf_lora.insight.report import collect


def test_facts_are_those_of_the_files(adapter_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter_dir, tmp_path / "run")
    recorded = {"train_runtime": 3.0, "global_step": 1_200, "epochs": 2.0, "total_parameters": 10**15}
    for more, expected in (({}, None), ({"refit_examples": 1_000}, "1,000")):
        (tmp_path / "run" / "metrics.json").write_text(json.dumps(recorded | more))
        facts = dict(collect(read_adapter(tmp_path / "run")).facts)
        assert (facts["training seconds"], facts["steps"], facts["epochs"]) == ("3", "1,200", "2")
        assert facts.get("retrained on examples") == expected
    assert (facts["modules"], facts["roles"]) == ("8", "query, key, value, output")
    assert (facts["rank"], facts["alpha"], facts["lora parameters"]) == ("4", "8", "2,048")
    # A page is passed on: it does not tell where the files are.
    assert str(tmp_path) not in "".join(facts.values())


def test_results_of_the_training_run_stand_in_columns(adapter_dir: Path, tmp_path: Path):
    shutil.copytree(adapter_dir, tmp_path / "run")
    recorded = {
        "eval_accuracy": 0.75,
        "eval_accuracy_disabled": 0.5,
        "eval_accuracy_majority": 0.25,
        "eval_accuracy_probe": 0.625,
        "eval_calibration_error": 0.0125,
        "eval_calibration_error_uncalibrated": 0.0625,
        "test_accuracy": 0.875,
        "test_runtime": 9.0,
    }
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(recorded))
    files = read_adapter(tmp_path / "run")
    columns = (
        "with adapter",
        "encoder without adapter",
        "before calibration",
        "majority class",
        "linear probe",
    )
    rows = {
        "validation accuracy": (0.75, 0.5, None, 0.25, 0.625),
        "validation calibration error": (0.0125, None, 0.0625, None, None),
        "test accuracy": (0.875, None, None, None, None),
    }
    expected = [(name, dict(zip(columns, row, strict=True))) for name, row in rows.items()]
    assert collect(files).results == expected
    regression = replace(files, info=replace(files.info, problem_type="regression"))
    assert list(collect(regression).results[0][1])[3] == "mean predictor"


def test_the_training_curve_is_that_of_the_newest_checkpoint(adapter_dir: Path, tmp_path: Path):
    shutil.copytree(adapter_dir, tmp_path / "run")
    for step, losses in ((9, [9.0]), (20, [1.5, 0.75])):
        log = [{"step": 10 * n, "loss": loss} for n, loss in enumerate(losses, 1)]
        log.append({"step": 20, "eval_loss": 0.6})
        (tmp_path / "run" / f"checkpoint-{step}").mkdir()
        state = tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json"
        state.write_text(json.dumps({"log_history": log}))
    made = collect(read_adapter(tmp_path / "run"))
    assert made.history is not None and made.history.source == "checkpoint-20/trainer_state.json"
    assert made.history.training == [(10, 1.5), (20, 0.75)] and made.history.validation == [(20, 0.6)]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"log_history": 3}',
        '{"log_history": [3, {"step": "x", "loss": NaN}, {"step": 1, "loss": []}]}',
    ],
)
def test_files_beside_the_adapter_may_be_anything(adapter_dir: Path, tmp_path: Path, content: str):
    shutil.copytree(adapter_dir, tmp_path / "run")
    for name in ("metrics.json", "trainer_state.json"):
        (tmp_path / "run" / name).write_text(content)
    made = collect(read_adapter(tmp_path / "run"))
    assert made.history is None
    assert any(sentence.startswith("training curve") for sentence in made.missing)
    huge = 10**400
    row = {"support": huge, "wrong": 1, "wrong_disabled": 1}
    for broken in (
        {"class_errors": {"a": {"support": -1}}},
        {"class_errors": {"a": {**row, "support": -1}}},
        {"class_errors": 3, "total_parameters": 0, "trainable_parameters": 0, "epochs": "x", "eval_f1": [1]},
        {"class_errors": {"a": row}, "total_parameters": 1, "trainable_parameters": huge, "eval_f1": huge},
    ):
        (tmp_path / "run" / "metrics.json").write_text(json.dumps(broken))
        made = collect(read_adapter(tmp_path / "run"))
        assert made.classes == {} and made.share is None and made.results == []
    render(made)


def test_a_thousand_points_are_enough(adapter_dir: Path, tmp_path: Path):
    shutil.copytree(adapter_dir, tmp_path / "run")
    log = [{"step": step, "loss": 0.0} for step in range(2500)]
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    history = collect(read_adapter(tmp_path / "run")).history
    assert history is not None and history.training == [(step, 0.0) for step in range(0, 2500, 3)]
