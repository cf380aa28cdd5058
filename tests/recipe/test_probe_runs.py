"""Whole runs of `hf-lora train` that start from a probe, and the linear probe as an adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_texts
from helpers_cli import read_texts
from helpers_recipe import run_training
from peft import PeftModel
from safetensors.torch import load_file
from sklearn.dummy import DummyClassifier
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_lora import TextClassifier
from hf_lora.adapters.directory import read_adapter
from hf_lora.cli import main as cli


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    for name, count in (("train", 60), ("validation", 24), ("test", 21)):
        write_texts(folder / f"{name}.csv", count)
    return {f"--{name}_file": folder / f"{name}.csv" for name in ("train", "validation", "test")}


def train(base: Path, output: Path, files: dict[str, Path], *flags: object) -> dict[str, Any]:
    argv = ["--model_name_or_path", base, "--output_dir", output, "--max_seq_length", 32, "--use_cpu", "True"]
    argv += ["--precision", "fp32", "--disable_tqdm", "True", "--num_train_epochs", 1]
    argv += [part for pair in files.items() for part in pair]
    return run_training([str(part) for part in (*argv, *flags)])


@pytest.fixture(scope="module", params=["native", "mean", "mean_layers"])
def probe_run(request, tiny_bert_dir: Path, files, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("runs") / request.param
    return output, train(tiny_bert_dir, output, files, "--lora_rank", 0, "--pooling", request.param)


def test_rank_0_is_the_probe_and_nothing_else(probe_run) -> None:
    output, metrics = probe_run
    for split in ("eval", "test"):
        for name in ("accuracy", "f1_macro", "matthews_correlation"):
            assert metrics[f"{split}_{name}"] == metrics[f"{split}_{name}_probe"]
            assert metrics[f"{split}_{name}"] == metrics[f"{split}_{name}_disabled"]
    assert metrics["global_step"] == 0 and metrics["train_runtime"] == 0.0
    tensors = load_file(output / "adapter_model.safetensors")
    updates = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    assert len(updates) == 1 and not updates[0].any()
    assert json.loads((output / "metrics.json").read_text())["test_accuracy"] == metrics["test_accuracy"]


def test_the_majority_is_scikit_learns(probe_run, files) -> None:
    _, metrics = probe_run
    names = {split: read_texts(files[f"--{split}_file"])[1] for split in ("train", "test")}
    dummy = DummyClassifier(strategy="most_frequent").fit(np.zeros((60, 1)), names["train"])
    # Both labels are as frequent in training: the first one is the answer.
    assert metrics["test_accuracy_majority"] == dummy.score(np.zeros((21, 1)), names["test"])


def test_the_probe_is_served_like_any_adapter(probe_run, files, capsys, tmp_path: Path) -> None:
    output, metrics = probe_run
    texts, names = read_texts(files["--test_file"])
    predictions = TextClassifier.from_pretrained(output, precision="fp32").predict(texts)
    right = [prediction["label"] == name for prediction, name in zip(predictions, names, strict=True)]
    assert np.mean(right) == pytest.approx(metrics["test_accuracy"])
    assert cli.main(["info", "--adapter", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 1
    assert (
        cli.main(["resize", "--adapter", str(output), "--rank", "1", "--output_dir", str(tmp_path / "r")])
        == 0
    )


def test_peft_loads_the_probe_and_no_classifier_with_a_head_that_it_cannot_have(
    probe_run, tiny_bert_dir: Path
) -> None:
    output, _ = probe_run
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=2).eval()
    ids = torch.arange(5, 15)[None]
    if output.name == "native":
        adapted = PeftModel.from_pretrained(classifier, str(output)).base_model.model.base_model
    else:
        with pytest.raises(ValueError, match="not found in the base model"):
            PeftModel.from_pretrained(classifier, str(output))
        adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_bert_dir), str(output))
    plain = AutoModel.from_pretrained(tiny_bert_dir).eval()
    with torch.no_grad():
        states = plain(ids).last_hidden_state
        torch.testing.assert_close(adapted.eval()(ids).last_hidden_state, states)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "mean_layers"])
def test_a_pooled_head_is_merged_and_exported(
    pooling: str, tiny_bert_dir: Path, files, tmp_path: Path, capsys
) -> None:
    train(tiny_bert_dir, tmp_path / "run", files, "--pooling", pooling, "--learning_rate", 1e-3)
    capsys.readouterr()
    merge = ["merge", "--adapter", str(tmp_path / "run"), "--output_dir", str(tmp_path / "merged")]
    assert cli.main(merge) == 0
    assert (tmp_path / "merged" / "pooled_classifier.py").is_file()
    capsys.readouterr()
    pytest.importorskip("onnxruntime")
    export = ["export", "--adapter", str(tmp_path / "run"), "--output_dir", str(tmp_path / "onnx")]
    assert cli.main([*export, "--format", "onnx", "--json"]) == 0
    from hf_lora.serving.onnx import load_onnx

    texts = ["the film was good", "a dull and rude book"]
    ours = TextClassifier.from_pretrained(tmp_path / "run", precision="fp32")
    np.testing.assert_allclose(load_onnx(tmp_path / "onnx").logits(texts), ours.logits(texts), atol=1e-4)


@pytest.mark.parametrize(
    ("rank", "flags", "expected"),
    [(0, (), "mean_layers"), (0, ("--cache_frozen_prefix", "memory"), "mean"), (2, (), "mean")],
)
def test_a_sentence_encoders_probe_reads_three_layers_and_lora_the_last(
    rank: int, flags: tuple[str, ...], expected: str, tiny_bert_dir: Path, files, tmp_path: Path, capsys
) -> None:
    base = Path(shutil.copytree(tiny_bert_dir, tmp_path / "base"))
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    train(base, tmp_path / "run", files, "--lora_rank", rank, *flags)
    printed = capsys.readouterr().out
    assert f"{expected} pooling (by the 1_Pooling/config.json" in printed
    narrowed = "better on the last layer alone" in printed
    assert read_adapter(tmp_path / "run").info.pooling == ("mean" if narrowed else expected)


def test_a_head_on_three_layers_has_none_to_read_where_they_are_cached(
    tiny_bert_dir: Path, files, tmp_path: Path
) -> None:
    flags = ("--lora_layers", -1, "--cache_frozen_prefix", "memory", "--pooling", "mean_layers")
    with pytest.raises(
        ValueError, match=r"reads layer 1 of 2, where the first 1 are frozen; use pooling='mean'"
    ):
        train(tiny_bert_dir, tmp_path / "run", files, *flags)


@pytest.mark.slow
@pytest.mark.parametrize("taken_back", [False, True], ids=["kept", "taken back"])
def test_a_run_from_a_probe_goes_on_to_the_same_adapter(
    taken_back: bool, tiny_bert_dir: Path, files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_lora.recipe.compare.clearly_better", lambda before, after: taken_back)
    flags = [
        "--pooling",
        "mean",
        "--save_strategy",
        "steps",
        "--save_steps",
        2,
        "--per_device_train_batch_size",
        16,
    ]
    train(tiny_bert_dir, tmp_path / "whole", files, *flags)
    train(tiny_bert_dir, tmp_path / "cut", files, *flags, "--max_steps", 2, "--lr_scheduler_type", "constant")
    whole = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    train(
        tiny_bert_dir,
        tmp_path / "whole",
        files,
        *flags,
        "--resume_from_checkpoint",
        tmp_path / "whole" / "checkpoint-2",
    )
    again = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    assert whole.keys() == again.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name


def test_multi_label_and_regression_start_from_their_probes(tiny_bert_dir: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for kind in ("multi", "regression"):
        rows = []
        for row in range(80):
            tags = [name for name in ("good", "bad") if rng.random() < 0.5]
            text = " ".join(["the film was", *tags, "book" if row % 2 else "meal"])
            value = tags if kind == "multi" else float(len(tags)) + 0.01 * float(rng.normal())
            rows.append(json.dumps({"text": text, "label": value}))
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(rows))
        metrics = train(
            tiny_bert_dir, tmp_path / kind, {"--train_file": tmp_path / f"{kind}.jsonl"}, "--lora_rank", 0
        )
        name = "f1_micro" if kind == "multi" else "mse"
        assert metrics[f"eval_{name}_probe"] == pytest.approx(metrics[f"eval_{name}"], rel=0.2)
        better = metrics[f"eval_{name}_probe"] > metrics[f"eval_{name}_majority"]
        assert better == (kind == "multi"), metrics


@pytest.mark.parametrize(("flags", "init"), [((), "gradient"), (("--head_init", "random"), "kaiming")])
def test_lora_starts_along_the_gradient_after_a_probe(
    flags: tuple[str, ...], init: str, tiny_bert_dir: Path, files, tmp_path: Path, capsys
) -> None:
    # So small a rate leaves A where it started.
    metrics = train(
        tiny_bert_dir, tmp_path / "run", files, "--learning_rate", 1e-12, "--lora_rank", 4, *flags
    )
    assert f"LoRA: {init} (" in capsys.readouterr().out
    assert f"| lora_init | {init} |" in (tmp_path / "run" / "README.md").read_text()
    assert metrics["warm_start_runtime"] > 0
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    starts = [tensor for name, tensor in tensors.items() if "lora_A" in name]
    orthogonal = [torch.allclose(A @ A.T, torch.eye(4) / 3, atol=1e-4) for A in starts]
    assert len(starts) == 8 and all(orthogonal) is any(orthogonal) is (init == "gradient")
