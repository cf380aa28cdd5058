import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_lora.lora.functional import drop
from hf_lora.models import cpu as module
from hf_lora.models.cpu import NAME, attention


@pytest.fixture
def layer():
    layer = nn.Module()
    layer.is_causal = False
    return layer


def inputs(dtype=torch.float64, batch=2, heads=3, tokens=5, width=4):
    generator = torch.Generator().manual_seed(0)
    # As models make them: (batch, tokens, heads, width), heads and tokens swapped.
    return tuple(
        torch.randn(batch, tokens, heads, width, generator=generator, dtype=dtype)
        .transpose(1, 2)
        .requires_grad_()
        for _ in "qkv"
    )


def masks():
    keys = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    keys[1, ..., 3:] = False
    return {
        "none": None,
        "keys": keys,
        "expanded": keys.expand(2, 1, 5, 5),
        "additive": torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    }


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_output_and_gradients_equal_sdpa(layer, mask, scaling):
    results = []
    for function in (attention, sdpa_attention_forward):
        q, k, v = inputs()
        output, _ = function(layer, q, k, v, masks()[mask], scaling=scaling)
        weights = torch.arange(output.numel(), dtype=torch.float64).reshape(output.shape)
        results.append((output, *torch.autograd.grad((output * weights).sum(), (q, k, v))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dropout_acts_on_the_probabilities(layer):
    q, k, v = inputs()
    torch.manual_seed(3)
    mask = drop(torch.ones(2, 3, 5, 5, dtype=torch.float64), 0.4)[0] / 0.6

    def by_hand(q, k, v):
        probabilities = (q @ k.transpose(2, 3) / 2).softmax(-1)
        return ((probabilities * mask) @ v).transpose(1, 2)

    torch.manual_seed(3)
    output, _ = attention(layer, q, k, v, None, dropout=0.4)
    expected = by_hand(q, k, v)
    torch.testing.assert_close(output, expected)
    got = torch.autograd.grad(output.square().sum(), (q, k, v))
    for ours, theirs in zip(got, torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_bf16_is_as_close_to_exact_as_sdpa(layer):
    exact, _ = sdpa_attention_forward(layer, *inputs(), masks()["keys"])
    errors = []
    for function in (attention, sdpa_attention_forward):
        q, k, v = (tensor.detach().bfloat16().requires_grad_() for tensor in inputs())
        output, _ = function(layer, q, k, v, masks()["keys"])
        assert output.dtype == torch.bfloat16
        errors.append((output.double() - exact).norm().item())
    assert errors[0] < 2 * errors[1]


def test_a_query_without_any_key_is_no_nan(layer):
    q, k, v = inputs()
    mask = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    output, _ = attention(layer, q, k, v, mask)
    torch.testing.assert_close(output, v.mean(2, keepdim=True).expand_as(v).transpose(1, 2))


def test_autocast_decides_the_precision(layer):
    q, k, v = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = attention(layer, q, k, v, None, dropout=0.1)
    assert output.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(output.float().sum(), v)
    assert grad.dtype == torch.float32


def test_checkpointing_draws_the_mask_again(layer):
    q, k, v = inputs()

    def loss(*tensors):
        return attention(layer, *tensors, None, dropout=0.4)[0].square().sum()

    torch.manual_seed(5)
    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    torch.manual_seed(5)
    got = torch.autograd.grad(checkpoint(loss, q, k, v, use_reentrant=False), (q, k, v))
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize(
    "case",
    ["without gradients", "fp32 without dropout", "grouped heads", "causal", "position bias"],
)
def test_what_it_is_not_made_for_goes_to_sdpa(monkeypatch, layer, case):
    calls = []
    monkeypatch.setattr(
        module, "sdpa_attention_forward", lambda *given, **more: calls.append(more) or ("theirs", None)
    )
    q, k, v = inputs(torch.float32)
    options = {"dropout": 0.0 if case == "fp32 without dropout" else 0.1}
    if case == "grouped heads":
        k, v = k[:, :1], v[:, :1]
    if case == "causal":
        layer.is_causal = True
    if case == "position bias":
        options["position_bias"] = torch.zeros(2, 3, 5, 5)
    with torch.set_grad_enabled(case != "without gradients"):
        output, _ = attention(layer, q, k, v, None, **options)
    assert output == "theirs" and len(calls) == 1
    assert ("position_bias" in calls[0]) is (case == "position bias")


def test_it_is_registered():
    assert AttentionInterface().get_interface(NAME, None) is attention
