"""Variants, scalings, initializations and fused parts, on whole models and against peft."""

import peft
import pytest
import torch
from conftest import randomize, tiny_batch, tiny_classifier
from safetensors.torch import load_file
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lora import (
    LoRAConfig,
    inject_lora,
    load_adapter,
    lora_disabled,
    lora_layers,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from hf_lora.adapters.directory import read_adapter
from hf_lora.lora.config import VARIANTS
from hf_lora.lora.initializers import INITIALIZERS

CORRECTED = [name for name, entry in INITIALIZERS.items() if entry.corrected]
FORMS = ["module", "parametrization"]


def injected(std=0.2, **options):
    model = tiny_classifier("bert")
    torch.manual_seed(3)
    inject_lora(model, LoRAConfig(**{"rank": 4, "alpha": 6, **options}))
    if std:
        perturb(model, std)
    return model


def perturb(model, std=0.2):
    """Move every trained factor, as training does, from wherever it started."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for parameter in layer.trained_factors().values():
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("init", list(INITIALIZERS))
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_combination_starts_as_the_pretrained_model(variant, init, form):
    model = injected(std=0, variant=variant, init=init, form=form)
    expected = tiny_classifier("bert")(**tiny_batch()).logits
    torch.testing.assert_close(model(**tiny_batch()).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("init", ["kaiming", *CORRECTED])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_merge_disable_save_and_load_agree_with_forward(variant, init, form, tmp_path):
    model = injected(variant=variant, init=init, form=form)
    logits, before = model(**tiny_batch()).logits, {n: t.clone() for n, t in model.state_dict().items()}
    pretrained = tiny_classifier("bert")(**tiny_batch()).logits
    assert (logits - pretrained).abs().max() > 1e-4
    with lora_disabled(model):
        assert torch.equal(model(**tiny_batch()).logits, pretrained)
    merge_lora(model)
    torch.testing.assert_close(model(**tiny_batch()).logits, logits, atol=1e-5, rtol=1e-5)
    unmerge_lora(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    twin = tiny_classifier("bert")
    config = load_adapter(twin, save_adapter(model, tmp_path / "a"))
    assert config == LoRAConfig(rank=4, alpha=6, variant=variant, init=init, form=form)
    torch.testing.assert_close(twin(**tiny_batch()).logits, logits, atol=1e-6, rtol=1e-6)
    theirs = peft.PeftModel.from_pretrained(tiny_classifier("bert"), tmp_path / "a").eval()
    torch.testing.assert_close(theirs(**tiny_batch()).logits, logits, atol=1e-5, rtol=1e-5)
    remove_lora(model)
    assert torch.equal(model(**tiny_batch()).logits, pretrained)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_variant_trains_the_factors_it_says(variant):
    model = injected(variant=variant)
    model(**tiny_batch()).loss.backward()
    layers = lora_layers(model).items()
    wanted = {f"{name}.{factor}" for name, layer in layers for factor in VARIANTS.get(variant).trained}
    got = {name for name, parameter in lora_parameters(model).items() if parameter.grad is not None}
    assert got == wanted
    assert {name for name, p in lora_parameters(model).items() if p.requires_grad} == wanted


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_dora_gives_pefts_logits_and_gradients(scaling, bias, tmp_path):
    model = injected(variant="dora", scaling=scaling, bias=bias)
    save_adapter(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny_classifier("bert"), tmp_path / "a", is_trainable=True).eval()
    ours, expected = model(**tiny_batch()), theirs(**tiny_batch())
    torch.testing.assert_close(ours.logits, expected.logits, atol=1e-6, rtol=1e-5)
    ours.loss.backward()
    expected.loss.backward()
    for name, layer in lora_layers(model).items():
        twin = theirs.base_model.model.get_submodule(name)
        for factor, tensor in (
            (layer.lora_A, twin.lora_A["default"].weight),
            (layer.lora_B, twin.lora_B["default"].weight),
            (layer.lora_magnitude, twin.lora_magnitude_vector["default"].weight),
        ):
            torch.testing.assert_close(factor.grad, tensor.grad, atol=1e-7, rtol=1e-4)


def test_dora_is_the_papers_equation_5():
    model = injected(variant="dora")
    layer = lora_layers(model)["bert.encoder.layer.0.attention.self.query"]
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    moved = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    by_hand = (layer.lora_magnitude / moved.norm(dim=1))[:, None] * moved
    torch.testing.assert_close(layer(x), x @ by_hand.T + layer.bias)
    torch.testing.assert_close(layer.effective_weight(), by_hand)


def test_dora_with_dropout_acts_in_training_only():
    model = injected(variant="dora", dropout=0.5)
    assert torch.equal(model(**tiny_batch()).logits, model(**tiny_batch()).logits)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert not torch.equal(model(**tiny_batch()).logits, model(**tiny_batch()).logits)


def test_rslora_scales_by_the_root_of_the_rank():
    layer = next(iter(lora_layers(injected(scaling="rslora", rank=4, alpha=6)).values()))
    assert layer.scaling == 3.0


@pytest.mark.parametrize("init", CORRECTED)
def test_a_corrected_start_leaves_the_base_alone_and_doubles_the_rank_in_peft(init, tmp_path):
    model = injected(init=init, std=0)
    plain = tiny_classifier("bert").state_dict()
    assert all(
        torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items() if name in plain
    )
    assert all(layer.lora_B.abs().max() > 0 for layer in lora_layers(model).values())
    perturb(model)
    files = read_adapter(save_adapter(model, tmp_path / "a"))
    assert files.peft_config["r"] == 8 and files.peft_config["lora_alpha"] == 12
    assert files.peft_config["init_lora_weights"] is True
    twin = tiny_classifier("bert")
    load_adapter(twin, tmp_path / "a")
    for name, layer in lora_layers(model).items():
        for own, loaded in zip(layer.start, lora_layers(twin)[name].start, strict=True):
            assert torch.equal(own, loaded)


@pytest.mark.parametrize("init", CORRECTED)
def test_a_corrected_start_trains_as_peft_does_on_a_changed_base(init):
    """peft subtracts the start from the weight; ours keeps the weight and subtracts it in the forward."""
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    theirs = nn.Sequential(nn.Linear(6, 8))
    theirs[0].weight.data.copy_(weight)
    wrapped = peft.get_peft_model(
        theirs, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=init)
    )
    ours = nn.Sequential(nn.Linear(6, 8))
    ours.load_state_dict({"0.weight": weight, "0.bias": wrapped.base_model.model[0].base_layer.bias.detach()})
    inject_lora(ours, LoRAConfig(rank=2, alpha=3, init=init, target_modules=["0"]))
    twin = wrapped.base_model.model[0]
    torch.testing.assert_close(
        ours[0].lora_B @ ours[0].lora_A, twin.lora_B["default"].weight @ twin.lora_A["default"].weight
    )
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(x), wrapped(x), atol=1e-5, rtol=1e-5)


def fused(parts_of="qv", std=0.2, **options):
    model = tiny_classifier("gpt2", n_embd=32, n_layer=2, n_head=4, pad_token_id=0)
    inject_lora(model, LoRAConfig(**{"rank": 2, "alpha": 3, "projections": parts_of, **options}))
    if std:
        perturb(model, std)
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("roles", ["q", "v", "qv", "qkv"])
def test_only_the_chosen_slices_of_a_fused_weight_change(roles, form):
    model = fused(roles, form=form)
    for layer in lora_layers(model).values():
        delta = layer.delta_weight()
        assert delta.shape == (32, 96)  # Conv1D: (in, out), out being q | k | v
        for index, role in enumerate("qkv"):
            block = delta[:, 32 * index : 32 * (index + 1)]
            assert (block.abs().max() > 0) == (role in roles)
        for index, _ in enumerate(roles):
            lora_A = layer.lora_A[2 * index : 2 * index + 2]
            lora_B = layer.lora_B[32 * index : 32 * index + 32]
            start = 32 * "qkv".index(roles[index])
            torch.testing.assert_close(delta[:, start : start + 32], 1.5 * (lora_B @ lora_A).T)


def test_a_fused_update_is_one_of_the_summed_rank_in_peft(tmp_path):
    model = fused("qv")
    files = read_adapter(save_adapter(model, tmp_path / "a"))
    assert (files.peft_config["r"], files.peft_config["lora_alpha"]) == (4, 6)
    lora_B = files.tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    assert lora_B.shape == (96, 4)
    assert not lora_B[32:64].any() and not lora_B[:32, 2:].any() and not lora_B[64:, :2].any()


def test_values_outside_the_blocks_are_refused(tmp_path):
    model = fused("qv")
    layer = next(iter(lora_layers(model).values()))
    tensors = {
        key: tensor.clone()
        for key, tensor in layer.to_peft({n: getattr(layer, n) for n in ("lora_A", "lora_B")}).items()
    }
    tensors["lora_B.weight"] = tensors["lora_B.weight"].detach().clone()
    tensors["lora_B.weight"][40, 0] = 1.0
    with pytest.raises(ValueError, match="got values outside its block"):
        layer.load_peft(tensors)


def test_dora_on_a_part_of_a_fused_weight_is_refused_and_nothing_changes():
    model = tiny_classifier("gpt2", n_embd=32, n_layer=2, n_head=4, pad_token_id=0)
    with pytest.raises(ValueError, match="variant='dora' cannot adapt a part of a fused weight"):
        inject_lora(model, LoRAConfig(projections="qv", variant="dora"))
    assert type(model.transformer.h[0].attn.c_attn) is Conv1D
    inject_lora(model, LoRAConfig(projections="qkv", variant="dora"))


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_mixed_scalings_of_fused_and_plain_modules_reach_peft(variant, tmp_path):
    model = fused("qkvo", variant=variant, scaling="rslora", alpha_pattern={"c_proj": 5.0})
    save_adapter(model, tmp_path / "a")
    inputs = {k: v for k, v in tiny_batch().items() if k != "labels"}
    plain = tiny_classifier("gpt2", n_embd=32, n_layer=2, n_head=4, pad_token_id=0)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    torch.testing.assert_close(theirs(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_embeddings_of_peft_load_here(tmp_path):
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["word_embeddings", "query"], task_type="SEQ_CLS"
    )
    theirs = peft.get_peft_model(tiny_classifier("bert"), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path / "a")
    model = tiny_classifier("bert")
    load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(
        model(**tiny_batch()).logits, theirs(**tiny_batch()).logits, atol=1e-5, rtol=1e-5
    )
    randomize(model)
    save_adapter(model, tmp_path / "b")
    again = peft.PeftModel.from_pretrained(tiny_classifier("bert"), tmp_path / "b").eval()
    torch.testing.assert_close(
        again(**tiny_batch()).logits, model(**tiny_batch()).logits, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layer\.1\..*(query|dense)"},
        {"target_modules": ["query", "key"], "exclude_modules": r".*layer\.0.*"},
        {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"},
        {"rank_pattern": {"query": 2}, "alpha_pattern": {r"layer\.1\..*": 5}},
        {"bias": "all"},
        {"bias": "lora_only", "use_dora": True},
        {"modules_to_save": ["pooler", "LayerNorm"]},
        {"modules_to_save": ["word_embeddings"]},
    ],
    ids=str,
)
def test_adapters_that_peft_writes_load_with_the_same_logits(options, tmp_path):
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "task_type": "SEQ_CLS", "target_modules": ["query", "value"], **options}
    )
    theirs = peft.get_peft_model(tiny_classifier("bert"), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path / "a")
    model = tiny_classifier("bert")
    load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(
        model(**tiny_batch()).logits, theirs(**tiny_batch()).logits, atol=1e-5, rtol=1e-5
    )
    save_adapter(model, tmp_path / "b")
    again = peft.PeftModel.from_pretrained(tiny_classifier("bert"), tmp_path / "b").eval()
    torch.testing.assert_close(
        again(**tiny_batch()).logits, model(**tiny_batch()).logits, atol=1e-5, rtol=1e-5
    )


CONVOLUTIONS = {
    "squeezebert": {"projections": "qkvo"},
    "vit": {"target_modules": ["patch_embeddings.projection", "q_proj"]},
}


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("init", CORRECTED)
@pytest.mark.parametrize("model_type", CONVOLUTIONS)
def test_a_corrected_start_of_a_convolution_reloads_equal_here_and_in_peft(
    model_type, init, variant, tmp_path
):
    model, inputs = tiny_model(model_type), tiny_inputs(model_type)
    config = LoRAConfig(rank=4, alpha=6, init=init, variant=variant, **CONVOLUTIONS[model_type])
    inject_lora(model, config)
    perturb(model)
    directory, logits = save_adapter(model, tmp_path / "a"), model(**inputs).logits
    twin = tiny_model(model_type)
    load_adapter(twin, directory)
    assert torch.equal(twin(**inputs).logits, logits)
    for name, layer in lora_layers(model).items():
        loaded = lora_layers(twin)[name]
        for own, other in zip(
            (*layer.factors(), *layer.start), (*loaded.factors(), *loaded.start), strict=True
        ):
            assert torch.equal(own, other)
    tensors = load_file(save_adapter(twin, tmp_path / "b") / "adapter_model.safetensors")
    assert all(
        torch.equal(tensors[key], t) for key, t in load_file(directory / "adapter_model.safetensors").items()
    )
    theirs = peft.PeftModel.from_pretrained(tiny_model(model_type), directory).eval()
    torch.testing.assert_close(theirs(**inputs).logits, logits, atol=1e-5, rtol=1e-5)


def test_dora_on_embeddings_is_pefts_in_both_directions(tmp_path):
    options = {"target_modules": ["word_embeddings", "query"]}
    model = injected(variant="dora", **options)
    logits = model(**tiny_batch()).logits
    table = lora_layers(model)["bert.embeddings.word_embeddings"]
    moved = table.base_weight + table.delta_weight()
    expected = table.lora_magnitude / moved.norm(dim=0) * moved
    torch.testing.assert_close(table.effective_weight(), expected)
    theirs = peft.PeftModel.from_pretrained(tiny_classifier(), save_adapter(model, tmp_path / "a")).eval()
    torch.testing.assert_close(theirs(**tiny_batch()).logits, logits, atol=1e-5, rtol=1e-5)
    made = peft.LoraConfig(r=2, lora_alpha=3, task_type="SEQ_CLS", use_dora=True, **options)
    theirs = peft.get_peft_model(tiny_classifier(), made).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    theirs.save_pretrained(tmp_path / "theirs")
    twin = tiny_classifier()
    load_adapter(twin, tmp_path / "theirs")
    torch.testing.assert_close(
        twin(**tiny_batch()).logits, theirs(**tiny_batch()).logits, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("init", ["kaiming", "orthogonal", *CORRECTED])
def test_autocast_around_injection_and_merge_changes_no_bit(init, variant, form):
    merged = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model = injected(init=init, variant=variant, form=form)
            merge_lora(model)
        merged.append(model.state_dict())
    for name, tensor in merged[0].items():
        assert torch.equal(merged[1][name], tensor) and merged[1][name].dtype == torch.float32, name
