"""The generated parts of the site: options, tables of results; and the bounds of README and CONTRIBUTING."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import generated
import pytest
import tables

from hf_lora.recipe.options import option_names

ROOT = Path(__file__).parents[2]
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")}


def test_every_marker_is_known_and_every_generator_is_used() -> None:
    used = {name for text in PAGES.values() for name in generated.MARKER.findall(text)}
    assert used == set(generated.GENERATORS) - {"summary"}


def test_the_readme_has_the_table_of_the_results() -> None:
    assert "\n".join(tables.summary()) in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "most"), [("README.md", 150), ("CONTRIBUTING.md", 100)])
def test_the_first_pages_stay_short(name: str, most: int) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= most


def test_every_option_of_ours_is_listed_once_and_known() -> None:
    listed = re.findall(r"\{option\} --(\w+) <", "\n".join(generated.options()))
    assert len(listed) == len(set(listed)) and set(listed) <= option_names() | {"quiet", "dry_run"}
    assert {"lora_rank", "train_file", "refit", "learning_rate", "head_learning_rate", "seed"} <= set(listed)


RUNS: dict[str, Any] = {
    "runs": {
        "set": {
            "hf_lora": {
                "1": {
                    "accuracy": 0.9,
                    "probe": 0.7,
                    "majority": 0.5,
                    "seconds": 10.0,
                    "share_trained": 0.01,
                    "calibration_error": 0.1,
                    "calibration_error_uncalibrated": 0.2,
                },
                "2": {
                    "accuracy": 0.8,
                    "probe": 0.7,
                    "majority": 0.5,
                    "seconds": 30.0,
                    "share_trained": 0.01,
                    "calibration_error": 0.3,
                    "calibration_error_uncalibrated": 0.4,
                },
            },
            "peft": {"1": {"accuracy": 0.6, "seconds": 40.0}, "2": {"accuracy": 0.7, "seconds": 60.0}},
        }
    },
    "accuracy": {"set": {"mean": 0.75, "least": 0.7, "greatest": 0.8}},
}


def test_tables_are_the_means_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "results", lambda name: RUNS)
    rows = {name: list(tables.TABLES[name]())[2] for name in ("summary", "quality", "cost")}
    # The ratio is the mean of 10 / 40 and 30 / 60.
    assert rows["summary"] == "| set | 0.850 | 0.700 | 0.650 | 0.750 | 0.500 | 0.38 |"
    cells = ["0.8500", "0.8000 - 0.9000"], ["0.7000", "0.7000 - 0.7000"], ["0.6500", "0.6000 - 0.7000"]
    shown = [f"{middle}<br><small>{ends}</small>" for middle, ends in (*cells, ["0.7500", "0.7000 - 0.8000"])]
    assert rows["quality"] == f"| set | {' | '.join(shown)} | 0.5000 |"
    assert rows["cost"] == "| set | 20 s | 50 s | 0.38 | 1.00% | 0.3000 | 0.2000 |"


def test_docstrings_get_lists() -> None:
    lines = [
        "One line.",
        "",
        "rank: r,",
        "    at least 1. alpha: more.",
        "b, c: more,",
        "on another line. d: more.",
        "Raises ValueError: no item.",
    ]
    assert generated.with_lists(lines) == [
        "One line.",
        "",
        "",
        "* ``rank``: r, at least 1.",
        "* ``alpha``: more.",
        "",
        "* ``b``, ``c``: more, on another line.",
        "* ``d``: more.",
        "",
        "Raises ValueError: no item.",
    ]


def test_model_types_with_the_same_modules_share_a_row() -> None:
    rows = list(generated.models())
    (bert,) = [row for row in rows if "`bert`" in row]
    assert "`roberta`" in bert and bert.count("`attention.self.query`") == 1
    named = [name for row in rows[2:] for name in row.split("|")[1].split()]
    assert sorted(name.strip("`") for name in named) == sorted(generated.ARCHITECTURES)
