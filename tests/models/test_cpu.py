"""Attention against sdpa, and whole models with and without the quick training."""

import copy
import os

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_lora import LoRAConfig, inject_lora
from hf_lora.lora.architectures import ARCHITECTURES
from hf_lora.lora.functional import FastDropout, drop
from hf_lora.models import cpu as module
from hf_lora.models.cpu import NAME, attention, fast_training, set_threads


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


TRAINED = [name for name, entry in ARCHITECTURES.items() if not entry.reason]


def dropouts(model):
    return {type(m) for m in model.modules() if isinstance(m, nn.Dropout)}


def test_it_is_in_the_model_inside_and_gone_after():
    model = tiny_model("bert")
    with pytest.raises(RuntimeError, match="stop"), fast_training(model):
        assert dropouts(model) == {FastDropout} and model.config._attn_implementation == NAME
        raise RuntimeError("stop")
    assert dropouts(model) == {nn.Dropout} and model.config._attn_implementation == "sdpa"


def test_attention_that_was_asked_for_stays():
    model = tiny_model("bert")
    model.set_attn_implementation("eager")
    with fast_training(model):
        assert model.config._attn_implementation == "eager" and dropouts(model) == {FastDropout}
    assert model.config._attn_implementation == "eager"


def test_other_devices_are_left_alone():
    model = tiny_model("bert").to("meta")
    with fast_training(model):
        assert dropouts(model) == {nn.Dropout} and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model_type", TRAINED)
def test_the_mathematics_is_the_same(monkeypatch, model_type):
    monkeypatch.setattr(module, "_SDPA_IS_QUICKER", set())
    model = tiny_model(model_type)
    entry = ARCHITECTURES.get(model_type)
    inject_lora(
        model, LoRAConfig(rank=2, projections="".join(role for role in "qkvo" if getattr(entry, role)))
    )
    model.eval()
    inputs = tiny_inputs(model_type)
    results = []
    for fast in (False, True):
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            if parameter.requires_grad:
                torch.manual_seed(1)
                parameter.data.add_(0.05 * torch.randn_like(parameter))
        if fast:
            with fast_training(twin):
                output = twin(**inputs)
                output.loss.backward()
        else:
            output = twin(**inputs)
            output.loss.backward()
        results.append((output.logits, {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}))
    (logits, grads), (fast_logits, fast_grads) = results
    torch.testing.assert_close(fast_logits, logits, atol=1e-5, rtol=1e-5)
    assert grads.keys() == fast_grads.keys() and grads
    for name, grad in grads.items():
        torch.testing.assert_close(
            fast_grads[name], grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_threads_are_shared_among_the_processes_of_a_host():
    before = torch.get_num_threads()
    try:
        set_threads(1)
        assert torch.get_num_threads() == before
        set_threads(10**6)
        assert torch.get_num_threads() == 1
        set_threads(2)
        assert torch.get_num_threads() == max(1, len(os.sched_getaffinity(0)) // 2)
    finally:
        torch.set_num_threads(before)
