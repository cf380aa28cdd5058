"""The quality benchmark without its runs: tables from made results, the files, going on where it stopped."""

from __future__ import annotations

import csv
import io
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from time import sleep
from typing import Any

import pytest
import quality
from data_sets import QualitySet, fold, quality_sets, write_rows
from tiny_run import HANGS

OWN = ("accuracy", "probe", "majority")


def own(accuracy: float, seconds: float = 10.0) -> dict[str, float]:
    return {
        "accuracy": accuracy,
        "probe": 0.5,
        "majority": 0.25,
        "seconds": seconds,
        "share_trained": 0.0065,
        "calibration_error": 0.01,
        "calibration_error_uncalibrated": 0.05,
    }


RESULT = {
    "runs": {
        "words": {
            "hf_lora": {"1": own(0.9), "2": own(0.8, 12.0)},
            "peft": {"1": {"accuracy": 0.7, "seconds": 40.0}, "2": {"accuracy": 0.6, "seconds": 60.0}},
            "full 1e-4": {"1": {"accuracy": 0.65}},
            "full 5e-5": {"1": {"accuracy": 0.75}, "2": {"accuracy": 0.77}},
        }
    }
}


def test_the_table_has_means_with_least_and_greatest_and_the_better_full_fine_tuning() -> None:
    (row,) = quality.rows(RESULT)
    assert row == (
        "words",
        "0.8500 (0.8000 - 0.9000)",
        "0.5000 (0.5000 - 0.5000)",
        "0.6500 (0.6000 - 0.7000)",
        "0.7600 (0.7500 - 0.7700)",
        "0.2500",
        "2/2/2",
    )
    assert len(row) == len(quality.HEADER)


def test_the_ratio_of_times_is_the_mean_of_the_seeds_ratios() -> None:
    (row,) = quality.cost_rows(RESULT)
    ratio = mean([10 / 40, 12 / 60])
    assert row == ("words", "11", "50", f"{ratio:.2f}", "0.65%", "0.0500 to 0.0100")
    assert len(row) == len(quality.COST_HEADER)


def test_sides_without_runs_are_dashes() -> None:
    made = {"runs": {"words": {"hf_lora": {"1": own(0.9)}}}}
    (row,) = quality.rows(made)
    assert row[3] == row[4] == "-"
    assert quality.cost_rows(made) == [("words", "10", "-", "-", "0.65%", "0.0500 to 0.0100")]
    stock = {"runs": {"words": {"peft": {"1": {"accuracy": 0.7, "seconds": 40.0}}}}}
    assert quality.cost_rows(stock) == [("words", "-", "40", "-", "-", "-")]
    (row,) = quality.rows(stock)
    assert row == ("words", "-", "-", "0.7000 (0.7000 - 0.7000)", "-", "-", "0/1/0")


def test_the_readmes_table_is_that_of_the_results_file() -> None:
    root = Path(__file__).parents[2]
    text = (root / "scripts" / "benchmarks" / "results" / "quality.json").read_text(encoding="utf-8")
    lines = (root / "README.md").read_text(encoding="utf-8").splitlines()
    shown = {cells[0]: cells[1:] for cells in (line.strip("| ").split(" | ") for line in lines)}
    for name, sides in json.loads(text)["runs"].items():
        own, peft = sides["hf_lora"], sides["peft"]
        hf_lora, probe, majority = (mean(run[what] for run in own.values()) for what in OWN)
        theirs = mean(run["accuracy"] for run in peft.values())
        time = mean(own[seed]["seconds"] / peft[seed]["seconds"] for seed in own)
        # Full fine-tuning stands in a file of its own.
        expected = [f"{value:.3f}" for value in (hf_lora, probe, theirs, majority)] + [f"{time:.2f}"]
        assert [*shown[name][:3], *shown[name][4:]] == expected, name


def write(path: Path, rows: int) -> None:
    write_rows(path, [(f"text {row}", "ab"[row % 2]) for row in range(rows)])


