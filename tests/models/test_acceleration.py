import copy
import os

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from torch import nn

from hf_lora import LoRAConfig, inject_lora
from hf_lora.lora.architectures import ARCHITECTURES
from hf_lora.lora.functional import FastDropout
from hf_lora.models import cpu as attention
from hf_lora.models.cpu import fast_training, set_threads

TRAINED = [name for name, entry in ARCHITECTURES.items() if not entry.reason]


def dropouts(model):
    return {type(m) for m in model.modules() if isinstance(m, nn.Dropout)}


def test_it_is_in_the_model_inside_and_gone_after():
    model = tiny_model("bert")
    with pytest.raises(RuntimeError, match="stop"), fast_training(model):
        assert dropouts(model) == {FastDropout} and model.config._attn_implementation == attention.NAME
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
    monkeypatch.setattr(attention, "_is_quicker", lambda dtype, dropout: True)
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
