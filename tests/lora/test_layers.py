import copy

import pytest
import torch
from torch import nn

from hf_lora.lora.config import VARIANTS
from hf_lora.lora.initializers import INITIALIZERS
from hf_lora.lora.layer import LoRALayer, UpdateSpec
from hf_lora.lora.linear import LAYER_TYPES, LoRALinear


def adapted(base: nn.Linear, **overrides) -> LoRALinear:
    options = {
        "rank": 2,
        "scaling": 0.5,
        "dropout": 0.0,
        "initialization": INITIALIZERS.get("kaiming"),
        "variant": VARIANTS.get("lora"),
        **overrides,
    }
    return LoRALinear.attach(base, UpdateSpec(**options))


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = adapted(nn.Linear(6, 4)).eval()
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.fixture
def x():
    return torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))


def test_the_layer_is_adapted_where_it_stands():
    base = nn.Linear(6, 4)
    weight, bias, keys = base.weight, base.bias, set(base.state_dict())
    layer = adapted(base)
    assert layer is base and isinstance(layer, nn.Linear) and isinstance(layer, LoRALayer)
    assert layer.weight is weight and layer.bias is bias
    assert set(layer.state_dict()) == keys | {"lora_A", "lora_B"}
    assert (layer.in_features, layer.out_features) == (6, 4)


def test_attaching_changes_no_output(x):
    base = nn.Linear(6, 4)
    before = base(x)
    assert torch.equal(adapted(base)(x), before)


def test_forward_is_base_plus_scaled_update(layer, x):
    expected = x @ layer.weight.T + layer.bias + 0.5 * (x @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(layer(x), expected)


def test_detach_gives_back_the_plain_layer(layer, x):
    keys = {"weight", "bias"}
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    layer.detach()
    assert type(layer) is nn.Linear and set(layer.state_dict()) == keys and not hasattr(layer, "scaling")
    assert torch.equal(layer(x), expected)


def test_hooks_and_copies_survive(layer, x):
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)) and len(calls) == 2
    assert twin.lora_A is not layer.lora_A


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_equals_forward_and_unmerge_is_bit_identical(layer, x, dtype):
    layer.weight.data, layer.bias.data, x = (
        layer.weight.data.to(dtype),
        layer.bias.data.to(dtype),
        x.to(dtype),
    )
    original = layer.weight.detach().clone()
    unmerged = layer(x)
    layer.merge()
    tolerance = {torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(layer(x), unmerged, atol=tolerance, rtol=tolerance)
    assert layer.merged and not torch.equal(layer.weight, original)
    assert torch.equal(layer.base_weight, original)
    layer.unmerge()
    assert torch.equal(layer.weight, original) and not layer.merged
    assert torch.equal(layer(x), unmerged)


def test_merging_uses_the_scaling(layer):
    original = layer.weight.detach().clone()
    layer.merge()
    torch.testing.assert_close(layer.weight, original + 0.5 * layer.lora_B @ layer.lora_A)


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_is_the_base_layer(layer, x, merged):
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    if merged:
        layer.merge()
    layer.enabled = False
    assert torch.equal(layer(x), expected)


def test_dropout_acts_in_training_only(x):
    layer = adapted(nn.Linear(6, 4), dropout=0.9)
    nn.init.normal_(layer.lora_B)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_factors_are_fp32_at_least(dtype):
    layer = adapted(nn.Linear(6, 4, dtype=dtype))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.lora_A.dtype == layer.lora_B.dtype == expected


def test_every_layer_type_is_a_subclass_of_the_layer_it_adapts():
    for base, layer_type in LAYER_TYPES.items():
        assert issubclass(layer_type, base) and layer_type.base_type is base
