import copy

import pytest
import torch
from conftest import randomize, tiny_batch, tiny_classifier
from torch import nn
from torch.nn.utils import parametrize
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from hf_lora import (
    LoRAConfig,
    head_parameters,
    inject_lora,
    load_adapter,
    lora_disabled,
    lora_layers,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_adapter,
    trainable_parameter_count,
    unmerge_lora,
)
from hf_lora.adapters.peft_format import adapter_tensors
from hf_lora.lora.config import VARIANTS
from hf_lora.lora.initializers import INITIALIZERS
from hf_lora.lora.inject import base_parameters
from hf_lora.lora.layer import LoRALayer, UpdateSpec
from hf_lora.lora.linear import LAYER_TYPES, LoRALinear, LoRAParametrization


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


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (0, 3, 6), (6,)], ids=str)
@pytest.mark.parametrize(
    "base", [nn.Linear(6, 4), Conv1D(4, 6), FalconLinear(6, 4)], ids=lambda b: type(b).__name__
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropout": 0.5},
        {"variant": "dora"},
        {"variant": "dora", "dropout": 0.5},
        {"form": "parametrization"},
    ],
    ids=str,
)
def test_inputs_without_rows_give_what_the_plain_layer_does(base, options, shape):
    model = nn.Sequential(copy.deepcopy(base))
    inject_lora(model, LoRAConfig(rank=2, target_modules=["0"], **options))
    randomize(model)
    for model.training in (True, False):
        x = torch.ones(shape, requires_grad=True)
        output = model.train(model.training)(x)
        expected = nn.functional.linear(x, torch.ones(4, 6))  # Conv1D itself refuses them
        assert output.shape == expected.shape and output.dtype == expected.dtype
        output.sum().backward()
        assert x.grad is not None and x.grad.shape == shape


@pytest.mark.parametrize("ids", [(0, 4), (2, 0)], ids=str)
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_an_embedding_without_tokens_gives_what_the_plain_one_does(ids, variant):
    model = nn.Sequential(nn.Embedding(10, 6))
    inject_lora(model, LoRAConfig(rank=2, target_modules=["0"], variant=variant))
    assert model(torch.zeros(ids, dtype=torch.long)).shape == (*ids, 6)


@pytest.mark.parametrize("base", [nn.Conv1d(6, 4, 3), nn.Conv2d(6, 4, 3)], ids=lambda b: type(b).__name__)
def test_a_convolution_without_examples_gives_what_the_plain_one_does(base):
    x = torch.zeros(0, 6, *[5] * (base.weight.ndim - 2))
    expected, model = base(x), nn.Sequential(copy.deepcopy(base))
    inject_lora(model, LoRAConfig(rank=2, target_modules=["0"]))
    assert model(x).shape == expected.shape


@pytest.mark.parametrize("parts_of", ["qv", "qkv"])
def test_a_fused_layer_without_tokens_gives_what_the_plain_one_does(parts_of):
    model = tiny_classifier("gpt2", n_embd=32, n_layer=1, n_head=4, pad_token_id=0)
    inject_lora(model, LoRAConfig(projections=parts_of))
    layer = next(iter(lora_layers(model).values()))
    assert layer(torch.zeros(2, 0, 32)).shape == (2, 0, 96)


def test_every_layer_type_is_a_subclass_of_the_layer_it_adapts():
    for base, layer_type in LAYER_TYPES.items():
        assert issubclass(layer_type, base) and layer_type.base_type is base


MODEL_TYPES = ["bert", "roberta", "distilbert", "albert", "deberta-v2"]


def injected(model_type="bert", form="parametrization", **options):
    model = tiny_classifier(model_type)
    inject_lora(model, LoRAConfig(**{"rank": 4, "alpha": 6, "form": form, **options}))
    randomize(model)
    return model


