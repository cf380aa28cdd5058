from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import sklearn.metrics
import torch
from conftest import LABELS, tiny_tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from hf_lora import TextClassifier
from hf_lora.adapters.info import AdapterInfo
from hf_lora.cli import main as cli
from hf_lora.serving.classifier import changed_labels
from tests.serving.test_classifier import PAIRS, TEXTS, make_adapter, peft_logits, plain_logits

Captured = pytest.CaptureFixture[str]
# What the commands are compared with computes in fp32, whatever this machine is good at.
FP32 = ("--precision", "fp32")


def run(capsys: Captured, *argv: object) -> str:
    """Standard output of a command that succeeds."""
    assert cli.main([str(part) for part in argv]) == 0
    return capsys.readouterr().out


def table(out: str) -> dict[str, list[str]]:
    """The rows of printed tables: the first cell, and those after it."""
    lines = [line for line in out.splitlines() if line.startswith("│")]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def read_texts(path: Path) -> tuple[list[str], list[str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [row["text"] for row in rows], [row["label"] for row in rows]


def head_on_base(base: Path, adapter: Path) -> torch.nn.Module:
    """Plain transformers: the pretrained encoder with the adapter's trained head and no LoRA."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).eval()
    tensors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    model.classifier.weight.data = tensors["base_model.model.classifier.weight"]
    model.classifier.bias.data = tensors["base_model.model.classifier.bias"]
    return model


def scored(logits: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The metrics of a single-label classification into two, from scikit-learn."""
    given = logits.argmax(-1)
    averaged = {"average": "macro", "zero_division": 0}
    return {
        "accuracy": float((given == truth).mean()),
        "f1_macro": sklearn.metrics.f1_score(truth, given, **averaged),
        "f1_weighted": sklearn.metrics.f1_score(truth, given, average="weighted", zero_division=0),
        "precision_macro": sklearn.metrics.precision_score(truth, given, **averaged),
        "recall_macro": sklearn.metrics.recall_score(truth, given, **averaged),
        "matthews_correlation": sklearn.metrics.matthews_corrcoef(truth, given),
        "roc_auc": sklearn.metrics.roc_auc_score(truth, logits[:, 1] - logits[:, 0]),
    }


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
    assert cli.main(["evaluate", "--adapter", str(adapter_dir), "--test_file", str(path)]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
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


def test_predict_reads_pairs(
    capsys: Captured, tiny_bert_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"one": a, "two": b}) + "\n" for a, b in PAIRS))
    columns = ["--text_column", "one", "--text_pair_column", "two"]
    out = run(capsys, "predict", *FP32, "--adapter", adapter_dir, "--input_file", path, *columns)
    expected = peft_logits(tiny_bert_dir, adapter_dir, PAIRS).softmax(-1).tolist()
    check_predictions(out, [list(pair) for pair in PAIRS], expected)


def test_predict_writes_other_scripts_as_they_are(capsys: Captured, adapter_dir: Path) -> None:
    assert '"text": "schön 日本"' in run(capsys, "predict", *FP32, "--adapter", adapter_dir, "schön 日本")


