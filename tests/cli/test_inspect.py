"""`hf-lora info`, `targets`, `inspect` and `report`; the oracle is the dense SVD of numpy on the files."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import LABELS, randomize, tiny_tokenizer
from helpers_commands import Captured, mistake, rows, run, table
from helpers_insight import Page
from helpers_serving import make_adapter, peft_logits
from peft import LoraConfig, TaskType, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, confusion_matrix
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from hf_lora import LoRAConfig, load_classifier, save_adapter
from hf_lora.adapters.directory import read_adapter
from hf_lora.insight.inspect import updates_of

PREFIX = "base_model.model."
VALUE = "bert.encoder.layer.1.attention.self.value"


SUFFIXES = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}
MODULES = {
    role: [f"bert.encoder.layer.{layer}.attention.{suffix}" for layer in range(2)]
    for role, suffix in SUFFIXES.items()
}


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


def inspected(capsys: Captured, *argv: object) -> dict[str, Any]:
    return json.loads(run(capsys, "inspect", "--json", "--adapter", *argv))


def factors(adapter: Path, module: str) -> tuple[np.ndarray, np.ndarray]:
    tensors = load_file(adapter / "adapter_model.safetensors")
    return tuple(tensors[f"{PREFIX}{module}.lora_{which}.weight"].double().numpy() for which in "AB")


def cells(out: str, title: str) -> dict[tuple[str, str], list[str]]:
    """The rows of the printed table that starts with a title, by their first two cells."""
    return {(row[0], row[1]): row[2:] for row in rows(out, title)}


@pytest.fixture(scope="module")
def other_dir(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_bert_dir, tmp_path_factory.mktemp("other") / "other", LABELS)


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
    assert "gone" in mistake(capsys, "inspect", "--adapter", adapter_dir, "--base", tmp_path / "gone")


def test_another_base_model_is_refused_unless_asked_for(
    capsys: Captured, adapter_dir: Path, tiny_bert_dir: Path, tmp_path: Path
):
    torch.manual_seed(99)
    AutoModel.from_config(AutoConfig.from_pretrained(tiny_bert_dir)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    refused = mistake(capsys, "inspect", "--adapter", adapter_dir, "--base", tmp_path)
    assert "not the one the adapter" in refused
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


@pytest.mark.slow
def test_pictures_show_something(capsys: Captured, adapter_dir: Path, other_dir: Path, tmp_path: Path):
    run(capsys, "inspect", "--adapter", adapter_dir, "--plot", tmp_path / "one.png")
    run(capsys, "inspect", "--adapter", adapter_dir, "--other", other_dir, "--plot", tmp_path / "two.png")
    one, two = (Image.open(tmp_path / f"{name}.png").convert("RGB") for name in ("one", "two"))
    assert two.width >= 1200 and two.height > one.height + 600
    for image in (one, two):
        colours = image.getcolors(1 << 24)
        assert colours is not None and len(colours) > 500


def test_mistakes_are_one_line(
    capsys: Captured, adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cases: dict[str, list[Any]] = {
        "directions is not usable": ["inspect", "--adapter", adapter_dir, "--directions", 0],
        "not an adapter directory": ["inspect", "--adapter", tmp_path],
        "no such adapter": ["inspect", "--adapter", adapter_dir, "--other", tmp_path / "none"],
        "output is not usable": ["report", "--adapter", adapter_dir, "--output", "x.md"],
        "mistakes is not usable": [
            "report",
            "--adapter",
            adapter_dir,
            "--output",
            "x.html",
            "--mistakes",
            -1,
        ],
    }
    for message, argv in cases.items():
        assert message in mistake(capsys, *argv)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    without = mistake(capsys, "inspect", "--adapter", adapter_dir, "--plot", tmp_path / "x.png")
    assert "--plot needs matplotlib" in without and "pip install 'hf-lora[plots]'" in without
    run(capsys, "inspect", "--adapter", adapter_dir)
    told = run(capsys, "report", "--adapter", adapter_dir, "--output", tmp_path / "page.html")
    assert told.splitlines()[1].startswith("without charts: matplotlib is not installed")


def test_report_measures_what_peft_measures(
    capsys: Captured, adapter_dir: Path, tiny_bert_dir: Path, tiny_csv: Path, tmp_path: Path
):
    options = ["--test_file", tiny_csv, "--precision", "fp32", "--max_test_samples", 40]
    rows = [line.split(",") for line in tiny_csv.read_text().splitlines()[1:41]]
    references = [LABELS.index(label) for _, label in rows]
    given = peft_logits(tiny_bert_dir, adapter_dir, [text for text, _ in rows]).argmax(-1).tolist()
    counts = confusion_matrix(references, given).tolist()
    path = tmp_path / "new" / "page.html"
    assert run(capsys, "report", "--adapter", adapter_dir, "--output", path, *options) == f"wrote {path}\n"
    page = path.read_text()
    shown = Page(page).tables
    assert [row[1:] for row in shown["confusion"][1:3]] == [list(map(str, row)) for row in counts]
    assert dict(row[:2] for row in shown["results"])["accuracy"] == f"{accuracy_score(references, given):.4f}"
    assert "40 texts of texts.csv" in page and "precision: fp32" in page
    trained = sum(tensor.numel() for tensor in load_file(adapter_dir / "adapter_model.safetensors").values())
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert_dir)
    # A and B of 8 modules at rank 4 come to the base's own parameters.
    total = sum(parameter.numel() for parameter in base.parameters()) + 8 * 4 * (32 + 32)
    assert f"{trained:,} of {total:,} parameters" in page
