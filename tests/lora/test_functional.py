import pytest
import torch

from hf_lora.lora import functional
from hf_lora.lora.functional import fast_dropout


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 5), "lora_A": (2, 5), "lora_B": (7, 2)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_dropout_zeroes_inputs_of_A_only_and_rescales(tensors):
    x, lora_A, lora_B = tensors["x"], tensors["lora_A"], tensors["lora_B"]
    torch.manual_seed(4)
    out = functional.lora_update(x, lora_A, lora_B, 2.0, dropout=0.5)
    torch.manual_seed(4)
    torch.testing.assert_close(out, fast_dropout(x, 0.5) @ lora_A.T @ lora_B.T * 2.0)


def test_delta_weight_is_computed_in_fp32(tensors):
    lora_A, lora_B = tensors["lora_A"].bfloat16(), tensors["lora_B"].bfloat16()
    delta = functional.delta_weight(lora_A, lora_B, 0.3)
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta, 0.3 * (lora_B.double() @ lora_A.double()).float())


def test_merged_weight_rounds_once():
    weight = torch.tensor([[1.0]], dtype=torch.bfloat16)
    # 1 + 3/512 lies between the bf16 neighbours 1 and 1 + 4/512; adding in bf16 would first round 3/512.
    assert functional.merged_weight(weight, torch.tensor([[3 / 512]])).item() == 1 + 4 / 512