def test_merged_checkpoint_needs_transformers_alone(
    capsys: Captured, tiny_bert_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "deep" / "merged"
    report = json.loads(
        run(capsys, "merge", "--adapter", adapter_dir, "--output_dir", output, "--json", *TEXTS)
    )
    model, loading = AutoModelForSequenceClassification.from_pretrained(output, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.config.label2id == {"negative": 0, "positive": 1}
    expected = peft_logits(tiny_bert_dir, adapter_dir, TEXTS)
    torch.testing.assert_close(plain_logits(model.eval(), TEXTS), expected, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(output).get_vocab() == tiny_tokenizer().get_vocab()

    adapted = TextClassifier.from_pretrained(adapter_dir, merge=False, precision=None)
    merged = TextClassifier(model, adapted.tokenizer, adapted.info)
    difference = (merged.logits(TEXTS) - adapted.logits(TEXTS)).abs().max().item()
    assert report == {
        "output_dir": str(output),
        "merged_modules": 8,
        "texts": len(TEXTS),
        "largest_logit_difference": pytest.approx(difference, rel=1e-3, abs=0),
        "label_flips": 0,
    }
    assert difference < 1e-5


def test_merge_prints_the_same_as_a_table(
    capsys: Captured, adapter_dir: Path, tiny_csv: Path, tmp_path: Path
) -> None:
    command = ["merge", "--adapter", adapter_dir, "--input_file", tiny_csv]
    report = json.loads(run(capsys, *command, "--json", "--output_dir", tmp_path / "one"))
    assert report["texts"] == 48
    rows = table(run(capsys, *command, "--output_dir", tmp_path / "two"))
    assert rows["texts"] == ["48"] and rows["merged modules"] == ["8"] and rows["label flips"] == ["0"]
    assert rows["largest logit difference"] == [f"{report['largest_logit_difference']:.3g}"]


def test_merge_without_texts_says_that_nothing_was_compared(
    capsys: Captured, adapter_dir: Path, tmp_path: Path
) -> None:
    out = run(capsys, "merge", "--adapter", adapter_dir, "--output_dir", tmp_path / "merged")
    assert "no texts were given" in out and "difference" not in out
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_merge_leaves_an_existing_directory_alone(
    capsys: Captured, adapter_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    assert cli.main(["merge", "--adapter", str(adapter_dir), "--output_dir", str(tmp_path / "merged")]) == 2
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine.txt"]


def test_flips_are_labels_that_changed() -> None:
    before = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]])
    after = torch.tensor([[0.0, 1.0], [0.5, 1.0], [2.0, 1.0]])
    assert changed_labels(before, after, AdapterInfo(("a", "b"))) == 1
    # Rows 1 (both labels) and 3 (the second) cross zero; row 2 gains the first label.
    assert changed_labels(before, after, AdapterInfo(("a", "b"), "multi_label_classification")) == 3
    assert changed_labels(before[:, :1], after[:, :1], AdapterInfo(("a",), "regression")) == 0


def delta_norms(adapter: Path) -> dict[str, float]:
    """By module: the Frobenius norm of the dense scaling * B A, from the file's own tensors."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    norms = {}
    for key in tensors:
        if match := re.fullmatch(r"base_model\.model\.(.*)\.lora_A\.weight", key):
            delta = tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
            scaling = config["lora_alpha"] / config["r"]
            norms[match[1]] = torch.linalg.matrix_norm(scaling * delta).item()
    return norms


SUFFIXES = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}
MODULES = {
    role: [f"bert.encoder.layer.{layer}.attention.{suffix}" for layer in range(2)]
    for role, suffix in SUFFIXES.items()
}


def test_info_tells_what_the_files_hold(capsys: Captured, tiny_bert_dir: Path, adapter_dir: Path) -> None:
    report = json.loads(run(capsys, "info", "--adapter", adapter_dir, "--json"))
    sidecar = json.loads((adapter_dir / "hf_lora.json").read_text())
    assert report == {
        "directory": str(adapter_dir),
        "base_model": str(tiny_bert_dir),
        "base_revision": None,
        "fingerprint": sidecar["base_model"]["fingerprint"],
        "labels": ["negative", "positive"],
        "problem_type": "single_label_classification",
        "pooling": "native",
        "max_length": 32,
        "temperature": None,
        "thresholds": None,
        "rank": 4,
        "alpha": 8,
        "variant": "lora",
        "scaling": "standard",
        "projections": "qkvo",
        "target_modules": report["target_modules"],
        "modules": 8,
        # 2 blocks of 4 projections, each with A (4, 32) and B (32, 4).
        "lora_parameters": 2 * 4 * (4 * 32 + 32 * 4),
        "other_parameters": 2 * 32 + 2,
        "bytes": (adapter_dir / "adapter_model.safetensors").stat().st_size,
        "metrics": {},
        "delta_norms": pytest.approx(delta_norms(adapter_dir), rel=1e-6),
    }
    assert sorted(report["delta_norms"]) == sorted(name for names in MODULES.values() for name in names)
    assert min(report["delta_norms"].values()) > 0.1


def test_info_prints_a_table(capsys: Captured, tiny_bert_dir: Path, adapter_dir: Path) -> None:
    rows = table(run(capsys, "info", "--adapter", adapter_dir))
    assert rows["rank"] == ["4"] and rows["lora parameters"] == ["2,048"]
    assert rows["labels"] == ["negative, positive"] and rows["base model"] == [str(tiny_bert_dir)]
    for name, norm in delta_norms(adapter_dir).items():
        assert rows[name] == [f"{norm:.4f}"]


def test_info_of_a_bare_peft_adapter(capsys: Captured, adapter_dir: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter_dir / name).read_bytes())
    report = json.loads(run(capsys, "info", "--adapter", tmp_path, "--json"))
    assert report["labels"] is None and report["fingerprint"] is None
    assert report["delta_norms"] == pytest.approx(delta_norms(adapter_dir), rel=1e-6)


def test_info_needs_no_base_model(capsys: Captured, tiny_bert_dir: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_bert_dir_copy = {path.name: path.read_bytes() for path in tiny_bert_dir.iterdir()}
    base.mkdir()
    for name, data in tiny_bert_dir_copy.items():
        (base / name).write_bytes(data)
    adapter = make_adapter(base, tmp_path / "adapter", LABELS)
    for path in base.iterdir():
        path.unlink()
    report = json.loads(run(capsys, "info", "--adapter", adapter, "--json"))
    assert report["base_model"] == str(base)


def test_targets_names_the_modules_of_each_role(capsys: Captured, tiny_bert_dir: Path) -> None:
    command = ["targets", "--model_name_or_path", tiny_bert_dir, "--lora_rank", 3]
    base = sum(p.numel() for p in AutoModel.from_pretrained(tiny_bert_dir).parameters())
    head, lora = 2 * 32 + 2, 8 * 3 * (32 + 32)
    assert json.loads(run(capsys, *command, "--json")) == {
        "model_type": "bert",
        "roles": MODULES,
        "head": ["classifier"],
        "rank": 3,
        "lora_parameters": lora,
        "total_parameters": base + head + lora,
        "share": pytest.approx(lora / (base + head)),
    }
    out = run(capsys, *command)
    assert "1,536 parameters" in out and "head: classifier" in out
    assert f"({100 * lora / (base + head):.2f}% of the model)" in out
    assert [name for names in MODULES.values() for name in names if name not in out] == []


def test_targets_takes_some_roles(capsys: Captured, tiny_bert_dir: Path) -> None:
    command = ["targets", "--model_name_or_path", tiny_bert_dir, "--lora_projections", "ov", "--json"]
    report = json.loads(run(capsys, *command))
    assert report["roles"] == {"o": MODULES["o"], "v": MODULES["v"]}
    assert report["lora_parameters"] == 4 * 8 * (32 + 32)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_commands_tell_on_standard_error_how_the_model_runs(
    precision: str, capsys: Captured, adapter_dir: Path, tiny_csv: Path
) -> None:
    for command in (["predict", "good"], ["evaluate", "--test_file", tiny_csv, "--json"]):
        argv = [*command, "--adapter", adapter_dir, "--precision", precision]
        assert cli.main([str(part) for part in argv]) == 0
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


def test_merge_keeps_the_precision_of_the_base(capsys: Captured, tiny_bert_dir: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(tiny_bert_dir).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", LABELS)
    run(capsys, "merge", "--adapter", adapter, "--output_dir", tmp_path / "merged", "--json")
    tensors = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    kinds = {name.startswith("classifier."): tensor.dtype for name, tensor in tensors.items()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
