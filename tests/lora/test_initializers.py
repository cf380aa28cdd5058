import math

import peft
import pytest
import torch

from hf_lora.lora.initializers import INITIALIZERS

FEATURES, RANK, SCALING = (300, 400), 16, 0.5


@pytest.fixture(scope="module")
def weight():
    return torch.randn(FEATURES, generator=torch.Generator().manual_seed(1))


def initialize(name, weight):
    torch.manual_seed(0)
    return INITIALIZERS.get(name).make(weight, RANK, SCALING)


@pytest.mark.parametrize("name", list(INITIALIZERS))
def test_shapes_and_no_side_effect_on_the_weight(name, weight):
    before = weight.clone()
    lora_A, lora_B = initialize(name, weight)
    assert lora_A.shape == (RANK, 400) and lora_B.shape == (300, RANK)
    assert torch.equal(weight, before) and lora_A.abs().max() > 0


@pytest.mark.parametrize("name", [name for name, entry in INITIALIZERS.items() if not entry.corrected])
def test_the_update_starts_at_zero(name, weight):
    lora_A, lora_B = initialize(name, weight)
    torch.testing.assert_close(lora_B @ lora_A, torch.zeros(FEATURES), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["kaiming", "gaussian", "normal"])
def test_factors_can_be_made_without_storage(name):
    lora_A, lora_B = INITIALIZERS.get(name).make(torch.empty(FEATURES, device="meta"), RANK, SCALING)
    assert lora_A.is_meta and lora_B.is_meta


def test_pissa_starts_at_the_best_approximation(weight):
    lora_A, lora_B = initialize("pissa", weight)
    values = torch.linalg.svdvals(weight.double())
    error = torch.linalg.matrix_norm(weight.double() - SCALING * (lora_B @ lora_A).double())
    # Eckart-Young: what is left has the norm of the singular values that were left out.
    torch.testing.assert_close(error, values[RANK:].square().sum().sqrt(), rtol=1e-5, atol=0)


def test_olora_has_orthonormal_columns_from_the_weights_span(weight):
    lora_A, lora_B = initialize("olora", weight)
    torch.testing.assert_close(lora_B.T @ lora_B, torch.eye(RANK), atol=1e-5, rtol=0)
    torch.testing.assert_close(lora_B.T @ weight, lora_A, atol=1e-4, rtol=1e-4)


def test_orthogonal_needs_an_even_rank(weight):
    with pytest.raises(ValueError, match="got rank 3; expected an even one"):
        INITIALIZERS.get("orthogonal").make(weight, 3, SCALING)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_a_rank_above_the_weights_own_is_refused(name, weight):
    with pytest.raises(ValueError, match=f"init='{name}' needs a rank of at most"):
        INITIALIZERS.get(name).make(weight[:8], RANK, SCALING)


@pytest.mark.parametrize(("name", "theirs"), [("kaiming", True), ("gaussian", "gaussian")])
def test_A_is_what_peft_draws_from_the_same_seed(name, theirs):
    model = torch.nn.Sequential(torch.nn.Linear(400, 300))
    config = peft.LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=theirs)
    wrapped = peft.get_peft_model(model, config)
    layer = wrapped.base_model.model[0]
    torch.manual_seed(0)
    layer.reset_lora_parameters("default", theirs)
    torch.testing.assert_close(
        initialize(name, torch.zeros(FEATURES))[0], layer.lora_A["default"].weight.data
    )


def test_kaiming_is_uniform_within_one_over_root_in(weight):
    lora_A, _ = initialize("kaiming", weight)
    bound = 1 / math.sqrt(400)
    assert lora_A.abs().max() <= bound
    # A uniform on +-b has standard deviation b / sqrt 3; 6,400 draws estimate it to about one percent.
    assert lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.04)
