"""The settings benchmark without its runs: pairs by fold, repeats, the flags, going on where it stopped."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from statistics import stdev

import pytest
import settings
from data_sets import QualitySet
from settings import DEFAULTS, HEADER, SETTINGS, rows

from hf_lora.cli.train import parse_settings


def run(accuracy: float, loss: float = 0.5, seconds: float = 10.0) -> dict[str, float]:
    return {"accuracy": accuracy, "f1": accuracy / 2, "loss": loss, "seconds": seconds}


RESULT = {
    "runs": {
        "words": {
            DEFAULTS: {"0": run(0.90), "1": run(0.80)},
            "2 epochs": {"0": run(0.93, 0.4, 5.0), "1": run(0.81, 0.3, 6.0), "2": run(0.1)},
        },
        "topics": {DEFAULTS: {"0": run(0.70)}, "2 epochs": {"0": run(0.68)}, "rank 2": {}},
    }
}


def test_settings_are_compared_fold_by_fold() -> None:
    words, topics, together = rows(RESULT)
    error = stdev([3.0, 1.0]) / 2**0.5
    assert words == (
        "2 epochs",
        "words",
        "0.8700",
        "0.8500",
        f"+2.00 ± {error:.2f}",
        "0.4350",
        "0.4250",
        "0.3500",
        "0.5000",
        "0.55",
        "2",
        "2, 2",
    )
    assert len(words) == len(HEADER)
    assert topics[:5] == ("2 epochs", "topics", "0.6800", "0.7000", "-2.00")
    error = stdev([3.0, 1.0, -2.0]) / 3**0.5
    assert together[1] == "all" and together[4] == f"+0.67 ± {error:.2f}" and together[-2] == "3"


def test_the_runs_of_a_fold_are_one_figure() -> None:
    """Run 4 is another run on fold 0: a lucky run of the defaults does not count against every setting."""
    defaults = {"0": run(0.96), "1": run(0.80), "4": run(0.90), "8": run(0.90), "6": run(0.1)}
    (row,) = rows(
        {"runs": {"words": {DEFAULTS: defaults, "rank 2": {"0": run(0.93, seconds=23.0), "5": run(0.84)}}}}
    )
    error = stdev([1.0, 4.0]) / 2**0.5
    assert row[2:5] == ("0.8850", "0.8600", f"+2.50 ± {error:.2f}")
    assert row[-3:] == ("1.65", "2", "2, 4")


@pytest.mark.parametrize("flags", SETTINGS.values(), ids=list(SETTINGS))
def test_every_setting_is_flags_of_the_command_line(flags: str, tmp_path: Path) -> None:
    base = ["--model_name_or_path", "m", "--train_file", "t.csv", "--output_dir", str(tmp_path / "out")]
    given = {flag[2:] for flag in shlex.split(flags) if flag.startswith("--")}
    with_flags, without = (parse_settings([*base, *more]) for more in (shlex.split(flags), []))
    changed = {name for name, value in with_flags.items() if value != without[name]}
    assert given <= changed


Calls = list[tuple[str, int, tuple[str, ...]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Fold, seed and flags of the runs, none of which is made."""
    found: Calls = []

    def made(data_set: QualitySet, seed: int, flags: list[str]) -> dict[str, float]:
        found.append((Path(data_set.test_file).parent.name, seed, tuple(flags)))
        return run(0.9)

    monkeypatch.setattr(settings, "hf_lora_run", made)
    return found


def benchmark(monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["settings.py", "--sets", "bbc", *map(str, flags)])
    settings.main()


def test_few_examples_are_a_file_of_their_own(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--folds", 1, "--settings", "rank 2", "--json", tmp_path / "few.json", "--few_shot")
    benchmark(monkeypatch, *flags, 8)
    assert [call[-1] for call in calls] == [("--few_shot", "8"), ("--lora_rank", "2", "--few_shot", "8")]
    with pytest.raises(SystemExit, match="has runs with few_shot=8; got 32"):
        benchmark(monkeypatch, *flags, 32)


def test_another_encoder_is_a_file_of_its_own(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--folds", 1, "--settings", "rank 2", "--json", tmp_path / "other.json")
    benchmark(monkeypatch, *flags, "--model", "somebody/encoder")
    model = ("--model_name_or_path", "somebody/encoder")
    assert [call[-1] for call in calls] == [model, ("--lora_rank", "2", *model)]
    with pytest.raises(SystemExit, match="has runs with model=somebody/encoder; got None"):
        benchmark(monkeypatch, *flags)


def test_repeats_are_other_seeds_on_the_same_folds(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark(monkeypatch, "--folds", 2, "--repeats", 2, "--settings", DEFAULTS)
    assert calls == [("fold0", 1, ()), ("fold1", 2, ()), ("fold0", 5, ()), ("fold1", 6, ())]


def test_it_goes_on_where_it_was_stopped(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--folds", 2, "--settings", "rank 2", "--json", tmp_path / "settings.json")
    made = settings.hf_lora_run

    def stopped(*order: object) -> dict[str, float]:
        if len(calls) == 3:
            raise KeyboardInterrupt
        return made(*order)

    with monkeypatch.context() as patch:
        patch.setattr(settings, "hf_lora_run", stopped)
        with pytest.raises(KeyboardInterrupt):
            benchmark(patch, *flags)
    first, calls[:] = list(calls), []
    benchmark(monkeypatch, *flags)
    rank = ("--lora_rank", "2")
    assert first == [("fold0", 1, ()), ("fold1", 2, ()), ("fold0", 1, rank)]
    assert calls == [("fold1", 2, rank)]
    assert sorted(json.loads((tmp_path / "settings.json").read_text())["runs"]["bbc"]) == [DEFAULTS, "rank 2"]
