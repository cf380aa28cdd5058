"""Texts, adapters and the oracle for predictions: peft on plain transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import randomize, tiny_tokenizer
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from hf_lora import (
    LoRAConfig,
    load_classifier,
    save_adapter,
)

LONG = "the film was good and the meal was awful but we had fun " * 5
TEXTS = [
    "good",
    "the trip was broken and sad but the food we had there was lovely and warm",
    "",
    LONG,
    "words nobody knows",
    "a very bad day",
]
PAIRS = [("the film", "it was good and we had fun"), ("the meal was cold and rude", "bad"), ("a", "b")]


def peft_logits(base: Path, adapter: Path, texts: Sequence[Any], max_length: int = 32) -> Tensor:
    """The oracle: peft on plain transformers, one text (or pair) at a time, nothing of hf_lora."""
    config = json.loads((adapter / "hf_lora.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(config["labels"]))
    return plain_logits(PeftModel.from_pretrained(model, adapter).eval(), texts, max_length)


@torch.inference_mode()
def plain_logits(model: torch.nn.Module, texts: Sequence[Any], max_length: int = 32) -> Tensor:
    tokenizer = tiny_tokenizer()
    rows = []
    for text in texts:
        parts = [text] if isinstance(text, str) else text
        encoded = tokenizer(*parts, truncation=True, max_length=max_length, return_tensors="pt")
        rows.append(model(**encoded).logits[0])
    return torch.stack(rows)


def make_adapter(base: Path, directory: Path, labels: Sequence[str], **options: Any) -> Path:
    """An adapter with random A, B and a head large enough to give outputs of both signs."""
    torch.manual_seed(4)
    model, tokenizer = load_classifier(str(base), labels, LoRAConfig(rank=2), **options)
    randomize(model, 0.3)
    model.classifier.weight.data.normal_(generator=torch.Generator().manual_seed(6))
    return save_adapter(model, directory, tokenizer=tokenizer)


def random_adapter(
    base: Path | str, directory: Path, labels: Sequence[str], seed: int, lora: dict[str, Any], **options: Any
) -> Path:
    """An adapter all of whose trained parameters are far from where they started."""
    torch.manual_seed(seed)
    model, tokenizer = load_classifier(str(base), labels, LoRAConfig(**{"rank": 2, **lora}), **options)
    randomize(model, 0.3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return save_adapter(model, directory, tokenizer=tokenizer)
