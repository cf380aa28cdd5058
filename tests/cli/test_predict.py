"""`hf-lora evaluate` and `predict`; the oracles are peft, plain transformers and scikit-learn."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from conftest import LABELS
from helpers_cli import head_on_base, read_texts, scored
from helpers_commands import FP32, Captured, call, mistake, run, table
from helpers_serving import PAIRS, TEXTS, peft_logits, plain_logits


def calibration_by_hand(logits: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The expected calibration error, in 15 bins of the larger probability."""
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    scores = exponentials / exponentials.sum(1, keepdims=True)
    number = np.clip(np.ceil(scores.max(1) * 15).astype(int), 1, 15)
    right = logits.argmax(1) == truth
    gaps = [abs(right[number == one].sum() - scores.max(1)[number == one].sum()) for one in range(1, 16)]
    return {"calibration_error": float(sum(gaps) / len(truth))}


@pytest.fixture
def expected(tiny_bert_dir: Path, adapter_dir: Path, tiny_csv: Path) -> dict[str, Any]:
    """What `evaluate` has to report, computed with peft, transformers and scikit-learn."""
    texts, names = read_texts(tiny_csv)
    truth = np.array([LABELS.index(name) for name in names])
    enabled = peft_logits(tiny_bert_dir, adapter_dir, texts).numpy()
    disabled = plain_logits(head_on_base(tiny_bert_dir, adapter_dir), texts).numpy()
    wrong = {
        name: [int(((logits.argmax(-1) != truth) & (truth == i)).sum()) for logits in (enabled, disabled)]
        for i, name in enumerate(LABELS)
    }
    return {
        "adapter": str(adapter_dir),
        "examples": 48,
        "truncated": 0,
        "metrics": pytest.approx(scored(enabled, truth) | calibration_by_hand(enabled, truth), abs=1e-6),
        "metrics_disabled": pytest.approx(
            scored(disabled, truth) | calibration_by_hand(disabled, truth), abs=1e-6
        ),
        "classes": {
            name: {
                "support": 24,
                "wrong": wrong[name][0],
                "wrong_disabled": wrong[name][1],
                "false_positives": int(((enabled.argmax(-1) == i) & (truth != i)).sum()),
            }
            for i, name in enumerate(LABELS)
        },
    }


def test_evaluate_reports_what_sklearn_computes(
    capsys: Captured, adapter_dir: Path, tiny_csv: Path, expected: dict[str, Any]
) -> None:
    out = run(capsys, "evaluate", "--adapter", adapter_dir, "--test_file", tiny_csv, *FP32, "--json")
    report = json.loads(out)
    assert report == expected
    # Otherwise the two columns could be exchanged without notice.
    assert report["metrics"] != report["metrics_disabled"]


def test_evaluate_prints_the_same_numbers_as_a_table(
    capsys: Captured, adapter_dir: Path, tiny_csv: Path
) -> None:
    command = ["evaluate", "--adapter", adapter_dir, "--test_file", tiny_csv]
    report = json.loads(run(capsys, *command, "--json"))
    out = run(capsys, *command)
    assert "48 examples" in out
    rows = table(out)
    for name, value in report["metrics"].items():
        assert rows[name] == [f"{value:.4f}", f"{report['metrics_disabled'][name]:.4f}"]
    for name, row in report["classes"].items():
        assert rows[name] == [str(row["support"]), str(row["wrong"]), str(row["wrong_disabled"])]