def test_the_sets_are_those_that_are_there(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for path in (
        "letters/train",
        "letters/test",
        "letters/validation",
        "ham/train",
        "ham/test",
        "half/train",
    ):
        write(data / f"{path}.csv", 4)
    (data / "README").write_text("not a folder")
    sets = quality_sets(data, tmp_path / "work")
    assert list(sets) == ["ham", "letters", "bbc"]
    assert sets["ham"].files() == {
        "train_file": str(data / "ham" / "train.csv"),
        "test_file": str(data / "ham" / "test.csv"),
    }
    assert sets["letters"].validation_file == str(data / "letters" / "validation.csv")
    assert list(quality_sets(None, tmp_path / "work")) == ["bbc"]
    for name in ("train", "test"):
        write(data / "bbc" / f"{name}.csv", 4)
    assert quality_sets(data, tmp_path / "work")["bbc"].train_file == str(data / "bbc" / "train.csv")


def test_bbc_news_is_divided_once_and_for_all_by_topic(tmp_path: Path) -> None:
    files = quality_sets(None, tmp_path)["bbc"].files()
    rows = {name: list(csv.DictReader(io.StringIO(Path(path).read_text()))) for name, path in files.items()}
    assert (len(rows["train_file"]), len(rows["test_file"])) == (1781, 444)
    again = quality_sets(None, tmp_path / "again")["bbc"].files()
    for name, path in files.items():
        assert Path(path).read_bytes() == Path(again[name]).read_bytes()
    topics = {name: Counter(row["label"] for row in of_file) for name, of_file in rows.items()}
    for topic, tested in topics["test_file"].items():
        assert tested == round(0.2 * (tested + topics["train_file"][topic])), topic
    texts = {name: {row["text"] for row in of_file} for name, of_file in rows.items()}
    # The data repeats itself here and there.
    assert len(texts["train_file"] & texts["test_file"]) < 40


def test_folds_divide_the_training_file_and_leave_the_others_alone(tmp_path: Path) -> None:
    for name, count in (("train", 10), ("test", 3)):
        write(tmp_path / f"{name}.csv", count)
    data_set = QualitySet(
        "words", str(tmp_path / "train.csv"), str(tmp_path / "test.csv"), str(tmp_path / "no.csv")
    )
    tested: list[tuple[str, str]] = []
    whole = {(f"text {row}", "ab"[row % 2]) for row in range(10)}
    for number in range(4):
        part = fold(data_set, number, tmp_path / "work")
        assert part.validation_file is None
        rows = {
            name: [(row["text"], row["label"]) for row in csv.DictReader(io.StringIO(Path(path).read_text()))]
            for name, path in part.files().items()
        }
        assert set(rows["train_file"]) | set(rows["test_file"]) == whole
        assert len(rows["train_file"]) + len(rows["test_file"]) == 10
        tested += rows["test_file"]
    assert sorted(tested) == sorted(whole)


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str, int]] = []

    def run(side: str, data_set: QualitySet, seed: int) -> dict[str, Any]:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append((data_set.name, side, seed))
        return own(0.9)

    monkeypatch.setattr(quality, "one_run", run)
    argv = ["quality.py", "--sets", "bbc", "--seeds", "2", "--sides", "hf_lora", "peft"]
    monkeypatch.setattr(sys, "argv", [*argv, "--json", str(tmp_path / "quality.json")])
    with pytest.raises(KeyboardInterrupt):
        quality.main()
    first, calls[:] = list(calls), []
    quality.main()
    assert first == [("bbc", "hf_lora", 1), ("bbc", "peft", 1), ("bbc", "hf_lora", 2)]
    assert calls == [("bbc", "peft", 2)]
    runs = json.loads((tmp_path / "quality.json").read_text())["runs"]["bbc"]
    assert {side: sorted(of_side) for side, of_side in runs.items()} == {
        "hf_lora": ["1", "2"],
        "peft": ["1", "2"],
    }


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A call of the script on `words` and BBC News with made runs, which returns the runs of the results file."""
    for name in ("train", "test"):
        write(tmp_path / "data" / "words" / f"{name}.csv", 4)

    def call(run: Callable[..., dict[str, float]], *flags: str) -> dict[str, Any]:
        monkeypatch.setattr(quality, "one_run", run)
        argv = ["quality.py", "--data", str(tmp_path / "data"), *flags]
        monkeypatch.setattr(sys, "argv", [*argv, "--json", str(tmp_path / "quality.json")])
        quality.main()
        runs: dict[str, Any] = json.loads((tmp_path / "quality.json").read_text())["runs"]["words"]
        return runs

    return call


def test_jobs_are_runs_at_the_same_time(made: Callable[..., dict[str, Any]]) -> None:
    both = threading.Barrier(2)

    def run(side: str, data_set: QualitySet, seed: int) -> dict[str, float]:
        both.wait(timeout=HANGS)  # Raises where the other run does not come.
        return own(seed / 10)

    runs = made(run, "--sets", "words", "--sides", "hf_lora", "--seeds", "4", "--jobs", "2")
    assert {seed: figures["accuracy"] for seed, figures in runs["hf_lora"].items()} == {
        "1": 0.1,
        "2": 0.2,
        "3": 0.3,
        "4": 0.4,
    }


def test_a_run_that_fails_ends_it_and_what_is_under_way_is_kept(
    made: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    failed, begun = threading.Event(), []

    def run(side: str, data_set: QualitySet, seed: int) -> dict[str, float]:
        begun.append(seed)
        if seed == 1:
            failed.set()
            raise RuntimeError("out of paper")
        assert failed.wait(timeout=HANGS)
        sleep(0.2)  # The other one's failure is noticed meanwhile.
        return own(0.5)

    with pytest.raises(RuntimeError, match="out of paper"):
        made(run, "--sets", "words", "--sides", "hf_lora", "--seeds", "9", "--jobs", "2")
    assert len(begun) < 9
    kept = json.loads((tmp_path / "quality.json").read_text())["runs"]["words"]["hf_lora"]
    assert sorted(kept) == [str(seed) for seed in sorted(begun) if seed != 1]


@pytest.mark.parametrize("flag", ["--threads", "--jobs"])
def test_runs_under_other_conditions_are_not_mixed(flag: str, made: Callable[..., dict[str, Any]]) -> None:
    made(lambda *_: own(0.5), "--sets", "words", "--sides", "hf_lora", "--seeds", "1")
    with pytest.raises(SystemExit, match=f"{flag[2:]}=.*got 2"):
        made(lambda *_: own(0.5), "--sets", "words", "--sides", "hf_lora", "--seeds", "2", flag, "2")


def test_runs_of_another_machine_are_shown_but_not_added_to(
    made: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    flags = ("--sets", "words", "--sides", "hf_lora", "--seeds")
    made(lambda *_: own(0.5), *flags, "1")
    path = tmp_path / "quality.json"
    result = json.loads(path.read_text())
    result["machine"] |= {"cpu": "abacus", "torch": "0.1"}
    path.write_text(json.dumps(result))
    made(lambda *_: pytest.fail("nothing is missing"), *flags, "1")
    assert json.loads(path.read_text()) == result
    with pytest.raises(SystemExit, match=r"made with cpu='abacus', torch='0\.1'; got cpu=.*another --json"):
        made(lambda *_: own(0.6), *flags, "2")
    assert json.loads(path.read_text()) == result


def test_no_job_at_all_is_refused(made: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(SystemExit, match="--jobs is not usable; got 0; expected at least 1"):
        made(lambda *_: own(0.5), "--sets", "words", "--jobs", "0")


def test_quick_takes_what_is_there_where_its_own_sets_are_not(made: Callable[..., dict[str, Any]]) -> None:
    calls: list[tuple[str, str, int]] = []

    def run(side: str, data_set: QualitySet, seed: int) -> dict[str, float]:
        calls.append((data_set.name, side, seed))
        return own(0.5)

    made(run, "--quick")
    assert calls == [(name, side, 1) for name in ("words", "bbc") for side in ("hf_lora", "peft")]
