"""Exported pooled classifiers in transformers and sentence-transformers, and by the words of their formats."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import LABELS, WORDS, randomize, tiny_tokenizer
from helpers_commands import Captured, mistake, run
from helpers_serving import LONG, TEXTS, make_adapter, plain_logits
from safetensors.torch import load_file
from tiny_models import tiny_model
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from hf_lora import LoRAConfig, TextClassifier, load_classifier, save_adapter
from hf_lora.adapters.info import FILE

POOLINGS = ["mean", "cls", "mean_layers"]
# More than one window of lengths, with texts that are cut and empty ones.
MANY = [" ".join(WORDS[(7 * row + place) % len(WORDS)] for place in range(row % 45)) for row in range(195)]
MANY += [*TEXTS[:4], LONG]
needs_sentence_transformers = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed"
)


@pytest.fixture
def pooled(tiny_bert_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    def adapter(pooling: str, base: Path = tiny_bert_dir, **options: Any) -> Path:
        options = {"labels": ("a", "b", "c"), "max_length": 32, "text_columns": ("text",), **options}
        torch.manual_seed(3)
        model, tokenizer = load_classifier(str(base), config=LoRAConfig(rank=2), pooling=pooling, **options)
        randomize(model, 0.03)  # with more, rounding alone moves the logits of a real encoder
        model.pooled_head.weight.data.normal_(std=0.1)
        model.pooled_head.bias.data.normal_()
        return save_adapter(model, tmp_path / f"adapter_{pooling}", tokenizer=tokenizer)

    return adapter


@pytest.fixture(autouse=True)
def code_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers copies the code of a checkpoint."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def expected_of(adapter: Path, texts: list[str]) -> Tensor:
    return TextClassifier.from_pretrained(adapter, precision="fp32", merge=False).logits(texts)


@pytest.mark.parametrize("command", [["merge"], ["export", "--format", "safetensors-merged"]], ids=" ".join)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_checkpoint_brings_the_class_of_a_pooled_head(
    pooling: str, command: list[str], pooled: Callable[..., Path], tmp_path: Path, capsys: Captured
) -> None:
    adapter, output = pooled(pooling), tmp_path / "merged"
    out = run(capsys, *command, "--adapter", adapter, "--output_dir", output)
    assert "load it with trust_remote_code=True" in out
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        output, trust_remote_code=True, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"} and not model.training
    expected = expected_of(adapter, TEXTS)
    assert_close(plain_logits(model, TEXTS), expected, rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(output, trust_remote_code=True)
    given = {"trust_remote_code": True, "tokenizer": tokenizer}
    [scores] = pipeline("text-classification", str(output), top_k=None, **given)([TEXTS[1]])
    assert {row["label"]: row["score"] for row in scores} == pytest.approx(
        dict(zip("abc", expected[1].softmax(-1).tolist(), strict=True)), abs=1e-5
    )
    batch = {name: torch.tensor([[2, 9, 8, 3]]) for name in ["input_ids"]}
    loss = model(**batch, labels=torch.tensor([1])).loss
    assert_close(loss, torch.nn.functional.cross_entropy(model(**batch).logits, torch.tensor([1])))
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert_close(plain_logits(again, TEXTS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loader", [AutoModelForSequenceClassification, AutoModel, transformers.AutoConfig])
@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}], ids=str)
def test_without_trust_in_its_code_it_is_refused(
    trust: dict[str, bool], loader: Any, pooled: Callable[..., Path], tmp_path: Path, capsys: Captured
) -> None:
    run(capsys, "merge", "--adapter", pooled("mean"), "--output_dir", tmp_path / "merged")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        loader.from_pretrained(tmp_path / "merged", **trust)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline("text-classification", str(tmp_path / "merged"), **trust)


_ALONE = """
import json, sys
sys.modules["hf_lora"] = sys.modules["peft"] = None
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
batch = tokenizer(json.load(open(sys.argv[2])), padding=True, truncation=True, max_length=32, return_tensors="pt")
with torch.no_grad():
    json.dump(model(**batch).logits.tolist(), open(sys.argv[3], "w"))
