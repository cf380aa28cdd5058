import copy

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from torch import nn

from hf_lora import LoRAConfig, inject_lora
from hf_lora.models.first_token import first_token_only

READ_FIRST = (
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "electra",
    "ernie",
    "deberta",
    "deberta-v2",
    "rembert",
)
READ_OTHERS = ("distilbert", "mpnet", "albert", "xlnet", "gpt2", "llama", "t5", "bart", "vit")


def gradients(model, inputs):
    twin = copy.deepcopy(model)
    output = twin(**inputs)
    output.loss.backward()
    return output.logits.detach(), {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_type", READ_FIRST)
def test_logits_and_gradients_stay_the_same_for_less_work(model_type):
    model = tiny_model(model_type)
    inject_lora(model, LoRAConfig(rank=2))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    inputs = tiny_inputs(model_type)
    logits, expected = gradients(model, inputs)
    with first_token_only(model) as name:
        assert name is not None
        shapes = []
        hook = model.get_submodule(name).register_forward_hook(lambda *given: shapes.append(given[-1].shape))
        short_logits, got = gradients(model, inputs)
        model(**inputs)
        hook.remove()
    assert shapes[-1][1] == 1
    torch.testing.assert_close(short_logits, logits, atol=1e-5, rtol=1e-5)
    assert got.keys() == expected.keys() and len(got) > 8
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", READ_OTHERS)
def test_other_models_are_left_alone(model_type):
    model = tiny_model(model_type)
    hooks = {n: len(m._forward_pre_hooks) for n, m in model.named_modules()}
    with first_token_only(model) as name:
        assert name is None
        assert {n: len(m._forward_pre_hooks) for n, m in model.named_modules()} == hooks


class _Reads(nn.Module):
    """A BERT whose classifier is given something else than the first token."""

    def __init__(self, reader):
        super().__init__()
        self.model, self.reader = tiny_model("bert"), reader
        self.config = self.model.config

    def forward(self, input_ids, attention_mask):
        states = self.model.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return {"logits": self.model.classifier(self.reader(states))}


@pytest.mark.parametrize(
    ("reader", "cut"),
    [
        (lambda states: states[:, 0], True),
        (lambda states: states[:, 1], False),
        (lambda states: states[:, -1], False),
        (lambda states: states.mean(1), False),
        (lambda states: states[:, :2].mean(1), False),
    ],
    ids=["first", "second", "last", "mean", "first two"],
)
def test_what_the_classifier_reads_decides(reader, cut):
    with first_token_only(_Reads(reader).eval()) as name:
        assert (name is not None) is cut


def test_it_is_gone_after_an_error_and_modes_are_as_before():
    model = tiny_model("bert").train()
    model.bert.pooler.eval()
    with pytest.raises(RuntimeError, match="stop"), first_token_only(model):
        assert model.training and not model.bert.pooler.training
        raise RuntimeError("stop")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_random_state_is_not_touched():
    model = tiny_model("bert")
    state = torch.get_rng_state()
    with first_token_only(model):
        pass
    assert torch.equal(torch.get_rng_state(), state)
