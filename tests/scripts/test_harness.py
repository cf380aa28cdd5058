from __future__ import annotations

import argparse
import getpass
import json
import platform
import sys
from pathlib import Path

import harness
import inference
import load
import pytest
import torch
from conftest import tiny_classifier
from harness import (
    add_output_arguments,
    in_process,
    machine,
    paired,
    peak_mb,
    report,
    reset_peak,
    resident_mb,
    summary,
    write_json,
)

from hf_lora import LoRAConfig, TextClassifier, inject_lora, lora_disabled
from hf_lora.lora.inject import is_injected

SCRIPTS = Path(harness.__file__).parent
Captured = pytest.CaptureFixture[str]


def parse(*argv: str, plot: bool = True) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_output_arguments(parser, plot=plot)
    return parser.parse_args(argv)


def test_outputs_are_optional_and_plots_only_where_something_is_drawn() -> None:
    assert vars(parse()) == {"json": None, "plot": None}
    assert vars(parse("--json", "a.json", "--plot", "a.png")) == {"json": "a.json", "plot": "a.png"}
    assert vars(parse("--json", "-", plot=False)) == {"json": "-"}
    with pytest.raises(SystemExit):
        parse("--plot", "a.png", plot=False)


def test_sides_take_turns() -> None:
    calls: list[str] = []

    def side(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    figures = paired({"a": lambda: side("a"), "b": lambda: side("b")}, 3)
    assert calls == ["a", "b"] * 3
    assert figures == {"a": [1, 3, 5], "b": [2, 4, 6]}
    with pytest.raises(ValueError, match="rounds is not usable; got 0; expected at least 1"):
        paired({"a": lambda: 1.0}, 0)


def test_the_ratio_is_the_median_of_the_pairs_and_not_the_ratio_of_the_medians() -> None:
    figures = {"ours": [1.0, 6.0, 2.0], "theirs": [2.0, 3.0, 8.0]}
    assert summary(figures) == {
        "ours": {"median": 2.0, "min": 1.0, "max": 6.0},
        "theirs": {"median": 3.0, "min": 2.0, "max": 8.0},
    }
    # Pair by pair: 1/2, 6/3, 2/8.
    ratios = {name: row["ratio"] for name, row in summary(figures, reference="theirs").items()}
    assert ratios == {"ours": 0.5, "theirs": 1.0}


@pytest.mark.parametrize("figures", [{"a": [1.0], "b": [1.0, 2.0]}, {"a": [], "b": []}, {}])
def test_figures_that_are_no_pairs_are_refused(figures: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match="the rounds are not paired; got"):
        summary(figures, reference="a")


def test_json_goes_to_a_file_or_to_standard_output_or_nowhere(capsys: Captured, tmp_path: Path) -> None:
    result = {"cpu": "Intel® Xeon", "ratio": [0.5]}
    write_json(None, result)
    write_json(str(tmp_path / "a.json"), result)
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == result
    write_json("-", result)
    assert json.loads(capsys.readouterr().out) == result


@pytest.mark.parametrize("argv", [[], ["--json", "a.json"], ["--json", "-"]])
def test_tables_leave_standard_output_to_the_json(argv: list[str], capsys: Captured) -> None:
    report(parse(*argv))("seconds", ("side", "median"), [("peft", 1.5)])
    captured = capsys.readouterr()
    table, other = (captured.err, captured.out) if "-" in argv else (captured.out, captured.err)
    assert "seconds" in table and "1.5000" in table and other == ""


def test_the_machine_is_described_without_names() -> None:
    found = machine()
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    capabilities = torch.cpu.get_capabilities()
    assert ("avx512_bf16" in found["bf16_instructions"]) is bool(capabilities.get("avx512_bf16"))
    assert found["cpu"] and found["cores"] >= 1
    text = json.dumps(found)
    private = (platform.node(), str(Path.home()), str(Path.cwd()), getpass.getuser())
    assert [name for name in private if len(name) > 3 and name in text] == []


def test_a_process_returns_the_json_of_its_last_line() -> None:
    code = "import json, os; print('loading'); print(json.dumps({'threads': os.environ['SIDE_THREADS']}))"
    assert in_process([sys.executable, "-c", code], SIDE_THREADS="3") == {"threads": "3"}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise SystemExit('no such adapter')", ["exit code 1", "no such adapter"]),
        ("print(1); raise SystemExit(3)", ["exit code 3"]),
        ("print('done')", ["exit code 0", "done", "expected JSON"]),
        ("pass", ["exit code 0", "expected JSON"]),
    ],
)
def test_a_process_without_a_result_is_an_error_in_one_line(code: str, words: list[str]) -> None:
    with pytest.raises(RuntimeError) as error:
        in_process([sys.executable, "-c", code])
    assert [word for word in words if word not in str(error.value)] == []
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the memory is read from /proc")
def test_the_peak_is_that_of_the_process_alone_since_it_was_reset() -> None:
    """In a new process: this one may give out again what it kept of memory that was freed."""
    block = bytearray(b"x") * 300_000_000
    code = (
        f"import json, sys; sys.path.insert(0, {str(SCRIPTS)!r}); import harness as b; alone = b.peak_mb()\n"
        "block = bytearray(b'x') * 200_000_000; del block; high = b.peak_mb(); b.reset_peak(); low = b.peak_mb()\n"
        "block = bytearray(b'x') * 100_000_000; del block; print(json.dumps([alone, high, low, b.peak_mb()]))"
    )
    alone, high, low, after = in_process([sys.executable, "-c", code])
    assert peak_mb() >= resident_mb() > 280 and len(block) == 300_000_000
    assert high > alone + 180  # the 300 MB of the process that started it do not count
    assert low < high - 150 and low + 80 < after < high - 50


