import copy

import peft
import pytest
import torch
from conftest import MODEL_TYPES, randomize, tiny_batch, tiny_classifier

from hf_lora import (
    LoRAConfig,
    head_parameters,
    inject_lora,
    lora_disabled,
    lora_layers,
    lora_parameters,
    merge_lora,
    remove_lora,
    trainable_parameter_count,
    unmerge_lora,
)


@pytest.fixture
def batch():
    return tiny_batch()


def injected(model_type="bert", **options):
    model = tiny_classifier(model_type)
    inject_lora(model, LoRAConfig(**{"rank": 4, "alpha": 6, **options}))
    randomize(model)
    return model


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_injected_model_starts_as_the_pretrained_one(model_type, batch):
    model = tiny_classifier(model_type)
    before, keys = model(**batch).logits, set(model.state_dict())
    names = inject_lora(model, LoRAConfig())
    assert torch.equal(model(**batch).logits, before)
    assert set(model.state_dict()) == keys | {f"{n}.lora_{x}" for n in names for x in "AB"}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_and_gradients_equal_pefts_with_the_same_factors(model_type, batch):
    model = injected(model_type)
    theirs = peft.get_peft_model(
        tiny_classifier(model_type),
        peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=list(lora_layers(model)),
            modules_to_save=list(_head_children(model)),
        ),
    )
    peft_parameters = dict(theirs.named_parameters())
    twins = {
        name: peft_parameters[f"base_model.model.{name.rpartition('.')[0]}.{name[-6:]}.default.weight"]
        for name in lora_parameters(model)
    }
    for name, twin in twins.items():
        twin.data.copy_(lora_parameters(model)[name].data)
    ours, expected = model(**batch), theirs(**batch)
    torch.testing.assert_close(ours.logits, expected.logits, atol=1e-6, rtol=1e-5)
    ours.loss.backward()
    expected.loss.backward()
    for name, twin in twins.items():
        torch.testing.assert_close(lora_parameters(model)[name].grad, twin.grad, atol=1e-7, rtol=1e-5)
    for name, parameter in head_parameters(model).items():
        child, _, rest = name.partition(".")
        twin = peft_parameters[f"base_model.model.{child}.modules_to_save.default.{rest}"]
        torch.testing.assert_close(parameter.grad, twin.grad, atol=1e-7, rtol=1e-5)


def _head_children(model):
    return dict.fromkeys(name.partition(".")[0] for name in head_parameters(model))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_only_adapters_and_head_get_gradients(model_type, batch):
    model = injected(model_type)
    model(**batch).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(lora_parameters(model)) | set(head_parameters(model))


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", lambda name, adapted: False),
        ("lora_only", lambda name, adapted: name.removesuffix(".bias") in adapted and name.endswith(".bias")),
        ("all", lambda name, adapted: name.endswith(".bias")),
    ],
)
def test_bias_modes_train_the_biases_they_name(bias, expected):
    model = injected(bias=bias, projections="qv")
    adapted = set(lora_layers(model))
    for name, parameter in model.named_parameters():
        if name not in lora_parameters(model) and name not in head_parameters(model):
            assert parameter.requires_grad is expected(name, adapted), name


def test_the_head_can_be_frozen():
    model = injected(train_head=False)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(lora_parameters(model))


def test_counts_are_exact():
    model = injected(projections="qv", rank=4, rank_pattern={"layer.0.attention.self.query": 2})
    count = trainable_parameter_count(model)
    # Three modules of rank 4 and one of rank 2, each rank * (32 + 32); a head of 3 x 32 weights and 3 biases.
    assert count.lora == (3 * 4 + 2) * 64
    assert count.head == 3 * 32 + 3
    assert count.trainable == count.lora + count.head
    assert count.total == sum(p.numel() for p in tiny_classifier("bert").parameters()) + count.lora
    assert str(count) == f"trainable: 995 of {count.total:,} ({100 * 995 / count.total:.2f}%)"


def test_shared_parameters_count_once():
    model = injected("albert")
    assert trainable_parameter_count(model).lora == 4 * 4 * 64


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_merge_equals_forward_and_unmerge_restores_every_bit(model_type, batch):
    model = injected(model_type)
    before, unmerged = weights(model), model(**batch).logits
    merge_lora(model)
    torch.testing.assert_close(model(**batch).logits, unmerged, atol=1e-5, rtol=1e-5)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in lora_layers(model)}
    unmerge_lora(model)
    assert_same(weights(model), before)


