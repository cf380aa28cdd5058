import pytest
import torch
from conftest import tiny_classifier
from tiny_models import tiny_inputs, tiny_model
from torch import nn

from hf_lora.lora.head import base_prefix, belongs_to, cast_inputs, find_head, fresh_modules

HEADS = {
    "bert": {"classifier"},
    "roberta": {"classifier"},
    "distilbert": {"pre_classifier", "classifier"},
    "electra": {"classifier"},
    "deberta-v2": {"pooler", "classifier"},
}


@pytest.mark.parametrize(("model_type", "expected"), HEADS.items())
def test_the_head_is_every_parameterised_child_outside_the_encoder(model_type, expected):
    assert set(find_head(tiny_classifier(model_type))) == expected


def test_a_bare_encoder_or_module_has_no_head():
    assert find_head(tiny_classifier("bert").bert) == ()
    assert find_head(nn.Sequential(nn.Linear(2, 2))) == ()
    assert base_prefix(tiny_classifier("bert")) == "bert"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("classifier", True),
        ("classifier.dense.weight", True),
        ("pre_classifier.weight", False),
        ("bert", False),
    ],
)
def test_names_belong_by_whole_parts(name, expected):
    assert belongs_to(name, ["classifier"]) is expected


def test_a_fresh_pooler_is_part_of_the_head():
    model = tiny_classifier("bert")
    missing = ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]
    assert fresh_modules(model, missing) == ("bert.pooler",)
    assert fresh_modules(model, ["classifier.weight"]) == ()


def test_a_partly_loaded_parent_is_not_taken_whole():
    model = tiny_classifier("bert")
    missing = ["bert.encoder.layer.0.attention.output.LayerNorm.weight"]
    assert fresh_modules(model, missing) == ("bert.encoder.layer.0.attention.output.LayerNorm",)


def test_a_checkpoint_of_another_model_is_refused():
    model = tiny_classifier("bert")
    missing = [name for name, _ in model.named_parameters() if ".encoder." in name]
    with pytest.raises(
        ValueError, match=r"does not fit the model; got no weights for 32 of 39 encoder tensors"
    ):
        fresh_modules(model, missing)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_head_in_fp32_takes_the_outputs_of_a_bf16_encoder(autocast):
    model = tiny_model("roberta")
    exact = model(**tiny_inputs("roberta")).logits
    model.to(torch.bfloat16)
    head = find_head(model)
    for name in head:
        model.get_submodule(name).float()
    cast_inputs(model, ["classifier.dense", "classifier.out_proj"])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(**tiny_inputs("roberta")).logits
    assert logits.dtype == (torch.bfloat16 if autocast else torch.float32)
    torch.testing.assert_close(logits.float(), exact, atol=0.03, rtol=0.03)


def test_inputs_of_the_right_type_are_not_touched():
    model = tiny_model("bert")
    expected = model(**tiny_inputs("bert")).logits
    cast_inputs(model, ["classifier"])
    assert torch.equal(model(**tiny_inputs("bert")).logits, expected)


def test_casting_the_inputs_again_adds_nothing():
    model = tiny_model("bert")
    for _ in range(2):
        cast_inputs(model, ["classifier"])
    assert len(model.classifier._forward_pre_hooks) == 1