def test_evaluate_counts_truncated_and_takes_the_first_examples(
    capsys: Captured, adapter_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.jsonl"
    rows = [("good " * 40, "positive"), ("bad", "negative"), ("good " * 50, "positive"), ("sad", "negative")]
    path.write_text("".join(json.dumps({"body": b, "topic": t}) + "\n" for b, t in rows))
    columns = ["--text_column", "body", "--label_column", "topic"]
    command = ["evaluate", "--adapter", adapter_dir, "--test_file", path, *columns, "--json"]
    whole, part = (json.loads(run(capsys, *command, *more)) for more in ([], ["--max_test_samples", 2]))
    assert (whole["examples"], whole["truncated"]) == (4, 2)
    assert (part["examples"], part["truncated"]) == (2, 1)
    assert {name: row["support"] for name, row in part["classes"].items()} == {"negative": 1, "positive": 1}


def test_evaluate_refuses_labels_that_the_adapter_does_not_know(
    capsys: Captured, adapter_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.csv"
    path.write_text("text,label\ngood,positive\nso so,mixed\n")
    message = mistake(capsys, "evaluate", "--adapter", adapter_dir, "--test_file", path)
    assert [word for word in ("'mixed'", "'negative'", "'positive'", "row 2") if word not in message] == []


@pytest.fixture(scope="module")
def probabilities(tiny_bert_dir: Path, adapter_dir: Path) -> list[list[float]]:
    return peft_logits(tiny_bert_dir, adapter_dir, TEXTS).softmax(-1).tolist()


def check_predictions(lines: str, texts: list[Any], probabilities: list[list[float]]) -> None:
    results = [json.loads(line) for line in lines.splitlines()]
    assert [result["text"] for result in results] == texts
    for result, row in zip(results, probabilities, strict=True):
        assert list(result) == ["text", "label", "score", "scores"]
        assert [result["scores"][label] for label in LABELS] == pytest.approx(row, abs=1e-5)
        assert result["score"] == result["scores"][result["label"]] == max(result["scores"].values())


def test_predict_takes_texts(capsys: Captured, adapter_dir: Path, probabilities: list[list[float]]) -> None:
    check_predictions(run(capsys, "predict", *FP32, "--adapter", adapter_dir, *TEXTS), TEXTS, probabilities)


def test_predict_reads_standard_input(
    capsys: Captured,
    adapter_dir: Path,
    probabilities: list[list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TEXTS) + "\n"))
    check_predictions(run(capsys, "predict", *FP32, "--adapter", adapter_dir), TEXTS, probabilities)


@pytest.mark.parametrize(
    ("kind", "to_file"), [("csv", False), ("tsv", False), ("jsonl", False), ("txt", False), ("csv", True)]
)
def test_predict_reads_files(
    kind: str,
    to_file: bool,
    capsys: Captured,
    adapter_dir: Path,
    tmp_path: Path,
    probabilities: list[list[float]],
) -> None:
    path, output = tmp_path / f"in.{kind}", tmp_path / "out.jsonl"
    with path.open("w", encoding="utf-8", newline="") as stream:
        if kind == "jsonl":
            stream.writelines(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS)
        elif kind == "txt":
            stream.writelines(text + "\n" for text in TEXTS)
        else:
            writer = csv.writer(stream, delimiter="," if kind == "csv" else "\t")
            writer.writerows([["id", "text"], *([1, text] for text in TEXTS)])
    more = ["--output_file", output] if to_file else []
    out = run(
        capsys, "predict", *FP32, "--adapter", adapter_dir, "--input_file", path, "--batch_size", 2, *more
    )
    if to_file:
        assert out == ""
        out = output.read_text(encoding="utf-8")
    check_predictions(out, TEXTS, probabilities)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".parquet"])
def test_predict_writes_the_format_of_the_name(
    suffix: str, capsys: Captured, adapter_dir: Path, tmp_path: Path, probabilities: list[list[float]]
) -> None:
    output = tmp_path / f"out{suffix}"
    out = run(capsys, "predict", *FP32, "--adapter", adapter_dir, "--output_file", output, *TEXTS)
    read: dict[str, Callable[[Path], Any]] = {
        ".csv": lambda path: pandas.read_csv(path, keep_default_na=False),
        ".tsv": lambda path: pandas.read_csv(path, sep="\t", keep_default_na=False),
        ".json": lambda path: pandas.json_normalize(json.loads(path.read_text("utf-8"))),
        ".parquet": pandas.read_parquet,
    }
    table = read[suffix](output)
    assert out == "" and list(table["text"]) == TEXTS
    assert list(table.columns) == ["text", "label", "score", *(f"scores.{label}" for label in LABELS)]
    for label, column in zip(LABELS, zip(*probabilities, strict=True), strict=True):
        assert list(table[f"scores.{label}"]) == pytest.approx(column, abs=1e-5)


def test_an_unknown_ending_is_refused_before_anything_is_loaded(capsys: Captured, tmp_path: Path) -> None:
    message = mistake(
        capsys, "predict", "--adapter", "nowhere", "--output_file", tmp_path / "out.doc", "good"
    )
    assert "expected one of .jsonl, .json, .csv, .tsv, .parquet, .xlsx" in message


