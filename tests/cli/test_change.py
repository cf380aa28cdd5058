"""`hf-lora resize`, `add` and `extract`: what they write is read by peft, what they print is computed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LABELS, tiny_tokenizer
from helpers_commands import Captured, call, mistake, run, table
from helpers_serving import TEXTS, make_adapter, peft_logits, plain_logits
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from hf_lora import TextClassifier
from hf_lora.adapters.arithmetic import combine, resize
from hf_lora.adapters.directory import TENSORS, read_adapter
from hf_lora.adapters.values import Adapter


def assert_loads(base: Path, directory: Path) -> torch.Tensor:
    """The adapter's logits, which hf_lora and peft must agree on."""
    logits = TextClassifier.from_pretrained(directory, precision="fp32").logits(TEXTS)
    given = read_adapter(directory).info
    assert given is not None
    assert_close(logits, peft_logits(base, directory, TEXTS, given.max_length or 64), rtol=1e-3, atol=1e-4)
    return logits


@pytest.fixture(scope="module")
def adapters(tiny_bert_dir: Path, adapter_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    other = make_adapter(tiny_bert_dir, tmp_path_factory.mktemp("other") / "other", LABELS, max_length=48)
    return [adapter_dir, other]


@pytest.fixture(scope="module")
def finetuned(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT with a head, every parameter moved."""
    torch.manual_seed(5)
    names = dict(enumerate(LABELS))
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert_dir, id2label=names).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    directory = tmp_path_factory.mktemp("finetuned")
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_resize_writes_the_smaller_adapter_and_tells_what_it_cost(
    tiny_bert_dir: Path, adapter_dir: Path, tmp_path: Path, capsys: Captured
):
    out = run(capsys, "resize", "--adapter", adapter_dir, "--rank", 2, "--output_dir", tmp_path / "two")
    _, cost = resize(Adapter.from_files(read_adapter(adapter_dir)), rank=2)
    rows = table(out)
    assert {name: rows[name] for name in cost} == {
        name: ["4", "2", f"{entry.kept_energy:.4f}", f"{entry.relative_error:.4f}"]
        for name, entry in cost.items()
    }
    assert "1,024 LoRA parameters, " in out and "before: 2,048 LoRA parameters" in out
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert names == {path.name for path in adapter_dir.iterdir()} - {"README.md"}
    assert_loads(tiny_bert_dir, tmp_path / "two")

    options = ["--energy", 1, "--json", "--output_dir", tmp_path / "one"]
    report = json.loads(run(capsys, "resize", "--adapter", adapter_dir, *options))
    assert report["bytes"] == (tmp_path / "one" / TENSORS).stat().st_size
    assert all(entry["kept_energy"] == 1.0 for entry in report["modules"].values())
    assert_close(
        assert_loads(tiny_bert_dir, tmp_path / "one"),
        TextClassifier.from_pretrained(adapter_dir, precision="fp32").logits(TEXTS),
        rtol=1e-4,
        atol=1e-5,
    )


def test_add_sums_updates_and_averages_heads(
    tiny_bert_dir: Path, adapters: list[Path], tmp_path: Path, capsys: Captured
):
    weights = ["--weights", 3, -1]
    out = run(capsys, "add", "--adapters", *adapters, *weights, "--output_dir", tmp_path / "sum")
    expected = combine([Adapter.from_files(read_adapter(path)) for path in adapters], [3.0, -1.0])
    written = Adapter.from_files(read_adapter(tmp_path / "sum"))
    assert torch.equal(written.whole["classifier.weight"], expected.whole["classifier.weight"])
    assert all(torch.equal(written.factors[name].B, entry.B) for name, entry in expected.factors.items())
    rows = table(out)
    assert rows[str(adapters[0])] == ["3.0000", "1.5000"] and rows[str(adapters[1])] == ["-1.0000", "-0.5000"]
    assert all(rows[name] == ["6"] for name in expected.factors)
    assert "head: the weighted mean of 2 heads" in out
    info = read_adapter(tmp_path / "sum").info
    assert info is not None and info.max_length == 48 and info.labels == LABELS
    assert_loads(tiny_bert_dir, tmp_path / "sum")


def test_an_average_can_be_cut(tiny_bert_dir: Path, adapters: list[Path], tmp_path: Path, capsys: Captured):
    options = ["--average", "--rank", 3, "--json", "--output_dir", tmp_path / "mean"]
    report = json.loads(run(capsys, "add", "--adapters", *adapters, *options))
    assert report["weights"] == report["whole_tensor_weights"] == [0.5, 0.5]
    assert {(m["old_rank"], m["new_rank"]) for m in report["modules"].values()} == {(6, 3)}
    assert read_adapter(tmp_path / "mean").peft_config["r"] == 3
    assert_loads(tiny_bert_dir, tmp_path / "mean")
    again = ["--average", "--energy", 0.5, "--output_dir", tmp_path / "half"]
    assert "their sum at a lower rank" in run(capsys, "add", "--adapters", *adapters, *again)


def test_extract_tells_what_it_covers_and_what_it_leaves_out(
    tiny_bert_dir: Path, finetuned: Path, tmp_path: Path, capsys: Captured
):
    models = ["extract", "--base", tiny_bert_dir, "--finetuned", finetuned]
    out = run(capsys, *models, "--energy", 0.9, "--output_dir", tmp_path / "nine")
    rows = table(out)
    files = read_adapter(tmp_path / "nine")
    for name, entry in Adapter.from_files(files).factors.items():
        assert rows[name][0] == str(entry.rank) and float(rows[name][1]) >= 0.9
    assert rows["bert.encoder.layer.*.attention.self.query.bias"][0] == "2"
    assert "LEFT OUT" in out and rows["bert.embeddings.word_embeddings.weight"][0] == "1"
    assert "bert.encoder.layer.*.output.dense.weight" not in rows
    assert files.info is not None and files.info.labels == LABELS
    assert files.info.base_model.name_or_path == str(tiny_bert_dir)
    assert_loads(tiny_bert_dir, tmp_path / "nine")

    options = ["--rank", 2, "--projections", "qv", "--no-keep_vectors", "--json"]
    report = json.loads(run(capsys, *models, *options, "--output_dir", tmp_path / "qv"))
    assert len(report["modules"]) == 4 and not report["carried"]
    assert "bert.encoder.layer.0.output.dense.weight" in report["left_out"]
    assert "bert.encoder.layer.0.output.LayerNorm.weight" in report["left_out"]
    assert 0 < report["kept_energy"] < 0.5
    assert_loads(tiny_bert_dir, tmp_path / "qv")
    out = run(capsys, *models, "--rank", 2, "--projections", "qv", "--output_dir", tmp_path / "more")
    assert "without --projections the other linear layers are extracted too" in out


def test_without_changed_embeddings_nothing_is_lost(
    tiny_bert_dir: Path, finetuned: Path, tmp_path: Path, capsys: Captured
):
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert_dir)
    model = AutoModelForSequenceClassification.from_pretrained(finetuned).eval()
    for name, parameter in model.named_parameters():
        if "_embeddings." in name:
            parameter.data.copy_(base.get_parameter(name))
    model.save_pretrained(tmp_path / "model")  # without a tokenizer: the base's is taken
    options = ["--energy", 1, "--all_linear", "--json", "--output_dir", tmp_path / "adapter"]
    models = ["--base", tiny_bert_dir, "--finetuned", tmp_path / "model"]
    report = json.loads(run(capsys, "extract", *models, *options))
    assert report["kept_energy"] == pytest.approx(1.0) and not report["left_out"]
    assert_close(
        assert_loads(tiny_bert_dir, tmp_path / "adapter"),
        plain_logits(model, TEXTS, 64),
        rtol=1e-3,
        atol=1e-3,
    )


def test_mistakes_are_told_and_nothing_is_written(
    tiny_bert_dir: Path, adapters: list[Path], finetuned: Path, tmp_path: Path, capsys: Captured
):
    other = make_adapter(tiny_bert_dir, tmp_path / "labels", ["x", "y"])
    new, models = ["--output_dir", tmp_path / "new"], ["extract", "--base", tiny_bert_dir, "--finetuned"]
    cases: dict[str, list[Any]] = {
        "output_dir exists": ["resize", "--adapter", adapters[0], "--rank", 1, "--output_dir", tmp_path],
        "rank is not usable": ["resize", "--adapter", adapters[0], "--rank", 0, *new],
        "energy is not a share": ["add", "--adapters", *adapters, "--energy", 2, *new],
        "one weight for each adapter": ["add", "--adapters", *adapters, "--weights", 1, *new],
        "different labels": ["add", "--adapters", adapters[0], other, *new],
        "sum to 0": ["add", "--adapters", *adapters, "--weights", 1, -1, *new],
        "no fine-tuned classifier": [*models, tiny_bert_dir, "--rank", 1, *new],
        "projections": [*models, finetuned, "--rank", 1, "--projections", "qx", *new],
    }
    for message, argv in cases.items():
        assert message in mistake(capsys, *argv)
    assert not (tmp_path / "new").exists()
    for argv in ([*models, finetuned, *new], [*models, finetuned, "--rank", 1, "--energy", 0.5, *new]):
        assert call(*argv) == 2