def test_without_proc_the_peak_is_what_the_system_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **options: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(harness.Path, "read_text", missing)
    monkeypatch.setattr(harness.Path, "write_text", missing)
    reset_peak()
    assert peak_mb() > 0


@pytest.mark.slow
def test_the_inference_benchmark_compares_what_predicts_the_same(adapter_dir: Path) -> None:
    figures = inference.speed(str(adapter_dir), ["the film was good", "a bad day", "good"], 2)
    onnx = ["onnxruntime", "onnxruntime, int8"]
    assert list(figures) == ["hf_lora", "hf_lora, fp32", "pipeline, merged", "pipeline, peft", *onnx]
    assert figures["pipeline, merged"]["ratio"] == 1
    assert all(row["same_label"] == 1 and row["median"] > 0 for row in figures.values())
    differences = {name: row["largest_score_difference"] for name, row in figures.items()}
    assert max(differences[side] for side in ("hf_lora, fp32", "pipeline, peft", "onnxruntime")) < 1e-5
    assert max(differences["hf_lora"], differences["onnxruntime, int8"]) < 0.05


@pytest.mark.slow
def test_the_made_adapter_tells_topics_and_has_an_effect(minilm: str, tmp_path: Path) -> None:
    directory = inference.make_adapter(tmp_path)
    classifier = TextClassifier.from_pretrained(directory, precision="fp32")
    seen = inference.bbc_sentences(500)
    rows = [row for row in inference.bbc_sentences(170) if row not in seen]
    assert len(rows) > 100
    texts = [text for text, _ in rows]
    results = classifier.predict(texts)
    right = sum(result["label"] == topic for result, (_, topic) in zip(results, rows, strict=True))
    assert right > 0.6 * len(rows)
    before = classifier.logits(texts)
    with lora_disabled(classifier.model):
        assert (classifier.logits(texts) - before).abs().max() > 0.1


@pytest.mark.slow
def test_the_loading_benchmark_loads_into_a_fresh_model_every_time(tmp_path: Path) -> None:
    base = tiny_classifier(num_labels=2)
    model = tiny_classifier(num_labels=2)
    inject_lora(model, LoRAConfig(rank=load.RANK))
    figures = load.onto_a_model(base, load.random_adapter(model, tmp_path / "a"), 2)
    for what in ("load", "inject"):
        assert figures[what]["peft"]["ratio"] == 1 and figures[what]["hf_lora"]["ratio"] > 0
    assert not is_injected(base) and not hasattr(base, "peft_config")
