"""`hf-lora evaluate` and `predict`; the oracles are peft, plain transformers and scikit-learn."""

from __future__ import annotations

import csv
import importlib.util
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
from helpers_serving import PAIRS, TEXTS, make_adapter, peft_logits, plain_logits


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


MULTI = "multi_label_classification"
# Adapters of one base, by name: labels and other options.
SEVERAL: dict[str, tuple[list[str], dict[str, Any]]] = {
    "mood": (["sad", "glad", "mad"], {"problem_type": MULTI, "max_length": 6}),
    "news": (["negative", "positive"], {"max_length": 32}),
    "short": (["negative", "positive"], {"max_length": 5}),
    "stars": (["stars"], {"problem_type": "regression", "max_length": 32}),
    "turned": (["positive", "negative"], {"max_length": 32}),
}


@pytest.fixture(scope="module")
def several(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `SEVERAL`, a base model beside them, and something else."""
    folder = tmp_path_factory.mktemp("several")
    for name, (labels, options) in SEVERAL.items():
        make_adapter(tiny_bert_dir, folder / name, labels, text_columns=("text",), **options)
    (folder / "logs").mkdir()
    (folder / "notes.txt").touch()
    return folder


def lines(capsys: Captured, *argv: object) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(capsys, "predict", *FP32, *argv).splitlines()]


def check_answers(got: dict[str, Any], alone: dict[str, Any]) -> None:
    """Assert that an answer is that of the adapter alone."""
    assert list(got) == ["label", "score", "scores"]
    assert got["label"] == alone["label"]
    assert got["score"] == pytest.approx(alone["score"], abs=1e-5)
    assert got["scores"] == pytest.approx(alone["scores"], abs=1e-5)


WAYS: dict[str, tuple[list[str], list[str]]] = {
    "adapter": (["--adapter", "stars", "news"], ["stars", "news"]),
    "twice": (["--adapter", "stars", "--adapter", "news"], ["stars", "news"]),
    "named": (["--adapter", "news", "second=stars", "third=news"], ["news", "second", "third"]),
    "one named": (["--adapter", "second=stars"], ["second"]),
    "folder": (["--adapters_dir", "."], list(SEVERAL)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("source", ["words", "stdin", "file"])
def test_several_adapters_answer_as_each_of_them_alone(
    way: str, source: str, capsys: Captured, several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(several)
    given, names = WAYS[way]
    texts = [text for text in TEXTS if "/" not in text]
    places = {"second": "stars", "third": "news"}
    alone = {name: lines(capsys, "--adapter", places.get(name, name), "--", *texts) for name in names}
    more: list[Any] = ["--", *texts]
    if source == "stdin":
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(texts) + "\n"))
        more = []
    elif source == "file":
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        more = ["--input_file", path, "--batch_size", 3]
    got = lines(capsys, *given, *more)
    assert [answer["text"] for answer in got] == texts
    for row, answer in enumerate(got):
        assert list(answer) == ["text", "answers"] and list(answer["answers"]) == names
        for name, own in answer["answers"].items():
            check_answers(own, alone[name][row])


@pytest.mark.parametrize(
    ("given", "adapters", "texts"),
    [
        (["--adapter", "news", "good"], [], ["good"]),
        (["--adapter", "news", "a good day", "mood"], [], ["a good day", "mood"]),
        (["--adapter", "news", "--", "and/or", "mood"], [], ["and/or", "mood"]),
        (["and/or", "--adapter", "news"], [], ["and/or"]),
        (["--adapter", "news", "mood", "good", "mood"], ["news", "mood"], ["good", "mood"]),
        (["--adapter", "news", "good", "--adapter", "mood"], ["news", "mood"], ["good"]),
        (["first", "--adapter", "news", "mood", "second"], ["news", "mood"], ["first", "second"]),
        (["--adapters_dir", ".", "good", "mood"], list(SEVERAL), ["good", "mood"]),
    ],
)
def test_words_behind_an_adapter_are_adapters_or_texts(
    given: list[str],
    adapters: list[str],
    texts: list[str],
    capsys: Captured,
    several: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(several)
    got = lines(capsys, *given)
    assert [answer["text"] for answer in got] == texts
    assert [list(answer.get("answers", {})) for answer in got] == [adapters] * len(texts)


needs_openpyxl = pytest.mark.skipif(
    importlib.util.find_spec("openpyxl") is None,
    reason="openpyxl, which writes Excel files, is not installed",
)
TABLES: dict[str, Callable[[Path], pandas.DataFrame]] = {
    ".csv": lambda path: pandas.read_csv(path, keep_default_na=False),
    ".tsv": lambda path: pandas.read_csv(path, sep="\t", keep_default_na=False),
    ".parquet": pandas.read_parquet,
    ".xlsx": lambda path: pandas.read_excel(path, keep_default_na=False),
}


@pytest.mark.parametrize(
    "suffix", [pytest.param(s, marks=needs_openpyxl) if s == ".xlsx" else s for s in TABLES]
)
def test_a_table_has_the_columns_of_every_adapter(
    suffix: str, capsys: Captured, several: Path, tmp_path: Path
) -> None:
    texts, output = ["good", "a very bad day"], tmp_path / f"out{suffix}"
    argv = ["--adapters_dir", several, *texts]
    answers = lines(capsys, *argv)
    assert run(capsys, "predict", *FP32, *argv, "--output_file", output) == ""
    table = TABLES[suffix](output)
    expected = ["text"]
    for name, (labels, _) in SEVERAL.items():
        expected += [f"{name}.label", f"{name}.score", *(f"{name}.scores.{label}" for label in labels)]
    assert list(table.columns) == expected and list(table["text"]) == texts
    for name, (labels, _) in SEVERAL.items():
        own = [answer["answers"][name] for answer in answers]
        as_cells = json.loads if name == "mood" and suffix != ".parquet" else lambda cell: cell
        for column in ("label", "score"):
            cells = [as_cells(cell) for cell in table[f"{name}.{column}"]]
            cells = [list(cell) for cell in cells] if name == "mood" else cells
            expected = [answer[column] for answer in own]
            numbers = name != "mood" and column == "score"
            assert cells == (pytest.approx(expected, rel=1e-14) if numbers else expected)
        for label in labels:
            scores = [answer["scores"][label] for answer in own]
            # Numbers in Excel files have 16 digits.
            assert list(table[f"{name}.scores.{label}"]) == pytest.approx(scores, rel=1e-14)


def test_several_adapters_of_pairs_read_the_columns_of_the_first(
    capsys: Captured, tiny_bert_dir: Path, of_pairs: Path, tmp_path: Path
) -> None:
    labels = ["no", "yes", "perhaps"]
    other = make_adapter(tiny_bert_dir, tmp_path / "other", labels, max_length=32, text_columns=("a", "b"))
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps(dict(zip(("one", "two"), pair, strict=True))) + "\n" for pair in PAIRS)
    )
    got = lines(capsys, "--adapter", of_pairs, other, "--input_file", path)
    assert [answer["text"] for answer in got] == [list(pair) for pair in PAIRS]
    for name, adapter in {"of_pairs": of_pairs, "other": other}.items():
        for answer, row in zip(got, peft_logits(tiny_bert_dir, adapter, PAIRS).softmax(-1), strict=True):
            assert list(answer["answers"][name]["scores"].values()) == pytest.approx(row.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("predict good", "one of the arguments --adapter --adapters_dir is required"),
        ("predict good --adapter news --adapters_dir .", "--adapters_dir: not allowed with argument --adapter"),
        ("predict good --adapters_dir logs", "no adapter in 'logs'; got []"),
        ("predict good --adapters_dir nowhere", "no such folder; got 'nowhere'"),
        ("predict good --adapters_dir news", "'news' is an adapter itself"),
        ("predict good --adapters_dir . --revision v2", "expected the revision behind the Hub id, such as me/mood@v2"),
        ("predict good --adapter news mood --revision v2", "--revision is for a single adapter; got 'v2'"),
        ("predict good --adapter news ./news", "two adapters have the name 'news'; got 'news' and './news'"),
        ("predict --adapter news me/mood@v2", "no such adapter; got 'me/mood' at revision 'v2'"),
        ("predict good --adapter news@v2", "a directory has no revisions; got 'news@v2'"),
        ("predict good --adapter news mood@v2/", "a directory has no revisions; got 'mood@v2/'"),
        ("predict good --adapter me/mood@v2", "no such adapter; got 'me/mood' at revision 'v2'"),
        ("predict --adapter news and/or", "got 'and/or'"),
        ("predict --adapter news and/or", "if it is a text, put it in front of --adapter"),
        ("predict --adapter news good --input_file x.csv", "got 'good' and --input_file 'x.csv'"),
        ("predict --adapter news mood --input_file x.cvs", "x.cvs"),
        ("predict good --adapter news mood --output_file x.doc", "expected one of .jsonl, .json, .csv"),
        ("predict good --adapter news @pairs", "got 'news' for single texts and 'of_pairs' for pairs"),
        ("evaluate --adapter news mood --test_file @csv", "for the adapter 'mood': label 'negative'"),
        ("evaluate --adapter news stars --test_file no.csv", "no.csv does not exist"),
        ("evaluate --adapter news moood --test_file @csv", "no such adapter; got 'moood'"),
        ("evaluate --test_file @csv", "one of the arguments --adapter --adapters_dir is required"),
    ],
)  # fmt: skip
def test_several_adapters_that_cannot_be_used_are_told_in_one_line(
    line: str,
    words: str,
    capsys: Captured,
    several: Path,
    of_pairs: Path,
    tiny_csv: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(several)
    places = {"@pairs": of_pairs, "@csv": tiny_csv}
    assert call(*(places.get(word, word) for word in line.split())) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (message,) = captured.err.splitlines()
    assert message.startswith("hf-lora: ") and words in message


def test_adapters_of_pairs_beside_single_texts_are_refused_before_a_base_is_loaded(
    capsys: Captured, several: Path, of_pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("hf_lora.bank.loading.load_base")
    argv = ["--adapter", several / "news", of_pairs, "good"]
    assert "cannot answer the same texts" in mistake(capsys, "predict", *argv)


MEASURED = ("short", "news", "turned")


@pytest.fixture
def evaluated_alone(capsys: Captured, several: Path, tiny_csv: Path) -> list[dict[str, Any]]:
    """What `evaluate --json` says of `MEASURED`, one after the other: of another length, or order of the labels."""
    command = ["evaluate", "--test_file", tiny_csv, *FP32, "--json"]
    reports = [json.loads(run(capsys, *command, "--adapter", several / name)) for name in MEASURED]
    assert [report["truncated"] > 0 for report in reports] == [True, False, False]
    assert reports[1]["metrics"] != reports[2]["metrics"]
    return reports


@pytest.mark.parametrize("way", ["adapter", "folder"])
def test_evaluate_measures_several_adapters_as_each_of_them_alone(
    way: str,
    capsys: Captured,
    several: Path,
    tiny_csv: Path,
    tmp_path: Path,
    evaluated_alone: list[dict[str, Any]],
) -> None:
    given: list[Any] = ["--adapter", *(several / name for name in MEASURED)]
    names = list(MEASURED)
    if way == "folder":
        names = [f"{number} {name}" for number, name in enumerate(MEASURED)]
        for name in names:
            shutil.copytree(several / name[2:], tmp_path / "own" / name)
        given = ["--adapters_dir", tmp_path / "own"]
    got = json.loads(run(capsys, "evaluate", *given, "--test_file", tiny_csv, *FP32, "--json"))
    for name, report, alone in zip(names, got, evaluated_alone, strict=True):
        sides = {side: pytest.approx(alone[side], abs=1e-5) for side in ("metrics", "metrics_disabled")}
        assert report == {**alone, "adapter": name, **sides}


def test_evaluate_prints_a_row_for_each_of_several_adapters(
    capsys: Captured, several: Path, tiny_csv: Path, evaluated_alone: list[dict[str, Any]]
) -> None:
    given = ["--adapter", several / "short", "second=" + str(several / "news")]
    out = run(capsys, "evaluate", *given, "--test_file", tiny_csv, *FP32)
    found = table(out)
    for name, report in zip(("short", "second"), evaluated_alone, strict=False):
        sides = (report["metrics"], report["metrics_disabled"])
        numbers = [f"{side[metric]:.4f}" for metric in ("accuracy", "f1_macro") for side in sides]
        assert found[name] == ["48", *numbers]
    assert "in the output of --json" in out


def test_metrics_that_another_adapter_does_not_have_are_empty(
    capsys: Captured, several: Path, tmp_path: Path
) -> None:
    path = tmp_path / "numbers.csv"
    path.write_text(
        "text,stars,label\n" + "".join(f"good,{row / 2},positive\nbad,{row},negative\n" for row in range(4))
    )
    for name, column in (("news", "label"), ("stars", "stars")):
        values = json.loads((several / name / "hf_lora.json").read_text())
        adapter = Path(shutil.copytree(several / name, tmp_path / "two" / name))
        (adapter / "hf_lora.json").write_text(json.dumps({**values, "label_columns": [column]}))
    out = run(capsys, "evaluate", "--adapters_dir", tmp_path / "two", "--test_file", path, *FP32)
    found = table(out)
    assert [cell != "" for cell in found["news"]] == [True] * 5 + [False] * 4
    assert [cell != "" for cell in found["stars"]] == [True] + [False] * 4 + [True] * 4


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_the_setting_of_several_adapters_is_told_on_standard_error(
    command: str, capsys: Captured, several: Path, tiny_csv: Path
) -> None:
    given = ["good"] if command == "predict" else ["--test_file", tiny_csv, "--json"]
    assert call(command, *given, "--adapter", several / "news", several / "short", *FP32) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "precision: fp32 (as asked for); 2 adapters on one encoder"
    assert json.loads(captured.out)
