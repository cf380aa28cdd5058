"""The bank's benchmark: its sides compute the same, and its tables and targets say what was measured."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bank
import bank_report
import bank_sides
import pytest
import torch
from conftest import tiny_tokenizer

from hf_lora import TextClassifier


def test_every_second_head_of_mixed_ones_is_native() -> None:
    assert [bank_sides.pooling_of(index, "mixed") for index in range(4)] == ["mean", "native"] * 2
    assert [bank_sides.pooling_of(index, "native") for index in range(2)] == ["native"] * 2
    assert [bank_sides.labels_of(index) for index in range(6)] == [2, 3, 4, 5, 6, 2]


def test_rows_are_drawn_from_all_adapters_and_those_of_one_stand_together() -> None:
    draws = [bank_sides.drawn(5, seed=seed) for seed in range(20)]
    assert all(len(rows) == 32 and rows == sorted(rows) for rows in draws)
    assert {row for rows in draws for row in rows} == set(range(5))
    assert draws[0] != draws[1] and draws[0] == bank_sides.drawn(5, seed=0)
    assert bank_sides.spread_evenly(4, 8) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_texts_have_the_tokens_that_they_should() -> None:
    tokenizer: Any = SimpleNamespace(
        get_vocab=lambda: {"[CLS]": 0, "##ing": 1, "film": 2, "of": 3, "bad,": 4}
    )
    assert bank_sides.texts_of(tokenizer, 5, 2) == ["film film film"] * 2
    real = tiny_tokenizer()
    texts = bank_sides.texts_of(real, 9, 3)
    assert [len(ids) for ids in real(texts)["input_ids"]] == [9, 9, 9] and len(set(texts)) == 3


@pytest.fixture
def inputs(tiny_bert_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Six sequences for a tiny encoder, which is the benchmark's here."""
    monkeypatch.setattr(bank_sides, "BASE", str(tiny_bert_dir))
    monkeypatch.setattr(bank_sides, "MAX_LENGTH", 32)
    ids = torch.randint(5, 30, (6, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_all_sides_compute_the_same(inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    places = bank_sides.write_adapters(tmp_path, 3, "native", labels=2)
    rows = [0, 0, 1, 2, 2, 2]
    shared = bank_sides.new_bank(places[0], "fp32")
    bank_sides.grow(shared, places, 3)
    alone = [TextClassifier.from_pretrained(place, precision="fp32") for place in places]
    expected = bank_sides.copies_side(alone, inputs, rows)()
    [found] = bank_sides.bank_side(shared, inputs, [rows])()
    plain = bank_sides.plain_side(bank_sides.plain_model("fp32", "native"), inputs)()
    for got in (found, bank_sides.peft_side(places, inputs, rows)()):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert plain.shape == expected.shape and (plain - expected).abs().max() > 1e-3
    texts = ["the film was good", "a bad day", "good", "bad", "the day", "a film"]
    answers = bank_sides.one_after_the_other(alone, texts, rows)()
    assert [answer["text"] for answer in answers] == texts
    assert [answer["scores"] for answer in answers] == [
        pytest.approx(answer["scores"], abs=1e-5)
        for answer in shared.predict(texts, [str(row) for row in rows])
    ]


def test_batches_of_mixed_heads_stand_by_head_and_take_turns(
    inputs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    places = bank_sides.write_adapters(tmp_path, 4, "mixed")
    shared = bank_sides.new_bank(places[0], "fp32")
    bank_sides.grow(shared, places, 4)
    assert [info.pooling for info in shared.adapters.values()] == ["mean", "native"] * 2
    run = bank_sides.bank_side(shared, inputs, [[0, 0, 1, 1, 2, 3], [1] * 6])
    # 0 and 2 have 2 and 4 labels; 1 and 3 have 3 and 5.
    assert [tuple(logits.shape) for logits in run()] == [(3, 4), (3, 5)]
    assert [tuple(logits.shape) for logits in run()] == [(6, 3)]
    assert len(bank_sides.fan_out_side(shared, "a good film")()) == 4


def test_acts_take_turns_and_have_ratios_to_every_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = {"cpu": 0.0, "wall": 0.0}

    def act(name: str, cpu: float) -> None:
        calls.append(name)
        clock["cpu"] += cpu
        clock["wall"] += 2 * cpu

    own = SimpleNamespace(process_time=lambda: clock["cpu"], perf_counter=lambda: clock["wall"])
    monkeypatch.setattr(bank, "time", own)
    found = bank.compared(
        {"short": partial(act, "short", 0.25), "long": partial(act, "long", 0.5)}, 3, "short", "long"
    )
    # Once before they are measured.
    assert calls == ["short", "long"] * 4
    assert found["ratios"] == {"short": {"short": 1.0, "long": 2.0}, "long": {"short": 0.5, "long": 1.0}}
    assert found["cpu_ms"] == {"short": spread(250.0), "long": spread(500.0)}
    assert found["seconds"] == {"short": spread(0.5), "long": spread(1.0)}


def passed(precision: str, adapters: int, tokens: int, ratio: float) -> dict[str, Any]:
    return {
        **{"precision": precision, "adapters": adapters, "tokens": tokens},
        "ratios": {"plain": {"plain": 1.0, "bank": ratio}},
    }


def spread(value: float, longest: float | None = None) -> dict[str, float]:
    return {"median": value, "min": value, "max": longest or value}


SIDES = ("TextClassifier, merged", "bank, one adapter", "bank, random adapters")
RESULT: dict[str, Any] = {
    "settings": {"sequences": 32},
    "passes": [passed("fp32", 1, 32, 1.0), passed("fp32", 1000, 16, 1.25), passed("fp32", 1000, 32, 1.08)],
    "peers": [
        {
            "adapters": 32,
            "ratios": {
                "plain": {"bank": 1.1, "peft": 1.5, "merged copies": 2.0},
                "peft": {"bank": 0.75},
            },
            "predict": {"ratios": {"bank": {"one TextClassifier after the other": 1.9}}},
            "differences": {"bank": 1e-7},
        }
    ],
    "predictions": [
        {
            **{"precision": "bf16", "adapters": 1000, "texts": 100},
            "seconds": {side: spread(2.0) for side in SIDES},
            "ratios": {SIDES[0]: dict(zip(SIDES, (1.0, 1.2, 1.3), strict=True))},
        }
    ],
    "memory": [
        {"precision": "fp32", "adapters": 1, "resident_mb": 500.0},
        {"precision": "fp32", "adapters": 1000, "resident_mb": 1300.0},
    ],
    "adding": [
        {
            **{"precision": "fp32", "adapters": 1000},
            "ms": {"alone": spread(12.0, 15.0), "beside batches": spread(20.0)},
            "batch_ms": {"alone": spread(200.0, 210.0), "beside adding": spread(220.0, 450.0)},
        }
    ],
    "fan_out": [
        {
            **{"blocks": blocks, "tokens": 32, "classifiers": 64},
            "logits": {"ratios": {"one": {"all": ratio}}},
            "answers": {"ratios": {"one": {"all": ratio + 1}}, "cpu_ms": {"all": spread(90.0)}},
        }
        for blocks, ratio in (("all six", 35.0), ("the top two", 12.6))
    ],
}
RESULT["targets"] = bank_report.targets(RESULT)


def test_targets_are_met_up_to_their_bound() -> None:
    assert [(row["got"], row["most"], row["met"]) for row in RESULT["targets"]] == [
        (1.25, 1.2, False),
        (1.08, 1.08, True),
        (0.75, 0.8, True),
        (1300.0, 1200, False),
        (1.2, 1.1, False),
        (12.6, 13.0, True),
        (12.0, 30, True),
        (450 / 200 - 1, 1, False),
    ]


def test_what_was_not_measured_has_no_target() -> None:
    fewer = {
        name: [row for row in RESULT[name] if row.get("adapters") != 1000]
        for name in RESULT
        if name != "settings"
    }
    few = {**fewer, "peers": [], "fan_out": [{**row, "classifiers": 8} for row in RESULT["fan_out"]]}
    assert bank_report.targets(few) == []


def test_tables_have_the_figures() -> None:
    result = {**RESULT, "passes": [passed("fp32", 1, 32, 1.0), passed("fp32", 1000, 32, 1.08)]}
    rows = {name: make(result).rows for name, make in bank_report.TABLES.items()}
    assert rows["passes"] == [("1", "1.00"), ("1,000", "1.08")]
    assert rows["peers"] == [("32", "1.10", "1.50", "2.00", "0.75", "1.90", "1e-07")]
    assert rows["predictions"] == [("bf16", "1,000", "50", "50", "50", "1.20", "1.30")]
    assert rows["memory"] == [("fp32", "500", "1,300")]
    assert rows["adding"] == [("fp32", "1,000", "12.0", "15.0", "20.0", "200", "210", "220", "450")]
    assert rows["fan_out"] == [
        ("all six", "32", "64", "35.0", "36.0", "90"),
        ("the top two", "32", "64", "12.6", "13.6", "90"),
    ]
    assert rows["targets"][3][1:] == ("1,300 MB", "1,200 MB", "no")
    assert rows["targets"][6][1:] == ("12 ms", "30 ms", "yes")
    for make in bank_report.TABLES.values():
        table = make(result)
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_a_quick_run_is_told_as_such() -> None:
    settings = dict.fromkeys(("model", "projections", "labels", "heads"), "x") | {
        "rounds": {"16": 11, "32": 9}
    }
    settings |= {"rank": 8, "sequences": 32, "threads": 1}
    machine = {"cpu": "a CPU", "cores": 2, "bf16_instructions": [], "torch": "2.13.0+cpu"}
    machine |= {"transformers": "5", "peft": "0"}
    quick, whole = (
        bank_report.told({"settings": {**settings, "quick": quick}, "machine": machine})
        for quick in (True, False)
    )
    assert quick == f"A quick run: the figures are rough. {whole}"
    assert "(11 at 16, 9 at 32 tokens)" in whole and "a CPU, 2 cores, no bf16; torch 2.13.0, " in whole


def test_the_published_results_have_the_targets_of_their_figures() -> None:
    place = Path(bank.__file__).parent / "results" / "bank.json"
    result = json.loads(place.read_text(encoding="utf-8"))
    assert result["targets"] == bank_report.targets(result)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    bank_report.plot(RESULT, str(tmp_path / "bank.png"))
    assert (tmp_path / "bank.png").read_bytes().startswith(b"\x89PNG")
