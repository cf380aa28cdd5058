"""`hf-lora merge` and `export`; what `push` does is in tests/adapters/test_push.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import LABELS, randomize, tiny_tokenizer
from helpers_cli import read_texts
from helpers_commands import Captured, call, mistake, rows, run, table
from helpers_serving import TEXTS, make_adapter, peft_logits, plain_logits
from tiny_models import tiny_model
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from hf_lora import LoRAConfig, TextClassifier, load_classifier, save_adapter
from hf_lora.adapters.info import AdapterInfo
from hf_lora.serving import export
from hf_lora.serving.export import PROBES, Export
from hf_lora.serving.onnx import MODEL, MODEL_INT8, load_onnx


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
    assert call("merge", "--adapter", adapter_dir, "--output_dir", tmp_path / "merged") == 2
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine.txt"]


def test_merge_keeps_the_precision_of_the_base(capsys: Captured, tiny_bert_dir: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(tiny_bert_dir).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", LABELS)
    run(capsys, "merge", "--adapter", adapter, "--output_dir", tmp_path / "merged", "--json")
    tensors = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    kinds = {name.startswith("classifier."): tensor.dtype for name, tensor in tensors.items()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


@pytest.mark.slow
def test_the_command_measures_on_labelled_data(
    adapter_dir: Path, tiny_csv: Path, tmp_path: Path, capsys: Captured
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the packages of hf-lora[export] are not installed")
    output = tmp_path / "out"
    given = ("--adapter", adapter_dir, "--output_dir", output, "--test_file", tiny_csv, "--int8", "--json")
    report = json.loads(run(capsys, "export", *given))
    assert report["output_dir"] == str(output) and report["texts"] == 48
    assert report["inputs"] == ["input_ids", "attention_mask"]  # what its tokenizer gives
    texts, names = read_texts(tiny_csv)
    labels = np.array([LABELS.index(name) for name in names])
    classifiers = {
        "torch": TextClassifier.from_pretrained(adapter_dir, precision="fp32"),
        **{name: load_onnx(output, file=name) for name in (MODEL, MODEL_INT8)},
    }
    for name, classifier in classifiers.items():
        right = classifier.logits(texts).argmax(-1).numpy() == labels
        assert report["metrics"][name]["accuracy"] == pytest.approx(right.mean())
    for name in (MODEL, MODEL_INT8):
        assert report["files"][name]["bytes"] == (output / name).stat().st_size


def test_the_command_prints_differences_on_probes(
    adapter_dir: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = torch.zeros(len(PROBES), 2)
    compared = {
        MODEL: export.Compared(90_900_000, 2.1e-6, 5.4e-7, 0),
        MODEL_INT8: export.Compared(23_000_000, 0.31, 0.056, 1),
    }
    done = Export(tmp_path / "out", ("input_ids",), compared, {"torch": zeros})
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        export, "export_onnx", lambda classifier, output, **options: calls.append(options) or done
    )
    out = run(capsys, "export", "--adapter", adapter_dir, "--output_dir", tmp_path / "out", "--int8")
    assert calls == [{"int8": True, "texts": None}]
    assert rows(out) == [
        [MODEL, "90.9", "2.1e-06", "5.4e-07", "0"],
        [MODEL_INT8, "23.0", "0.31", "0.056", "1"],
    ]
    assert "on 13 probe texts" in out
    assert "inputs: input_ids\n" in out
    assert "pass --test_file" in out


def test_a_mistake_in_the_data_is_told_before_the_work(
    adapter_dir: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "export_onnx", None)
    given = ("--adapter", adapter_dir, "--output_dir", tmp_path / "out", "--test_file", "nothing.csv")
    assert "nothing.csv" in mistake(capsys, "export", *given)
    assert list(tmp_path.iterdir()) == []


def test_the_merged_format_is_a_plain_checkpoint(adapter_dir: Path, tmp_path: Path, capsys: Captured) -> None:
    output = tmp_path / "merged"
    given = ("--adapter", adapter_dir, "--output_dir", output, "--format", "safetensors-merged")
    report = json.loads(run(capsys, "export", *given, "--json"))
    assert report["texts"] == len(PROBES) and report["label_flips"] == 0
    model = AutoModelForSequenceClassification.from_pretrained(output).eval()
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    encoded = AutoTokenizer.from_pretrained(output)("the film was good", return_tensors="pt")
    with torch.no_grad():
        logits = model(**encoded).logits
    expected = TextClassifier.from_pretrained(adapter_dir, precision="fp32").logits(["the film was good"])
    assert_close(logits, expected, atol=1e-5, rtol=0)
    for flag in (["--int8"], ["--test_file", "x.csv"], ["--dataset_name", "x"]):
        other = (*given[:2], "--output_dir", tmp_path / "other", *given[4:], *flag)
        assert f"{flag[0]} does nothing in this format" in mistake(capsys, "export", *other)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_flips_are_labels_that_changed() -> None:
    before = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]])
    after = np.array([[0.0, 1.0], [0.5, 1.0], [2.0, 1.0]])
    # By several labels rows 1 (both labels) and 3 (the second) cross zero; row 2 gains the first label.
    problems = {"single_label_classification": 1, "multi_label_classification": 3, "regression": 0}
    for problem, expected in problems.items():
        info = AdapterInfo(("a", "b"), problem)
        assert info.task.changed(before, after, info.calibration) == expected


def test_a_classifier_of_pairs_is_merged_and_compared_on_pairs(
    capsys: Captured, adapter_dir: Path, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(adapter_dir, tmp_path / "of_pairs"))
    values = json.loads((adapter / "hf_lora.json").read_text())
    (adapter / "hf_lora.json").write_text(json.dumps({**values, "text_columns": ["one", "two"]}))
    given = ("--adapter", adapter, "--json", "--output_dir")
    report = json.loads(
        run(capsys, "export", "--format", "safetensors-merged", *given, tmp_path / "exported")
    )
    assert report["texts"] == len(PROBES)
    report = json.loads(run(capsys, "merge", *given, tmp_path / "merged", "good film", "bad film"))
    assert report["texts"] == 1


@pytest.fixture(scope="module")
def shared_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of a table of embeddings that encoder and decoder share."""
    directory = tmp_path_factory.mktemp("shared")
    tiny_model("t5", eos_token_id=3, pad_token_id=0, decoder_start_token_id=0).save_pretrained(
        directory / "base"
    )
    tiny_tokenizer().save_pretrained(directory / "base")
    config = LoRAConfig(rank=2, target_modules=["encoder.embed_tokens", "q", "v"])
    model, tokenizer = load_classifier(str(directory / "base"), LABELS, config)
    randomize(model)
    return save_adapter(model, directory / "adapter", tokenizer=tokenizer)


@pytest.mark.parametrize("precision", ["fp32", "bf16", None])
def test_a_classifier_whose_weights_are_shared_stays_unmerged(shared_adapter: Path, precision: Any) -> None:
    merged = TextClassifier.from_pretrained(shared_adapter, precision=precision)
    beside = TextClassifier.from_pretrained(shared_adapter, precision=precision, merge=False)
    assert not merged.merged and "the adapter beside the weights" in merged.setting
    texts = [text for text in TEXTS if text]
    assert torch.equal(merged.logits(texts), beside.logits(texts))


@pytest.mark.parametrize(
    "command",
    [("merge",), ("export", "--format", "safetensors-merged"), ("export", "--format", "onnx")],
    ids=" ".join,
)
def test_commands_that_merge_refuse_shared_weights_in_one_line(
    capsys: Captured, shared_adapter: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    if "onnx" in command:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason="the packages of hf-lora[export] are not installed")
    output = tmp_path / "out"
    said = mistake(capsys, *command, "--adapter", shared_adapter, "--output_dir", output)
    assert "cannot merge 'transformer.encoder.embed_tokens.weight', whose weight is" in said
    assert not output.exists()