"""


@pytest.mark.slow
def test_it_needs_transformers_alone(pooled: Callable[..., Path], tmp_path: Path, capsys: Captured) -> None:
    adapter = pooled("mean_layers")
    run(capsys, "merge", "--adapter", adapter, "--output_dir", tmp_path / "merged")
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    names = [str(tmp_path / name) for name in ("merged", "texts.json", "logits.json")]
    subprocess.run([sys.executable, "-c", _ALONE, *names], check=True, cwd=tmp_path, stdin=subprocess.DEVNULL)
    logits = torch.tensor(json.loads((tmp_path / "logits.json").read_text()))
    assert_close(logits, expected_of(adapter, TEXTS), rtol=0, atol=1e-5)


@torch.inference_mode()
def by_the_format(folder: Path, texts: list[str]) -> Tensor:
    """The embeddings of a folder by the words of sentence-transformers' formats, one text at a time."""
    modules = json.loads((folder / "modules.json").read_text())
    assert [(entry["idx"], entry["path"], entry["type"].rpartition(".")[2]) for entry in modules] == [
        (0, "", "Transformer"),
        (1, "1_Pooling", "Pooling"),
        (2, "2_Dense", "Dense"),
    ]
    settings, pooling, dense = (
        json.loads((folder / name).read_text())
        for name in ("sentence_bert_config.json", "1_Pooling/config.json", "2_Dense/config.json")
    )
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, **settings.get("model_args", {}))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tensors = load_file(folder / "2_Dense" / "model.safetensors")
    assert tuple(tensors["linear.weight"].shape) == (dense["out_features"], dense["in_features"])
    assert dense["activation_function"] == "torch.nn.modules.linear.Identity" and dense["bias"]
    assert pooling["word_embedding_dimension"] == dense["in_features"]
    modes = [name for name, value in pooling.items() if value is True]
    rows = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=settings["max_seq_length"], return_tensors="pt")
        states = model(**inputs).last_hidden_state[0]
        vector = {"pooling_mode_mean_tokens": states.mean(0), "pooling_mode_cls_token": states[0]}[
            modes.pop()
        ]
        modes = [name for name, value in pooling.items() if value is True]
        rows.append(tensors["linear.weight"] @ vector + tensors["linear.bias"])
    return torch.stack(rows)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_files_of_sentence_transformers_say_how_to_get_the_logits(
    pooling: str, pooled: Callable[..., Path], tmp_path: Path, capsys: Captured
) -> None:
    adapter, output = pooled(pooling), tmp_path / "out"
    out = run(
        capsys, "export", "--format", "sentence-transformers", "--adapter", adapter, "--output_dir", output
    )
    assert ("trust_remote_code" in out) == (pooling == "mean_layers")
    assert_close(by_the_format(output, MANY), expected_of(adapter, MANY), rtol=0, atol=1e-5)
    assert json.loads((output / FILE).read_text())["labels"] == ["a", "b", "c"]


@needs_sentence_transformers
@pytest.mark.slow
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet", "modernbert"])
def test_sentence_transformers_gives_the_logits(
    model_type: str, pooling: str, pooled: Callable[..., Path], tmp_path: Path, capsys: Captured
) -> None:
    from sentence_transformers import SentenceTransformer

    base, output = tmp_path / "base", tmp_path / "out"
    tiny_model(model_type).base_model.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    adapter = pooled(pooling, base)
    run(capsys, "export", "--format", "sentence-transformers", "--adapter", adapter, "--output_dir", output)
    if pooling == "mean_layers":
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            SentenceTransformer(str(output), device="cpu")
    model = SentenceTransformer(str(output), device="cpu", trust_remote_code=pooling == "mean_layers")
    embeddings = model.encode(MANY, convert_to_tensor=True, show_progress_bar=False)
    assert len(MANY) == 200
    assert_close(embeddings, expected_of(adapter, MANY), rtol=0, atol=1e-5)


@needs_sentence_transformers
@pytest.mark.slow
def test_sentence_transformers_gives_the_logits_of_a_real_encoder(
    minilm: str, pooled: Callable[..., Path], tmp_path: Path, capsys: Captured
) -> None:
    from sentence_transformers import SentenceTransformer

    adapter, output = pooled("mean", Path(minilm)), tmp_path / "out"
    run(capsys, "export", "--format", "sentence-transformers", "--adapter", adapter, "--output_dir", output)
    texts = [f"Number {row}: {text}" for row, text in enumerate(MANY)]
    embeddings = SentenceTransformer(str(output), device="cpu").encode(texts, convert_to_tensor=True)
    assert_close(embeddings, expected_of(adapter, texts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "native",
            "no module for the architecture's own head; got pooling='native'; expected one of mean, cls",
        ),
        ("pairs", "embeds one text; got a classifier of pairs; use --format safetensors-merged"),
        ("int8", "--int8 does nothing in this format; got --format sentence-transformers"),
    ],
)
def test_what_sentence_transformers_has_no_modules_for_is_refused(
    kind: str,
    words: str,
    pooled: Callable[..., Path],
    tiny_bert_dir: Path,
    tmp_path: Path,
    capsys: Captured,
) -> None:
    if kind == "native":
        adapter = make_adapter(tiny_bert_dir, tmp_path / "native", LABELS)
    else:
        adapter = pooled("mean", text_columns=("one", "two") if kind == "pairs" else ("text",))
    given = ["--int8"] if kind == "int8" else []
    command = ["export", "--format", "sentence-transformers", "--adapter", adapter, "--output_dir"]
    assert words in mistake(capsys, *command, tmp_path / "out", *given)
    assert not (tmp_path / "out").exists()