class Mixed(nn.Module):
    """Every kind of weight: a table, convolutions (one grouped), a linear layer and a bare parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 6)
        self.conv1 = nn.Conv1d(6, 8, 3, padding=1, groups=2)
        self.conv2 = nn.Conv2d(1, 4, (3, 2))
        self.linear = nn.Linear(8, 5)
        self.bare = nn.Parameter(torch.randn(5, 2, 3))

    def forward(self, ids):
        x = self.linear(self.conv1(self.table(ids).transpose(1, 2)).transpose(1, 2))
        image = self.conv2(x.unsqueeze(1)).mean((1, 2, 3))
        return torch.einsum("btd,dhk->bthk", x, self.bare).flatten(1).sum(1) + image


WEIGHTS = {"table": "weight", "conv1": "weight", "conv2": "weight", "linear": "weight", "bare": ""}
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def mixed():
    model = Mixed()
    names = inject_lora(
        model, LoRAConfig(rank=2, alpha=3, form="parametrization", target_modules=list(WEIGHTS))
    )
    assert set(names) == set(WEIGHTS)
    randomize(model)
    return model


def plain_weight(model, name):
    return getattr(model, name) if name == "bare" else getattr(model, name).weight


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_both_forms_give_the_same_outputs_and_gradients(model_type):
    models = {form: injected(model_type, form) for form in ("module", "parametrization")}
    outputs = {form: model(**tiny_batch()) for form, model in models.items()}
    torch.testing.assert_close(
        outputs["parametrization"].logits, outputs["module"].logits, atol=1e-6, rtol=1e-5
    )
    for output in outputs.values():
        output.loss.backward()
    for which in (lora_parameters, head_parameters):
        ours, others = which(models["parametrization"]), which(models["module"])
        assert ours.keys() == others.keys()
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter.grad, others[name].grad, atol=1e-7, rtol=1e-4)


def test_both_forms_write_the_same_file_and_load_each_others(tmp_path):
    model = injected()
    other = injected(form="module")
    assert {k: t.tolist() for k, t in adapter_tensors(model).items()} == {
        k: t.tolist() for k, t in adapter_tensors(other).items()
    }
    assert base_parameters(model).keys() == base_parameters(other).keys()
    twin = tiny_classifier("bert")
    load_adapter(twin, save_adapter(model, tmp_path / "a"))
    torch.testing.assert_close(
        twin(**tiny_batch()).logits, model(**tiny_batch()).logits, atol=1e-6, rtol=1e-5
    )


def test_both_forms_freeze_and_count_the_same():
    for bias in ("none", "lora_only", "all"):
        counts = [
            trainable_parameter_count(injected(form=form, bias=bias))
            for form in ("module", "parametrization")
        ]
        assert counts[0] == counts[1]


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_effective_weight_is_the_frozen_one_plus_scaled_BA(name):
    model = mixed()
    original = plain_weight(Mixed(), name)
    layer = lora_layers(model)[name]
    product = layer.lora_B @ layer.lora_A
    delta = (product.T if name == "table" else product).reshape(original.shape)
    torch.testing.assert_close(plain_weight(model, name), original + 1.5 * delta)


def test_shapes_of_the_factors():
    shapes = {name: tuple(parameter.shape) for name, parameter in lora_parameters(mixed()).items()}
    assert shapes == {
        "table.lora_A": (2, 10),
        "table.lora_B": (6, 2),
        "conv1.lora_A": (2, 3 * 3),
        "conv1.lora_B": (8, 2),
        "conv2.lora_A": (2, 1 * 3 * 2),
        "conv2.lora_B": (4, 2),
        "linear.lora_A": (2, 8),
        "linear.lora_B": (5, 2),
        "bare.lora_A": (2, 2 * 3),
        "bare.lora_B": (5, 2),
    }


def assert_plain(model):
    """The weights are the original ones to the bit; a convolution's kernel may depend on what needs gradients."""
    for name in WEIGHTS:
        assert torch.equal(plain_weight(model, name), plain_weight(Mixed(), name)), name
    torch.testing.assert_close(model(IDS), Mixed()(IDS), atol=1e-6, rtol=1e-6)


def test_merge_disable_and_remove_on_every_kind_of_weight():
    model = mixed()
    adapted = model(IDS)
    assert not torch.allclose(adapted, Mixed()(IDS))
    with lora_disabled(model):
        assert_plain(model)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), adapted, atol=1e-5, rtol=1e-5)
    with lora_disabled(model):
        assert_plain(model)
    unmerge_lora(model)
    assert torch.equal(model(IDS), adapted)
    remove_lora(model)
    assert_plain(model)
    assert set(model.state_dict()) == set(Mixed().state_dict())
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_removing_a_merged_model_leaves_the_merged_weights():
    model = mixed()
    adapted = model(IDS)
    merge_lora(model)
    remove_lora(model)
    assert set(model.state_dict()) == set(Mixed().state_dict())
    torch.testing.assert_close(model(IDS), adapted, atol=1e-5, rtol=1e-5)


