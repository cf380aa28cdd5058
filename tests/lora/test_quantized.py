"""Half-precision bases everywhere; bitsandbytes and torchao where they are installed (no requirement of ours)."""

import copy
import subprocess
import sys

import pytest
import torch
from conftest import tiny_batch, tiny_classifier
from helpers_quantized import ERRORS, KINDS, dense_twin, injected, quantized, torchao_with
from torch import nn

from hf_lora import (
    LoRAConfig,
    inject_lora,
    lora_disabled,
    lora_layers,
    lora_parameters,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from hf_lora.lora.inject import base_parameters
from hf_lora.lora.quantized import QuantizedLoRA, dequantized, is_quantized, layer_type_of, prepare_quantized
from hf_lora.models.fingerprint import fingerprint
from hf_lora.models.verify import probe_batch, verify_injection

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("form", ["module", "parametrization"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_half_precision_base_computes_as_fp32_arithmetic_does(dtype, form):
    """Against the same rounded weights in fp32: what is left are the roundings of the activations."""
    half = injected(tiny_classifier().to(dtype), form=form)
    full = injected(tiny_classifier().to(dtype).float(), form=form)
    assert all(parameter.dtype == torch.float32 for parameter in lora_parameters(half).values())
    batch, tolerance = tiny_batch(), TOLERANCE[dtype]
    ours, expected = half(**batch), full(**batch)
    assert ours.logits.dtype == dtype
    torch.testing.assert_close(ours.logits.float(), expected.logits, atol=tolerance, rtol=tolerance)
    ours.loss.backward()
    expected.loss.backward()
    for name, parameter in lora_parameters(half).items():
        wanted = lora_parameters(full)[name].grad
        assert parameter.grad.dtype == torch.float32
        error = torch.linalg.vector_norm(parameter.grad - wanted) / torch.linalg.vector_norm(wanted)
        assert error < 8 * tolerance, (name, error)


@pytest.mark.parametrize("form", ["module", "parametrization"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_merging_into_a_half_precision_base_rounds_once(dtype, form):
    model = injected(tiny_classifier().to(dtype), form=form)
    layers, batch = lora_layers(model), tiny_batch()
    originals = {name: layer.base_weight.clone() for name, layer in layers.items()}
    unmerged = model(**batch).logits
    merge_lora(model)
    for name, layer in layers.items():
        update = 1.5 * (layer.lora_B @ layer.lora_A)
        assert torch.equal(layer.frozen_weight, (originals[name].float() + update).to(dtype))
    merged = model(**batch).logits
    torch.testing.assert_close(merged, unmerged, atol=2 * TOLERANCE[dtype], rtol=2 * TOLERANCE[dtype])
    unmerge_lora(model)
    assert all(torch.equal(layer.frozen_weight, originals[name]) for name, layer in layers.items())
    assert torch.equal(model(**batch).logits, unmerged)


@pytest.mark.slow
def test_the_package_imports_neither_library():
    code = (
        "import hf_lora.lora.quantized, hf_lora.lora.inject, sys; from torch import nn; "
        "before = set(sys.modules); hf_lora.lora.quantized.layer_type_of(nn.Linear(2, 2)); "
        "hf_lora.lora.quantized.prepare_quantized(nn.Linear(2, 2)); print(sorted(set(sys.modules) - before))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_plain_layers_have_their_plain_types():
    assert layer_type_of(nn.Linear(2, 2)).__name__ == "LoRALinear"
    assert layer_type_of(nn.LayerNorm(2)) is None and not is_quantized(nn.Linear(2, 2))


kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_a_quantized_layer_is_adapted_where_it_stands(kind):
    torch.manual_seed(0)
    layer = KINDS[kind](nn.Linear(64, 32)).eval()
    prepare_quantized(layer)
    weight, base_type, keys = layer.weight, type(layer), set(layer.state_dict())
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        before = layer(x)
    holder = nn.Sequential(layer)
    inject_lora(holder, LoRAConfig(target_modules=("0",), rank=2), head=())
    assert isinstance(layer, QuantizedLoRA) and isinstance(layer, base_type) and layer.weight is weight
    with torch.no_grad():
        assert torch.equal(layer(x), before)
    remove_lora(holder)
    assert type(layer) is base_type and set(layer.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(layer(x), before)


@kinds
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_those_of_the_dequantized_model(kind, training):
    model = quantized(kind)
    twin = injected(dense_twin(model))
    injected(model)
    assert all(isinstance(layer, QuantizedLoRA) for layer in lora_layers(model).values())
    for module in (model, twin):
        module.train(training)
        for part in module.modules():
            part.p = 0.0 if isinstance(part, nn.Dropout) else getattr(part, "p", None)
    tolerance = ERRORS.get(kind, 1e-4)
    ours, expected = model(**tiny_batch()), twin(**tiny_batch())
    torch.testing.assert_close(ours.logits, expected.logits, atol=tolerance, rtol=tolerance)
    ours.loss.backward()
    expected.loss.backward()
    for name, parameter in lora_parameters(model).items():
        wanted = lora_parameters(twin)[name].grad
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        error = torch.linalg.vector_norm(parameter.grad - wanted) / torch.linalg.vector_norm(wanted)
        assert error < 5 * tolerance, (name, error)


@kinds
def test_base_weight_is_the_dequantized_one_before_and_after_the_first_forward(kind):
    model = injected(quantized(kind), init="kaiming")
    before = {name: layer.base_weight for name, layer in lora_layers(model).items()}
    model(**tiny_batch())
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.base_weight, before[name]) and layer.base_weight.shape == (32, 32)


@kinds
def test_the_dequantized_weight_is_near_the_original(kind):
    torch.manual_seed(0)
    linear = nn.Linear(256, 256)
    original = linear.weight.detach().clone()
    error = dequantized(KINDS[kind](linear)).float() - original
    assert torch.linalg.vector_norm(error) < 0.2 * torch.linalg.vector_norm(original)


@kinds
def test_merging_is_refused_and_changes_nothing(kind):
    model = injected(quantized(kind))
    before = model(**tiny_batch()).logits
    with pytest.raises(
        ValueError, match=r"cannot merge into a quantized .*; load the base without quantization"
    ):
        merge_lora(model)
    assert torch.equal(model(**tiny_batch()).logits, before)


@kinds
def test_disabled_is_the_quantized_model(kind):
    model = quantized(kind)
    before = model(**tiny_batch()).logits
    injected(model)
    assert not torch.equal(model(**tiny_batch()).logits, before)
    with lora_disabled(model):
        assert torch.equal(model(**tiny_batch()).logits, before)


@kinds
def test_the_fingerprint_is_that_of_the_base(kind):
    one, other = injected(quantized(kind)), injected(quantized(kind))
    digest = fingerprint(base_parameters(one))
    one(**tiny_batch())
    assert fingerprint(base_parameters(one)) == digest == fingerprint(base_parameters(other))
    different = tiny_classifier()
    different.bert.encoder.layer[1].output.dense.weight.data.mul_(1.5).add_(0.01)
    assert fingerprint(base_parameters(injected(quantized(kind, different)))) != digest


@kinds
def test_training_goes_on_after_an_evaluation(kind):
    """bitsandbytes packs 4-bit weights at the first evaluation on some CPUs, in a layout without a backward."""
    model = injected(quantized(kind))
    with torch.no_grad():
        model.eval()(**tiny_batch())
    report = verify_injection(model, probe_batch(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(10):
        loss = model.train()(**tiny_batch()).loss
        loss.backward()
        assert all(p.grad is not None for p in lora_parameters(model).values())
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            losses.append(model.eval()(**tiny_batch()).loss.item())
    assert losses[-1] < losses[0] and report.layers == len(lora_layers(model))


@kinds
def test_initializations_see_the_dequantized_weight(kind):
    layer = KINDS[kind](nn.Linear(32, 16))
    weight = dequantized(layer).float()
    seen = []

    class Initialization:
        corrected = False

        def make(self, matrix, rank, scaling):
            seen.append(matrix)
            return torch.zeros(rank, 32), torch.zeros(16, rank)

    from hf_lora.lora.config import VARIANTS
    from hf_lora.lora.layer import UpdateSpec

    spec = UpdateSpec(2, 1.0, 0.0, Initialization(), VARIANTS.get("lora"))
    twin = copy.deepcopy(layer)
    layer_type_of(twin).attach(twin, spec)
    assert torch.equal(seen[0].float(), weight)


@kinds
def test_dora_and_the_weight_space_form_are_refused(kind):
    model = quantized(kind)
    with pytest.raises(ValueError, match="variant='dora' cannot adapt a quantized layer"):
        inject_lora(model, LoRAConfig(variant="dora"))
    with pytest.raises(ValueError, match="cannot adapt"):
        inject_lora(model, LoRAConfig(form="parametrization"))
    assert type(model.bert.encoder.layer[0].attention.self.query).__name__ in (
        "Linear",
        "Linear8bitLt",
        "Linear4bit",
    )
    injected(model)


@kinds
def test_a_quantized_head_is_refused(kind):
    model = quantized(kind, skip="nothing")
    with pytest.raises(ValueError, match=r"cannot train a quantized head; got a quantized 'classifier'"):
        inject_lora(model, LoRAConfig())


@pytest.mark.parametrize(
    "name", ["Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"]
)
def test_a_quantization_that_stops_gradients_is_refused(name):
    holder = nn.Sequential(torchao_with(name)(nn.Linear(32, 32)))
    with pytest.raises(ValueError, match="cannot train through '0'; got a quantization of the activations"):
        prepare_quantized(holder)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_that_transformers_quantized_can_be_adapted(bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    tiny_classifier().save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=["classifier"])
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=quantization, device_map="cpu"
    )
    injected(model)
    assert all(isinstance(layer, QuantizedLoRA) for layer in lora_layers(model).values())
    verify_injection(model, tiny_batch())
