import math

import peft
import pytest
import torch

from hf_lora.initializers import INITIALIZERS

FEATURES, RANK = (300, 400), 16


def initialize(name):
    torch.manual_seed(0)
    return INITIALIZERS.get(name)(FEATURES, RANK, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("name", list(INITIALIZERS))
def test_the_update_starts_at_zero(name):
    lora_A, lora_B = initialize(name)
    assert lora_A.shape == (RANK, 400) and lora_B.shape == (300, RANK)
    assert torch.equal(lora_B, torch.zeros(300, RANK))
    assert lora_A.abs().min() > 0


@pytest.mark.parametrize("name", list(INITIALIZERS))
def test_factors_can_be_made_without_storage(name):
    lora_A, lora_B = INITIALIZERS.get(name)(FEATURES, RANK, dtype=torch.float32, device=torch.device("meta"))
    assert lora_A.is_meta and lora_B.is_meta


@pytest.mark.parametrize(("name", "theirs"), [("kaiming", True), ("gaussian", "gaussian")])
def test_A_is_what_peft_draws_from_the_same_seed(name, theirs):
    model = torch.nn.Sequential(torch.nn.Linear(400, 300))
    config = peft.LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=theirs)
    wrapped = peft.get_peft_model(model, config)
    layer = wrapped.base_model.model[0]
    torch.manual_seed(0)
    layer.reset_lora_parameters("default", theirs)
    torch.testing.assert_close(initialize(name)[0], layer.lora_A["default"].weight.data)


def test_kaiming_is_uniform_within_one_over_root_in():
    lora_A, _ = initialize("kaiming")
    bound = 1 / math.sqrt(400)
    assert lora_A.abs().max() <= bound
    # A uniform on +-b has standard deviation b / sqrt 3; 6,400 draws estimate it to about one percent.
    assert lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.04)