def test_every_kind_of_weight_is_saved_and_restored(tmp_path):
    model = mixed()
    directory = save_adapter(model, tmp_path / "a")
    tensors = adapter_tensors(model)
    # PEFT's names and shapes: embeddings without ".weight", a convolution's A with its kernel, its B of size 1.
    assert tensors["base_model.model.table.lora_embedding_A"].shape == (2, 10)
    assert tensors["base_model.model.conv2.lora_A.weight"].shape == (2, 1, 3, 2)
    assert tensors["base_model.model.conv2.lora_B.weight"].shape == (4, 2, 1, 1)
    twin = Mixed()
    load_adapter(twin, directory)
    assert torch.equal(twin(IDS), model(IDS))


def test_only_the_factors_get_gradients():
    model = mixed()
    model(IDS).sum().backward()
    with_gradient = {id(parameter) for parameter in model.parameters() if parameter.grad is not None}
    assert with_gradient == {id(parameter) for parameter in lora_parameters(model).values()}


def test_dropout_drops_inputs_of_A_for_the_whole_batch():
    linear = nn.Linear(50, 4)
    spec = UpdateSpec(2, 1.0, 0.5, INITIALIZERS.get("normal"), VARIANTS.get("lora"))
    layer = LoRAParametrization.attach(linear, "weight", spec)
    nn.init.ones_(layer.lora_B)
    linear.train()
    original = layer.base_weight
    columns = (linear.weight - original).abs().sum(0)
    kept = columns > 0
    assert 5 < kept.sum() < 45
    full = layer.delta_weight()
    torch.manual_seed(0)
    dropped = linear.weight - original
    mask = dropped.abs().sum(0) > 0
    torch.testing.assert_close(dropped[:, mask], 2 * full[:, mask], atol=1e-6, rtol=1e-4)
    linear.eval()
    torch.testing.assert_close(linear.weight, original + full)


def test_what_has_no_matrix_is_refused():
    model = Mixed()
    with pytest.raises(ValueError, match=r"cannot adapt 'linear\.bias'|got 'linear\.bias'"):
        inject_lora(model, LoRAConfig(form="parametrization", target_modules=["linear.bias"]))
    norm = nn.Sequential(nn.LayerNorm(4))
    with pytest.raises(ValueError, match="cannot adapt '0'; got a LayerNorm; expected one of Linear"):
        inject_lora(norm, LoRAConfig(form="parametrization", target_modules=["0"]))


def test_what_has_no_forward_of_ours_takes_this_form_either_way():
    model = Mixed()
    inject_lora(model, LoRAConfig(rank=2, target_modules=["conv1", "linear", "bare"]))
    forms = {name: isinstance(layer, LoRAParametrization) for name, layer in lora_layers(model).items()}
    assert forms == {"conv1": True, "linear": False, "bare": True}


def test_multi_head_attention_is_adapted_although_it_goes_around_the_forward_of_its_parts():
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)})
    x = torch.randn(2, 5, 8)
    plain = model["attention"](x, x, x)[0]
    inject_lora(model, LoRAConfig(rank=2, target_modules=["attention.out_proj", "attention.in_proj_weight"]))
    torch.testing.assert_close(model["attention"](x, x, x)[0], plain)
    randomize(model)
    layers = lora_layers(model)
    assert set(layers) == {"attention.out_proj", "attention.in_proj_weight"}
    moved = nn.MultiheadAttention(8, 2, batch_first=True)
    moved.load_state_dict(
        {name.removeprefix("attention."): tensor for name, tensor in base_parameters(model).items()}
    )
    with torch.no_grad():
        moved.in_proj_weight.add_(layers["attention.in_proj_weight"].delta_weight())
        moved.out_proj.weight.add_(layers["attention.out_proj"].delta_weight())
    torch.testing.assert_close(model["attention"](x, x, x)[0], moved(x, x, x)[0], atol=1e-6, rtol=1e-5)
    for layer in layers.values():
        layer.lora_B.grad = None
    model["attention"](x, x, x)[0].sum().backward()
    assert all(layer.lora_B.grad.abs().max() > 0 for layer in layers.values())


@pytest.mark.parametrize("first", ["copy", "original"])
def test_a_copy_and_its_original_are_removed_independently(first):
    model = mixed()
    twin = copy.deepcopy(model)
    adapted = model(IDS)
    gone, left = (twin, model) if first == "copy" else (model, twin)
    remove_lora(gone)
    assert_plain(gone)
    assert torch.equal(left(IDS), adapted)
    merge_lora(left)
    torch.testing.assert_close(left(IDS), adapted, atol=1e-5, rtol=1e-5)
    unmerge_lora(left)
    remove_lora(left)
    assert_plain(left)
    assert all(
        type(module) is type(plain) for module, plain in zip(left.modules(), Mixed().modules(), strict=True)
    )
