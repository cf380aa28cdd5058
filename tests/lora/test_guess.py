import pytest
from conftest import tiny_batch, tiny_classifier
from torch import nn

from hf_lora import LoRAConfig, inject_lora, lora_layers
from hf_lora.lora.architectures import ARCHITECTURES, separate
from hf_lora.lora.targets import guess

OFFERED = ["self.query", "self.key", "self.value", "attention.output.dense"]


def unknown(model_type="bert"):
    model = tiny_classifier(model_type)
    model.config.model_type = "brand-new"
    return model


def test_an_unknown_model_type_gets_a_guess_in_the_error_and_is_not_touched():
    model = unknown()
    with pytest.raises(ValueError, match="the projections of model type 'brand-new' are not known") as error:
        inject_lora(model, LoRAConfig())
    assert "q=self.query, k=self.key, v=self.value, o=attention.output.dense" in str(error.value)
    assert f"target_modules={OFFERED}" in str(error.value)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_the_guess_can_be_used_as_it_is_offered():
    model = unknown()
    names = inject_lora(model, LoRAConfig(target_modules=OFFERED))
    model.config.model_type, twin = "bert", tiny_classifier("bert")
    assert names == inject_lora(twin, LoRAConfig(projections="qkvo"))


def test_a_users_own_entry_works_like_any_other():
    model = unknown("distilbert")
    ARCHITECTURES.register("brand-new", separate("attention", "q_lin", "k_lin", "v_lin", "attention.out_lin"))
    try:
        inject_lora(model, LoRAConfig(projections="qo"))
    finally:
        del ARCHITECTURES._entries["brand-new"]
    assert {name.rpartition(".")[2] for name in lora_layers(model)} == {"q_lin", "out_lin"}
    model(**tiny_batch())


def test_nothing_that_looks_like_attention_says_so():
    assert "nothing in it looks like an attention" in guess(nn.Sequential(nn.Linear(2, 2)))
