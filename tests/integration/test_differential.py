"""Random adapters in both directions between hf_lora, peft and transformers, merged and not: the same logits.

HF_LORA_CASES sets how many cases there are (200), HF_LORA_FIRST_CASE the number of the first (0). One case by itself:
`pytest -m slow -k case-17- tests/integration/test_differential.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import peft
import pytest
import torch
from helpers_differential import ADAPTED_BY_PEFT, FORMS, Case, in_older_form, numbered_tokenizer, tied_targets
from torch import Tensor, nn

from hf_lora import TextClassifier, load_adapter, merge_lora, save_adapter, unmerge_lora
from hf_lora.adapters.peft_format import adapter_tensors
from hf_lora.lora.inject import injection

FIRST, COUNT = int(os.environ.get("HF_LORA_FIRST_CASE", "0")), int(os.environ.get("HF_LORA_CASES", "200"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT), ids="case-{}-".format)
def test_a_random_adapter_gives_the_same_logits_everywhere(seed: int, tmp_path: Path) -> None:
    case = Case(seed)
    if case.random.random() < 0.5:
        model = case.ours()
        expected = case.logits(model)
    else:
        theirs = case.theirs()
        expected = case.logits(theirs)
        theirs.save_pretrained(tmp_path / "theirs")
        in_older_form(tmp_path / "theirs", case.random.choice(FORMS))
        model = case.plain()
        if case.saves_twice(model):
            with pytest.raises(ValueError, match="twice, by itself and as a part"):
                load_adapter(model, tmp_path / "theirs")
            return
        load_adapter(model, tmp_path / "theirs")
        case.assert_close(model, expected)
    check_merge(case, model, expected)
    directory = save_adapter(model, tmp_path / "ours")
    check_round_trip(case, model, directory)
    check_peft(case, model, directory, expected)
    if case.random.random() < 0.25:
        check_classifier(case, model, directory)


def check_merge(case: Case, model: nn.Module, expected: Tensor) -> None:
    """Merged, a model computes the same; unmerged, it is what it was, bit for bit. Tied weights are refused."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        merge_lora(model)
    except ValueError as error:
        assert "whose weight is" in str(error)
        assert tied_targets(model, [target.module for target in injection(model).targets])
    else:
        case.assert_close(model, expected)
        unmerge_lora(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def check_round_trip(case: Case, model: nn.Module, directory: Path) -> None:
    """Loaded, what was saved is the same model, and saves the same tensors."""
    twin = case.plain()
    load_adapter(twin, directory)
    assert torch.equal(case.logits(twin), case.logits(model))
    own, again = adapter_tensors(model), adapter_tensors(twin)
    assert own.keys() == again.keys()
    for key, tensor in own.items():
        assert torch.equal(tensor, again[key]), key


def check_peft(case: Case, model: nn.Module, directory: Path, expected: Tensor) -> None:
    """What was saved computes the same in peft and in transformers."""
    targets, plain = injection(model).targets, case.plain()
    if any(
        target.tensor != "weight" or type(plain.get_submodule(target.module)) not in ADAPTED_BY_PEFT
        for target in targets
    ):
        return  # peft has no LoRA for these
    theirs = peft.PeftModel.from_pretrained(case.plain(), directory).eval()
    if any(target.bypassed for target in targets):
        case.assert_close(theirs.merge_and_unload(), expected)
        return  # unmerged, peft's update is not called
    plain.load_adapter(directory)
    for loaded in (theirs, plain.eval()):
        case.assert_close(loaded, expected)


def check_classifier(case: Case, model: nn.Module, directory: Path) -> None:
    """`TextClassifier`, which merges where it can, gives the logits of the unmerged model."""
    if case.inputs.keys() != {"input_ids", "attention_mask"} or case.dtype != torch.float32:
        return
    base, tokenizer = directory.parent / "base", numbered_tokenizer()
    case.plain().save_pretrained(base)
    tokenizer.save_pretrained(base)
    classifier = TextClassifier.from_pretrained(directory, base=str(base), precision="fp32")
    # One by one, since some models read the padding of a batch.
    for text in ("5 6 7 8 9 10", "63", "40 41 42"):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits
        torch.testing.assert_close(classifier.logits([text]), expected, atol=1e-4, rtol=1e-4)
