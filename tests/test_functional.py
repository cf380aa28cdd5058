import loralib
import pytest
import torch
import torch.nn.functional as F

from hf_lora import functional


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 5), "weight": (7, 5), "bias": (7,), "lora_A": (2, 5), "lora_B": (7, 2)}
    return {n: torch.randn(s, generator=generator, requires_grad=n != "weight") for n, s in shapes.items()}


def test_lora_linear_equals_equation_3_written_out(tensors):
    x, weight, bias, lora_A, lora_B = (
        tensors[n].detach() for n in ("x", "weight", "bias", "lora_A", "lora_B")
    )
    out = functional.lora_linear(x, weight, bias, lora_A, lora_B, 0.5)
    for batch in range(2):
        for token in range(3):
            by_hand = weight @ x[batch, token] + bias + 0.5 * (lora_B @ (lora_A @ x[batch, token]))
            torch.testing.assert_close(out[batch, token], by_hand)


def test_output_and_gradients_equal_loralib(tensors):
    theirs = loralib.Linear(5, 7, r=2, lora_alpha=3)
    with torch.no_grad():
        for name in ("weight", "bias", "lora_A", "lora_B"):
            getattr(theirs, name).copy_(tensors[name])
    x = tensors["x"].detach().clone().requires_grad_()
    expected = theirs(x)
    expected.square().sum().backward()
    out = functional.lora_linear(scaling=1.5, **tensors)
    out.square().sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(tensors["x"].grad, x.grad)
    torch.testing.assert_close(tensors["lora_A"].grad, theirs.lora_A.grad)
    torch.testing.assert_close(tensors["lora_B"].grad, theirs.lora_B.grad)
    assert tensors["weight"].grad is None


def test_dropout_zeroes_inputs_of_A_only_and_rescales(tensors):
    x, lora_A, lora_B = tensors["x"].detach(), tensors["lora_A"].detach(), tensors["lora_B"].detach()
    torch.manual_seed(4)
    out = functional.lora_update(x, lora_A, lora_B, 2.0, dropout=0.5)
    torch.manual_seed(4)
    torch.testing.assert_close(out, F.dropout(x, 0.5) @ lora_A.T @ lora_B.T * 2.0)


def test_half_precision_base_keeps_its_type_and_the_update_its_precision(tensors):
    x, weight, bias = (tensors[n].detach().bfloat16() for n in ("x", "weight", "bias"))
    lora_A, lora_B = tensors["lora_A"].detach(), tensors["lora_B"].detach()
    out = functional.lora_linear(x, weight, bias, lora_A, lora_B, 0.5)
    update = (x.float() @ lora_A.T @ lora_B.T) * 0.5
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, F.linear(x, weight, bias) + update.bfloat16())


def test_delta_weight_is_computed_in_fp32(tensors):
    lora_A, lora_B = tensors["lora_A"].detach().bfloat16(), tensors["lora_B"].detach().bfloat16()
    delta = functional.delta_weight(lora_A, lora_B, 0.3)
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta, 0.3 * (lora_B.double() @ lora_A.double()).float())


def test_merged_weight_rounds_once():
    weight = torch.tensor([[1.0]], dtype=torch.bfloat16)
    # 1 + 3/512 lies between the bf16 neighbours 1 and 1 + 4/512; adding in bf16 would first round 3/512.
    assert functional.merged_weight(weight, torch.tensor([[3 / 512]])).item() == 1 + 4 / 512