@pytest.mark.parametrize("form", ["module", "parametrization"])
def test_the_pretrained_weight_follows_a_merged_model_into_another_precision(form, batch):
    model, pretrained = injected(form=form), tiny_classifier()
    merge_lora(model)
    for dtype in (torch.bfloat16, torch.float64, torch.bfloat16):
        model.to(dtype)
        for name, layer in lora_layers(model).items():
            # Kept as it was, in fp32: rounded only for as long as the model is in bf16.
            expected = pretrained.get_submodule(name).weight.to(dtype)
            assert layer.base_weight.dtype == dtype and torch.equal(layer.base_weight, expected)
    with lora_disabled(model):
        pretrained.classifier.load_state_dict(model.classifier.state_dict())
        expected = pretrained.to(torch.bfloat16)(**batch).logits
        assert torch.equal(model(**batch).logits, expected)
    unmerge_lora(model)
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.base_weight, pretrained.get_submodule(name).weight), name


def test_merging_twice_and_unmerging_twice_are_errors():
    model = injected()
    with pytest.raises(ValueError, match="the model is not merged; got 8 such layers"):
        unmerge_lora(model)
    merge_lora(model)
    with pytest.raises(ValueError, match=r"the model is merged already; .*; unmerge_lora undoes it"):
        merge_lora(model)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_disabled_is_the_pretrained_encoder_and_comes_back_whole(bias, merged, batch):
    model = injected(bias=bias)
    pretrained = tiny_classifier("bert")(**batch).logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith("bias") and name not in head_parameters(model):
                parameter.add_(0.3)
    if merged:
        merge_lora(model)
    before, enabled = weights(model), model(**batch).logits
    with lora_disabled(model):
        assert torch.equal(model(**batch).logits, pretrained)
    assert not torch.allclose(enabled, pretrained)
    assert torch.equal(model(**batch).logits, enabled)
    assert_same(weights(model), before)


def test_disabled_is_undone_after_an_exception_and_nests(batch):
    model = injected()
    enabled = model(**batch).logits
    with pytest.raises(RuntimeError), lora_disabled(model):
        raise RuntimeError
    assert torch.equal(model(**batch).logits, enabled)
    with lora_disabled(model):
        with lora_disabled(model):
            inner = model(**batch).logits
        assert torch.equal(model(**batch).logits, inner)
    assert torch.equal(model(**batch).logits, enabled)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_remove_gives_back_the_pretrained_model(bias, batch):
    model = tiny_classifier("bert")
    model.classifier.weight.requires_grad_(False)
    before, required = weights(model), {n: p.requires_grad for n, p in model.named_parameters()}
    types = [type(module) for module in model.modules()]
    inject_lora(model, LoRAConfig(bias=bias))
    randomize(model)
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.bias.add_(float(bias == "all"))
    remove_lora(model)
    assert_same(weights(model), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    assert [type(module) for module in model.modules()] == types
    inject_lora(model, LoRAConfig())


def test_removing_from_a_merged_model_leaves_a_plain_fine_tuned_one(batch):
    model = injected()
    unmerged = model(**batch).logits
    merge_lora(model)
    remove_lora(model)
    assert set(model.state_dict()) == set(tiny_classifier("bert").state_dict())
    torch.testing.assert_close(model(**batch).logits, unmerged, atol=1e-5, rtol=1e-5)


def test_a_failing_injection_changes_nothing():
    model = tiny_classifier("bert")
    before = weights(model)
    with pytest.raises(ValueError, match="cannot adapt"):
        inject_lora(model, LoRAConfig(target_modules=["query", "LayerNorm"]))
    assert_same(weights(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    inject_lora(model, LoRAConfig())


def test_injecting_twice_is_an_error():
    with pytest.raises(ValueError, match="has LoRA layers already; call remove_lora"):
        inject_lora(injected(), LoRAConfig())


def test_functions_on_a_plain_model_say_what_to_call():
    for function in (merge_lora, remove_lora, lora_parameters, trainable_parameter_count):
        with pytest.raises(
            ValueError, match="has no LoRA layers; got a plain BertForSequenceClassification; call inject"
        ):
            function(tiny_classifier("bert"))


def test_patterns_change_rank_and_scaling_of_what_they_match():
    model = injected(rank=4, alpha=8, rank_pattern={"query": 2}, alpha_pattern={r"layer\.1\..*": 1})
    layers = lora_layers(model)
    for name, layer in layers.items():
        rank = 2 if name.endswith("query") else 4
        assert layer.lora_A.shape == (rank, 32) and layer.lora_B.shape == (32, rank)
        assert layer.scaling == (1 if ".layer.1." in name else 8) / rank


def test_a_copied_model_is_independent(batch):
    model = injected()
    twin = copy.deepcopy(model)
    merge_lora(twin)
    assert not any(layer.merged for layer in lora_layers(model).values())
    torch.testing.assert_close(twin(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


def test_dropout_of_lora_is_off_in_evaluation(batch):
    model = injected(dropout=0.5)
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    model.train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
