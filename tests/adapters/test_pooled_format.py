"""Adapters of pooled classifiers in other libraries: they adapt the encoder, and refuse a classifier."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LABELS, randomize, tiny_batch, tiny_tokenizer
from peft import AutoPeftModelForFeatureExtraction, AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForSequenceClassification, pipeline

from hf_lora import LoRAConfig, TextClassifier, load_classifier, save_adapter
from hf_lora.adapters.arithmetic import combine, resize
from hf_lora.adapters.directory import read_adapter
from hf_lora.adapters.info import FILE
from hf_lora.adapters.values import Adapter, write_adapter
from hf_lora.serving.loading import load_trained

TEXTS = ["the film was good", "a dull book", "we had a very warm and lovely day"]
# Every way in which PEFT's names or numbers depend on the module.
CONFIGS = {
    "plain": LoRAConfig(rank=4, alpha=8),
    "patterns": LoRAConfig(
        rank=4, alpha=8, rank_pattern={"layer.0.*": 2}, alpha_pattern={r"bert\.encoder\.layer\.1.*": 5}
    ),
    "rslora": LoRAConfig(rank=4, alpha=8, scaling="rslora", layers=(-1,)),
    "dora": LoRAConfig(rank=4, alpha=8, variant="dora", projections="qvo"),
    "biases": LoRAConfig(rank=4, alpha=8, bias="all"),
}


@pytest.fixture
def pooled(tiny_bert_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    def adapter(config: LoRAConfig = CONFIGS["plain"], name: str = "pooled", pooling: str = "mean") -> Path:
        torch.manual_seed(3)
        model, tokenizer = load_classifier(str(tiny_bert_dir), LABELS, config, pooling=pooling, max_length=32)
        randomize(model)
        return save_adapter(model, tmp_path / name, tokenizer=tokenizer)

    return adapter


def as_written_before(adapter: Path) -> Path:
    """The same adapter as releases up to 0.2 wrote it: under the names of the whole classifier."""
    values, config = (json.loads((adapter / name).read_text()) for name in (FILE, "adapter_config.json"))
    encoder = values["base_model"].pop("encoder")
    start = "base_model.model."
    tensors = {
        key if "pooled_head" in key else key.replace(start, f"{start}{encoder}."): tensor
        for key, tensor in load_file(adapter / "adapter_model.safetensors").items()
    }
    targets = [key.partition("layer.")[2][2:].partition(".lora_")[0] for key in tensors if ".lora_" in key]
    config |= {"task_type": None, "target_modules": sorted(set(targets))}
    values["sha256"] = {}
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    for name, content in ((FILE, values), ("adapter_config.json", config)):
        (adapter / name).write_text(json.dumps(content))
    return adapter


def classifier_of(base: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(base)


READERS: dict[str, Callable[[Path, Path], Any]] = {
    "PeftModel.from_pretrained": lambda base, adapter: PeftModel.from_pretrained(
        classifier_of(base), adapter
    ),
    "AutoPeftModel": lambda base, adapter: AutoPeftModelForSequenceClassification.from_pretrained(adapter),
    "load_adapter": lambda base, adapter: classifier_of(base).load_adapter(str(adapter)),
    "from_pretrained": lambda base, adapter: classifier_of(adapter),
    # For a base that names its bare encoder, transformers makes a pipeline of that, which has no logits.
    "pipeline": lambda base, adapter: pipeline("text-classification", str(adapter))("the film was good"),
}


@pytest.mark.parametrize("pooling", ["mean", "cls", "mean_layers"])
@pytest.mark.parametrize("reader", READERS)
def test_a_classifier_with_a_random_head_is_never_made(
    reader: str, pooling: str, pooled: Callable[..., Path], tiny_bert_dir: Path
) -> None:
    with pytest.raises(
        (ValueError, KeyError), match=r"not found in the base model|Expected target PEFT class|logits"
    ):
        READERS[reader](tiny_bert_dir, pooled(pooling=pooling))


@pytest.mark.parametrize("saved_as", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_a_pipeline_is_refused_for_a_base_with_another_head(
    saved_as: str, pooled: Callable[..., Path], tiny_bert_dir: Path, tmp_path: Path
) -> None:
    adapter = pooled()
    base = tmp_path / "base"
    AutoModel.from_pretrained(tiny_bert_dir).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    for path, key, value in (
        (base / "config.json", "architectures", [saved_as]),
        (adapter / "adapter_config.json", "base_model_name_or_path", str(base)),
    ):
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match="not found in the base model"):
        pipeline("text-classification", str(adapter))


@pytest.mark.parametrize("config", CONFIGS)
def test_the_encoder_in_peft_is_ours(
    config: str, pooled: Callable[..., Path], tiny_bert_dir: Path, recwarn: pytest.WarningsRecorder
) -> None:
    adapter = pooled(CONFIGS[config])
    ours, _, _ = load_trained(adapter)
    batch = {name: value for name, value in tiny_batch().items() if name != "labels"}
    with torch.no_grad():
        expected = ours.base_model(**batch).last_hidden_state
        readers = [
            PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_bert_dir), adapter),
            AutoPeftModelForFeatureExtraction.from_pretrained(adapter),
        ]
        if config != "dora":  # transformers' own reader reports its vectors as missing
            readers.append(AutoModel.from_pretrained(adapter))
        for theirs in readers:
            assert_close(theirs.eval()(**batch).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    assert not [str(entry.message) for entry in recwarn if "adapter keys" in str(entry.message)]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("without_lora", [False, True], ids=["own configuration", "PEFT's"])
def test_the_adapter_comes_back_bit_for_bit(
    config: str, without_lora: bool, pooled: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = pooled(CONFIGS[config])
    if without_lora:
        values = json.loads((adapter / FILE).read_text())
        (adapter / FILE).write_text(json.dumps({**values, "lora": None}))
    model, _, _ = load_trained(adapter)
    again = save_adapter(model, tmp_path / "again")
    first, second = (load_file(place / "adapter_model.safetensors") for place in (adapter, again))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert json.loads((again / FILE).read_text())["base_model"]["encoder"] == "bert"


@pytest.mark.parametrize("config", ["plain", "biases"])
def test_an_adapter_of_an_earlier_release_still_loads(config: str, pooled: Callable[..., Path]) -> None:
    new, old = (pooled(CONFIGS[config], name) for name in ("new", "old"))
    as_written_before(old)
    expected = TextClassifier.from_pretrained(new, precision="fp32").logits(TEXTS)
    assert torch.equal(TextClassifier.from_pretrained(old, precision="fp32").logits(TEXTS), expected)


def test_sums_and_smaller_ranks_are_refused_as_well_and_mix_with_earlier_adapters(
    pooled: Callable[..., Path], tmp_path: Path, tiny_bert_dir: Path
) -> None:
    new, old = pooled(name="new"), as_written_before(pooled(name="old"))
    sources = [read_adapter(new), read_adapter(old)]
    first, second = (Adapter.from_files(files) for files in sources)
    assert first.factors.keys() == second.factors.keys()
    made = {
        "sum": write_adapter(tmp_path / "sum", combine([first, second], [0.5, 0.5]), sources),
        "small": write_adapter(tmp_path / "small", resize(first, rank=2)[0], sources[:1]),
    }
    expected = TextClassifier.from_pretrained(new, precision="fp32").logits(TEXTS)
    assert_close(
        TextClassifier.from_pretrained(made["sum"], precision="fp32").logits(TEXTS),
        expected,
        rtol=1e-4,
        atol=1e-5,
    )
    for adapter in made.values():
        with pytest.raises(ValueError, match="not found in the base model"):
            READERS["load_adapter"](tiny_bert_dir, adapter)
        PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_bert_dir), adapter)


def test_an_adapter_with_the_architectures_own_head_is_written_as_before(
    adapter_dir: Path, tiny_bert_dir: Path
) -> None:
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    assert "encoder" not in json.loads((adapter_dir / FILE).read_text())["base_model"]


@pytest.mark.parametrize(
    "model_type", ["roberta", "distilbert", "mpnet", "albert", "deberta-v2", "modernbert", "eurobert", "gpt2"]
)
def test_every_architecture_adapts_its_bare_encoder(model_type: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model(model_type).base_model.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    model, tokenizer = load_classifier(str(base), LABELS, CONFIGS["plain"], pooling="mean")
    randomize(model)
    adapter = save_adapter(model, tmp_path / "adapter", tokenizer=tokenizer)
    batch = {name: value for name, value in tiny_batch().items() if name != "labels"}
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        expected = model.eval().base_model(**batch).last_hidden_state
        assert_close(theirs(**batch).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="not found in the base model"):
        READERS["PeftModel.from_pretrained"](base, adapter)
