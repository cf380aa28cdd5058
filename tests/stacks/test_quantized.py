"""Stacked layers on quantized weights compute what the injected ones do."""

import copy

import pytest
import torch
from conftest import tiny_batch
from helpers_quantized import ERRORS, KINDS, injected, quantized

from hf_lora.lora.quantized import is_quantized
from hf_lora.stacks.contents import contents_of
from hf_lora.stacks.model import StackedModel

ADAPTERS = {1: {}, 2: {"rank": 3}, 3: {"bias": "all"}}


def inputs(rows):
    return {name: value for name, value in tiny_batch(rows).items() if name != "labels"}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_on_a_quantized_base_give_what_each_gives_alone(kind):
    base = quantized(kind)
    stacked, alone = StackedModel(copy.deepcopy(base), inputs(7)), {}
    stacked.add_kind("native", copy.deepcopy(base), inputs(7))
    stacked.reserve(len(ADAPTERS))
    for slot, options in ADAPTERS.items():
        alone[slot] = injected(copy.deepcopy(base), **options).eval()
        generator = torch.Generator().manual_seed(slot)
        for parameter in alone[slot].parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        contents = contents_of(alone[slot])
        stacked.check(contents)
        stacked.put(slot, "native", contents)
    assert any(is_quantized(layer) for layer in stacked._linear.values())
    tolerance = ERRORS.get(kind, 1e-5)
    for slots in ([1] * 5, [2] * 2, [3] * 12, [1, 1, 2, 3, 3, 3]):
        with torch.no_grad():
            [(rows, got)] = stacked(inputs(len(slots)), slots)
            each = [alone[slot](**inputs(len(slots))).logits[row] for row, slot in enumerate(slots)]
        assert rows == slice(0, len(slots))
        torch.testing.assert_close(got, torch.stack(each), atol=tolerance, rtol=tolerance)
