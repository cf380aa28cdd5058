"""The bank compares an adapter in it with the adapter alone: rounding is no difference, and all else is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_serving import TEXTS, make_adapter

import hf_lora.bank.loading as loading
from hf_lora import AdapterBank, TextClassifier, save_adapter
from hf_lora.stacks.contents import Contents, contents_of


def with_a_large_head(directory: Path, target: Path) -> Path:
    """The adapter with a head whose large products cancel in the texts that it is compared with, as in a solved one."""
    classifier = TextClassifier.from_pretrained(directory, merge=False, precision="fp32")
    inputs = AdapterBank.from_pretrained([directory], precision="fp32")._loader._inputs
    with torch.no_grad():
        pooled = classifier.model.base_model(**inputs).pooler_output
        across = torch.linalg.svd(pooled.double())[2][len(pooled) :]
        classifier.model.classifier.weight += 1e4 * across[:2].float()
    return save_adapter(classifier.model, target, tokenizer=classifier.tokenizer)


@pytest.fixture
def adapters(tiny_bert_dir: Path, tmp_path: Path) -> list[Path]:
    first = make_adapter(tiny_bert_dir, tmp_path / "first", ["a", "b"], max_length=32)
    return [first, with_a_large_head(first, tmp_path / "large")]


def test_what_rounding_makes_of_large_outputs_is_no_difference(adapters: list[Path]) -> None:
    bank = AdapterBank.from_pretrained(adapters[::-1], precision="fp32")
    alone = TextClassifier.from_pretrained(adapters[1], merge=False, precision="fp32")
    size = alone.model.classifier.weight.abs().max().item()
    found = torch.stack(bank.logits(TEXTS, "large"))
    torch.testing.assert_close(found, alone.logits(TEXTS), atol=1e-6 * size, rtol=0)


@pytest.mark.parametrize("place", [0, 1])
def test_an_update_that_is_not_the_adapters_is_still_refused(
    place: int, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = AdapterBank.from_pretrained(adapters[1:], precision="fp32")

    def wrong(model: torch.nn.Module) -> Contents:
        contents = contents_of(model)
        name, update = next(iter(contents.updates.items()))
        assert update.lora_B is not None
        contents.updates[name] = replace(update, lora_B=1.1 * update.lora_B)
        return contents

    monkeypatch.setattr(loading, "contents_of", wrong)
    with pytest.raises(ValueError, match=r"got logits that differ by .* expected the same"):
        bank.add(TextClassifier.from_pretrained(adapters[place], merge=False, precision="fp32"), "wrong")
    assert list(bank.adapters) == ["large"]
