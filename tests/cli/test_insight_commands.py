"""`hf-lora inspect` and `report` from the command line; the oracle is the dense SVD of numpy on the files."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LABELS, randomize, tiny_tokenizer
from peft import LoraConfig, TaskType, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, confusion_matrix
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from hf_lora import LoRAConfig, load_classifier, save_adapter
from hf_lora.adapters.directory import read_adapter
from hf_lora.cli import insight_commands
from hf_lora.cli.insight_arguments import MODULE, add_insight_commands
from hf_lora.insight.inspect import compare, grid_of, role_of, updates_of
from tests.serving.test_classifier import make_adapter, peft_logits

Captured = pytest.CaptureFixture[str]
PREFIX = "base_model.model."
VALUE = "bert.encoder.layer.1.attention.self.value"


def parse(*argv: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_insight_commands(parser.add_subparsers(dest="command", required=True))
    return parser.parse_args([str(part) for part in argv])


def run(capsys: Captured, *argv: object) -> str:
    """Standard output of a command that succeeds."""
    options = parse(*argv)
    assert options.module == MODULE == insight_commands.__name__
    assert getattr(insight_commands, options.command)(options) == 0
    return capsys.readouterr().out


def inspected(capsys: Captured, *argv: object) -> dict[str, Any]:
    return json.loads(run(capsys, "inspect", "--json", "--adapter", *argv))


def factors(adapter: Path, module: str) -> tuple[np.ndarray, np.ndarray]:
    tensors = load_file(adapter / "adapter_model.safetensors")
    return tuple(tensors[f"{PREFIX}{module}.lora_{which}.weight"].double().numpy() for which in "AB")


def cells(out: str, title: str) -> dict[tuple[str, str], list[str]]:
    """The rows of the printed table that starts with a title, by their first two cells."""
    lines = out[out.index(title) :].split("└")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    return {(row[0], row[1]): row[2:] for row in rows}


@pytest.fixture(scope="module")
def other_dir(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_bert_dir, tmp_path_factory.mktemp("other") / "other", LABELS)


def test_inspect_is_the_dense_svd(capsys: Captured, adapter_dir: Path, tiny_bert_dir: Path):
    found = inspected(capsys, adapter_dir)
    assert [(m["layer"], m["role"]) for m in found["modules"]] == [(n, r) for n in (0, 1) for r in "qkvo"]
    assert found["notes"] == []
    base = AutoModel.from_pretrained(tiny_bert_dir)
    for module in found["modules"]:
        A, B = factors(adapter_dir, module["module"])
        delta = 2.0 * B @ A  # alpha 8, rank 4
        W = base.get_parameter(module["module"].removeprefix("bert.") + ".weight").detach().double().numpy()
        U, S, Vh = np.linalg.svd(delta)
        np.testing.assert_allclose(module["singular_values"], S[:4], rtol=1e-9)
        assert module["norm"] == pytest.approx(np.linalg.norm(delta))
        assert module["shape"] == [32, 32] and module["rank"] == 4
        np.testing.assert_allclose(module["energy"], np.cumsum(S[:4] ** 2) / (S**2).sum())
        inside = np.linalg.norm(U[:, :4].T @ W @ Vh[:4].T)
        assert module["amplification"]["factor"] == pytest.approx(np.linalg.norm(delta) / inside)
        assert module["amplification"]["relative_norm"] == pytest.approx(
            np.linalg.norm(delta) / np.linalg.norm(W)
        )
        assert module["amplification"]["directions"] == 4
    query = [module for module in found["modules"] if module["role"] == "q"]
    summary = found["by_role"][0]
    assert summary["name"] == "query" and summary["count"] == 2
    assert summary["norm"] == pytest.approx(np.hypot(*(module["norm"] for module in query)))
    assert summary["factor"] == pytest.approx(np.mean([m["amplification"]["factor"] for m in query]))
    assert summary["effective_rank"] == pytest.approx(np.mean([m["effective_rank"] for m in query]))
    assert [entry["name"] for entry in found["by_layer"]] == ["0", "1"]


def test_inspect_prints_tables(capsys: Captured, adapter_dir: Path, other_dir: Path):
    found = inspected(capsys, adapter_dir, "--directions", 2, "--other", other_dir)
    out = run(capsys, "inspect", "--adapter", adapter_dir, "--directions", 2, "--other", other_dir)
    value = next(module for module in found["modules"] if module["module"] == VALUE)
    amplified = value["amplification"]
    assert cells(out, ": updates")["1", "value"] == [
        "4",
        *(f"{value[name]:.4f}" for name in ("norm", "effective_rank", "stable_rank")),
        *(f"{amplified[name]:.4f}" for name in ("relative_norm", "factor")),
    ]
    names = ("update", "weight", "in_update", "in_weight", "in_random")
    assert cells(out, "amplification:")["1", "value"] == ["2", *(f"{amplified[name]:.4f}" for name in names)]
    assert cells(out, "energy kept")["1", "value"][:2] == [f"{share:.4f}" for share in value["energy"][:2]]
    assert cells(out, "by layer")["1", "4"][0] == f"{found['by_layer'][1]['norm']:.4f}"
    similarity = next(entry for entry in found["similarity"] if entry["module"] == VALUE)
    numbers = [similarity[side][name] for side in "AB" for name in ("first", "all", "all_random")]
    assert cells(out, "subspaces shared")["1", "value"] == [f"{number:.4f}" for number in numbers]


@pytest.mark.parametrize("of", ["factors", "update"])
def test_similarity_of_two_adapters_is_that_of_dense_svds(
    capsys: Captured, adapter_dir: Path, other_dir: Path, of: str
):
    found = inspected(capsys, adapter_dir, "--other", other_dir, "--directions_of", of)["similarity"]
    assert len(found) == 8
    for entry in found:
        pairs = [factors(path, entry["module"]) for path in (adapter_dir, other_dir)]
        if of == "factors":
            right = [np.linalg.svd(A)[2].T for A, _ in pairs]
            left = [np.linalg.svd(B)[0] for _, B in pairs]
        else:
            right = [np.linalg.svd(B @ A)[2].T for A, B in pairs]
            left = [np.linalg.svd(B @ A)[0] for A, B in pairs]
        for side, (first, second) in (("A", right), ("B", left)):
            expected = [
                [np.linalg.norm(first[:, :i].T @ second[:, :j]) ** 2 / min(i, j) for j in (1, 2)]
                for i in (1, 2, 3, 4)
            ]
            np.testing.assert_allclose(entry[side]["phi"], expected, rtol=1e-6)
            assert entry[side]["all"] == pytest.approx(expected[1][1]) and entry[side]["all_random"] == 2 / 32


def test_without_the_base_model_the_rest_is_told(capsys: Captured, adapter_dir: Path, tmp_path: Path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in adapter_dir.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    sidecar = json.loads((moved / "hf_lora.json").read_text())
    sidecar["base_model"]["name_or_path"] = str(tmp_path / "gone")
    (moved / "hf_lora.json").write_text(json.dumps(sidecar))
    found = inspected(capsys, moved)
    assert all(module["amplification"] is None for module in found["modules"])
    assert found["modules"][0]["norm"] == inspected(capsys, adapter_dir)["modules"][0]["norm"]
    out = run(capsys, "inspect", "--adapter", moved)
    assert "note: amplification and norms relative to W are left out" in out and "norm / W" not in out
    with pytest.raises((ValueError, OSError)):
        run(capsys, "inspect", "--adapter", adapter_dir, "--base", tmp_path / "gone")


def test_another_base_model_is_refused_unless_asked_for(
    capsys: Captured, adapter_dir: Path, tiny_bert_dir: Path, tmp_path: Path
):
    torch.manual_seed(99)
    AutoModel.from_config(AutoConfig.from_pretrained(tiny_bert_dir)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not the one the adapter"):
        run(capsys, "inspect", "--adapter", adapter_dir, "--base", tmp_path)
    there = inspected(capsys, adapter_dir, "--base", tmp_path, "--skip_base_check")["modules"][0]
    here = inspected(capsys, adapter_dir)["modules"][0]
    assert (
        there["norm"] == here["norm"] and there["amplification"]["factor"] != here["amplification"]["factor"]
    )


def test_a_fused_weight_is_divided_by_role(capsys: Captured, tmp_path: Path):
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 64}
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model("gpt2", **sizes)).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = load_classifier(str(tmp_path / "base"), LABELS, LoRAConfig(rank=2, projections="qvo"))
    randomize(model)
    save_adapter(model, tmp_path / "adapter", tokenizer=tokenizer)
    found = inspected(capsys, tmp_path / "adapter")
    assert [(m["layer"], m["role"]) for m in found["modules"]] == [(n, r) for n in (0, 1) for r in "qvo"]
    base = AutoModel.from_pretrained(tmp_path / "base")
    rows = {"q": slice(0, 16), "v": slice(32, 48)}
    for module in found["modules"]:
        A, B = factors(tmp_path / "adapter", module["module"])
        scaling = 8.0  # alpha 16, rank 2
        part = rows.get(module["role"], slice(None))
        delta = (scaling * B @ A)[part]
        W = (
            base.get_parameter(module["module"].removeprefix("transformer.") + ".weight")
            .detach()
            .double()
            .numpy()
            .T[part]
        )
        assert module["rank"] == 2 and module["shape"] == [16, 16]
        np.testing.assert_allclose(module["singular_values"], np.linalg.svd(delta)[1][:2], rtol=1e-6)
        assert module["amplification"]["relative_norm"] == pytest.approx(
            np.linalg.norm(delta) / np.linalg.norm(W)
        )
    # Without the base's configuration the rows are not known.
    updates, notes = updates_of(read_adapter(tmp_path / "adapter"))
    assert [update.role for update in updates] == ["qkv", "o"] * 2 and "shown as one" in notes[0]
    assert updates[0].role_name == "query+key+value"


def test_dora_is_told(capsys: Captured, tiny_bert_dir: Path, tmp_path: Path):
    torch.manual_seed(1)
    model, tokenizer = load_classifier(str(tiny_bert_dir), LABELS, LoRAConfig(rank=2, variant="dora"))
    randomize(model)
    save_adapter(model, tmp_path / "dora", tokenizer=tokenizer)
    found = inspected(capsys, tmp_path / "dora")
    assert "DoRA" in found["notes"][0] and "left out" in found["notes"][0]
    A, B = factors(tmp_path / "dora", VALUE)
    value = next(module for module in found["modules"] if module["module"] == VALUE)
    assert value["norm"] == pytest.approx(8 * np.linalg.norm(B @ A))
    run(capsys, "report", "--adapter", tmp_path / "dora", "--output", tmp_path / "dora.html")
    assert "the learned norms of the rows" in (tmp_path / "dora.html").read_text()


def test_an_untrained_adapter_does_nothing(
    capsys: Captured, tiny_bert_dir: Path, adapter_dir: Path, tmp_path: Path
):
    model, tokenizer = load_classifier(str(tiny_bert_dir), LABELS, LoRAConfig(rank=2, projections="qv"))
    save_adapter(model, tmp_path / "zero", tokenizer=tokenizer)
    found = inspected(capsys, tmp_path / "zero", "--other", adapter_dir, "--plot", tmp_path / "zero.png")
    assert {(m["norm"], m["effective_rank"], m["amplification"]) for m in found["modules"]} == {
        (0.0, 0.0, None)
    }
    assert [entry["B"]["all"] for entry in found["similarity"]] == [None] * 4
    assert all(0 < entry["A"]["all"] < 1 for entry in found["similarity"])
    assert (
        "only updates that both adapters have are compared: 4 of 4 here and 8 in the other"
        in found["notes"][0]
    )
    run(capsys, "inspect", "--adapter", tmp_path / "zero")
    run(capsys, "report", "--adapter", tmp_path / "zero", "--output", tmp_path / "zero.html")


def test_an_adapter_of_peft_is_inspected_and_reported(
    capsys: Captured, tiny_bert_dir: Path, tiny_csv: Path, tmp_path: Path
):
    torch.manual_seed(2)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=2)
    targets = ["query", "output.dense"]  # the feed-forward layers too
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=targets, init_lora_weights=False)
    get_peft_model(plain, config).save_pretrained(tmp_path / "peft")
    # Of a length that an adapter without a sidecar is read with.
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 128
    tokenizer.save_pretrained(tmp_path / "peft")
    found = inspected(capsys, tmp_path / "peft")
    assert [(m["layer"], m["role"]) for m in found["modules"]] == [
        (n, r) for n in (0, 1) for r in ("q", "o", None)
    ]
    assert all(module["amplification"] for module in found["modules"])
    assert [entry["name"] for entry in found["by_role"]] == ["query", "output", "output.dense"]
    path = tmp_path / "labels.csv"
    path.write_text(tiny_csv.read_text().replace("negative", "LABEL_0").replace("positive", "LABEL_1"))
    options = ["--test_file", path, "--output", tmp_path / "page.html", "--text_column", "text"]
    run(capsys, "report", "--adapter", tmp_path / "peft", *options)
    text = (tmp_path / "page.html").read_text()
    assert "LABEL_1" in text and 'id="confusion"' in text


def test_roles_by_name():
    names = {
        "bert.encoder.layer.0.attention.self.query": "q",
        "bert.encoder.layer.0.attention.output.dense": "o",
        "bert.encoder.layer.0.output.dense": None,
        "model.layers.3.attn.Wqkv": "qkv",
        "transformer.layer.0.rel_attn.v": "v",
    }
    assert {name: role_of(name) for name in names} == names


def test_a_role_that_occurs_twice_in_a_block_has_two_columns(capsys: Captured, tmp_path: Path):
    sizes = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64}
    torch.manual_seed(0)
    base = AutoConfig.for_model("bart", **sizes, **heads, max_position_embeddings=32)
    AutoModel.from_config(base).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model, _ = load_classifier(str(tmp_path / "base"), LABELS, LoRAConfig(rank=2, projections="qv"))
    randomize(model)
    save_adapter(model, tmp_path / "adapter")
    updates, _ = updates_of(read_adapter(tmp_path / "adapter"))
    grid = grid_of(updates)
    assert grid.rows == ("model.decoder.layers 0", "model.encoder.layers 0")
    assert set(grid.columns) == {
        f"{name}.{role}_proj" for name in ("self_attn", "encoder_attn") for role in "qv"
    }
    assert sorted(index for row in grid.cells for index in row if index is not None) == list(range(6))


def test_pictures_show_something(capsys: Captured, adapter_dir: Path, other_dir: Path, tmp_path: Path):
    run(capsys, "inspect", "--adapter", adapter_dir, "--plot", tmp_path / "one.png")
    run(capsys, "inspect", "--adapter", adapter_dir, "--other", other_dir, "--plot", tmp_path / "two.png")
    one, two = (Image.open(tmp_path / f"{name}.png").convert("RGB") for name in ("one", "two"))
    assert two.width >= 1200 and two.height > one.height + 600
    for image in (one, two):
        colours = image.getcolors(1 << 24)
        assert colours is not None and len(colours) > 500


def test_adapters_that_cannot_be_compared(adapter_dir: Path):
    updates, _ = updates_of(read_adapter(adapter_dir))
    with pytest.raises(ValueError, match="adapt no module in common"):
        compare(updates[:1], updates[1:2])
    with pytest.raises(
        ValueError, match=r"different sizes; got \(32, 5\) in the other adapter; expected \(32, 32\)"
    ):
        compare(updates, [replace(updates[3], A=updates[3].A[:, :5])])


def test_mistakes_are_one_line(
    capsys: Captured, adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cases: dict[str, list[Any]] = {
        "directions is not usable": ["inspect", "--adapter", adapter_dir, "--directions", 0],
        "not an adapter directory": ["inspect", "--adapter", tmp_path],
        "no such adapter": ["inspect", "--adapter", adapter_dir, "--other", tmp_path / "none"],
        "output is not usable": ["report", "--adapter", adapter_dir, "--output", "x.pdf"],
        "mistakes is not usable": ["report", "--adapter", adapter_dir, "--output", "x.md", "--mistakes", -1],
    }
    for message, argv in cases.items():
        with pytest.raises(ValueError, match=message):
            run(capsys, *argv)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"--plot needs matplotlib.*pip install 'hf-lora\[plots\]'"):
        run(capsys, "inspect", "--adapter", adapter_dir, "--plot", tmp_path / "x.png")
    run(capsys, "inspect", "--adapter", adapter_dir)


def test_report_measures_what_peft_measures(
    capsys: Captured, adapter_dir: Path, tiny_bert_dir: Path, tiny_csv: Path, tmp_path: Path
):
    options = ["--test_file", tiny_csv, "--precision", "fp32", "--max_test_samples", 40]
    rows = [line.split(",") for line in tiny_csv.read_text().splitlines()[1:41]]
    references = [LABELS.index(label) for _, label in rows]
    given = peft_logits(tiny_bert_dir, adapter_dir, [text for text, _ in rows]).argmax(-1).tolist()
    counts = confusion_matrix(references, given).tolist()
    for suffix in ("html", "md"):
        path = tmp_path / "new" / f"page.{suffix}"
        assert (
            run(capsys, "report", "--adapter", adapter_dir, "--output", path, *options) == f"wrote {path}\n"
        )
    page = (tmp_path / "new" / "page.md").read_text()
    for label, row in zip(LABELS, counts, strict=True):
        assert f"| {label} | {row[0]} | {row[1]} |" in page
    assert f"| accuracy | {accuracy_score(references, given):.4f} | " in page
    assert "40 texts of texts.csv" in page and "precision: fp32" in page
    trained = sum(tensor.numel() for tensor in load_file(adapter_dir / "adapter_model.safetensors").values())
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert_dir)
    # A and B of 8 modules at rank 4 come to the base's own parameters.
    total = sum(parameter.numel() for parameter in base.parameters()) + 8 * 4 * (32 + 32)
    assert f"{trained:,} of {total:,} parameters" in page


def test_the_arguments_import_nothing_heavy():
    code = "import hf_lora.cli.insight_arguments, sys; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