@pytest.fixture
def of_pairs(adapter_dir: Path, tmp_path: Path) -> Path:
    """The same adapter as one that was trained on the columns "one" and "two"."""
    adapter = Path(shutil.copytree(adapter_dir, tmp_path / "of_pairs"))
    values = json.loads((adapter / "hf_lora.json").read_text())
    (adapter / "hf_lora.json").write_text(json.dumps({**values, "text_columns": ["one", "two"]}))
    return adapter


@pytest.mark.parametrize("names", [["one", "two"], ["first", "second"]])
def test_predict_reads_pairs(
    names: list[str], capsys: Captured, tiny_bert_dir: Path, of_pairs: Path, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(dict(zip(names, pair, strict=True))) + "\n" for pair in PAIRS))
    columns = [] if names == ["one", "two"] else ["--text_column", names[0], "--text_pair_column", names[1]]
    out = run(capsys, "predict", *FP32, "--adapter", of_pairs, "--input_file", path, *columns)
    expected = peft_logits(tiny_bert_dir, of_pairs, PAIRS).softmax(-1).tolist()
    check_predictions(out, [list(pair) for pair in PAIRS], expected)


def test_two_texts_of_the_command_line_are_a_pair(
    capsys: Captured, tiny_bert_dir: Path, of_pairs: Path
) -> None:
    out = run(capsys, "predict", *FP32, "--adapter", of_pairs, *(text for pair in PAIRS for text in pair))
    expected = peft_logits(tiny_bert_dir, of_pairs, PAIRS).softmax(-1).tolist()
    check_predictions(out, [list(pair) for pair in PAIRS], expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["good"], r"trained on pairs (one, two); got 1 texts; expected two for each"),
        (["--input_file", "one.csv"], "has no column 'two'; its columns are 'one', 'label'"),
        (
            ["--input_file", "one.csv", "--text_column", "one"],
            "got one text, 'good'; expected a pair (one, two)",
        ),
        (["--test_file", "one.csv"], "has no column 'two'"),
        (
            ["--test_file", "one.csv", "--text_column", "one"],
            "got one text, 'good'; expected a pair (one, two)",
        ),
        (["--test_file", "one.csv", "--text_pair_column", "label"], "has no column 'label'"),
    ],
    ids=" ".join,
)
def test_half_a_pair_is_refused(
    given: list[str], words: str, capsys: Captured, of_pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(of_pairs.parent)
    Path("one.csv").write_text("one,label\ngood,positive\nbad,negative\n")
    command = "evaluate" if "--test_file" in given else "predict"
    assert words in mistake(capsys, command, "--adapter", of_pairs, *given)


def test_a_pair_is_refused_by_an_adapter_of_one_text(
    capsys: Captured, adapter_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("one,two\ngood,bad\n")
    columns = ["--text_column", "one", "--text_pair_column", "two"]
    message = mistake(capsys, "predict", "--adapter", adapter_dir, "--input_file", path, *columns)
    assert "got a pair, ('good', 'bad'); expected one text (text)" in message


def test_predict_writes_other_scripts_as_they_are(capsys: Captured, adapter_dir: Path) -> None:
    assert '"text": "schön 日本"' in run(capsys, "predict", *FP32, "--adapter", adapter_dir, "schön 日本")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_commands_tell_on_standard_error_how_the_model_runs(
    precision: str, capsys: Captured, adapter_dir: Path, tiny_csv: Path
) -> None:
    for command in (["predict", "good"], ["evaluate", "--test_file", tiny_csv, "--json"]):
        assert call(*command, "--adapter", adapter_dir, "--precision", precision) == 0
        captured = capsys.readouterr()
        line = f"precision: {precision} (as asked for); the adapter merged into the weights"
        assert line in captured.err.splitlines()
        assert "precision:" not in captured.out and json.loads(captured.out)


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
def test_evaluate_counts_what_predict_predicts(
    precision: str, capsys: Captured, adapter_dir: Path, tiny_csv: Path
) -> None:
    given = ["--adapter", adapter_dir, "--precision", precision]
    report = json.loads(run(capsys, "evaluate", *given, "--test_file", tiny_csv, "--json"))
    lines = run(capsys, "predict", *given, "--input_file", tiny_csv).splitlines()
    _, truth = read_texts(tiny_csv)
    right = [json.loads(line)["label"] == label for line, label in zip(lines, truth, strict=True)]
    assert report["metrics"]["accuracy"] == pytest.approx(sum(right) / len(right))
