import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_lora.lora import functional as module
from hf_lora.lora.functional import FastDropout, drop, drop_again, fast_dropout, random_bits

MANY = 1 << 22


def hashed_by_hand(count: int) -> list[int]:
    """lowbias32 with two keys, in Python's own integers; the two halves of each word, as signed numbers."""
    start, key = torch.empty(2, dtype=torch.int32).random_(-(1 << 31), 1 << 31).tolist()
    halves = []
    for counter in range((count + 1) // 2):
        word = (counter + start) % 2**32
        word ^= word >> 16
        word = (word * 0x7FEB352D % 2**32) ^ (key % 2**32)
        word ^= word >> 15
        word = word * 0x846CA68B % 2**32
        word ^= word >> 16
        halves += [word & 0xFFFF, word >> 16]
    return [half - 2**16 if half >= 2**15 else half for half in halves][:count]


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 101])
def test_the_bits_are_those_of_the_hash_whatever_the_blocks(monkeypatch, count):
    monkeypatch.setattr(module, "_BLOCK", 8)
    torch.manual_seed(7)
    expected = hashed_by_hand(count)
    torch.manual_seed(7)
    assert random_bits(count).tolist() == expected


def test_the_bits_are_uniform():
    torch.manual_seed(0)
    counts = torch.bincount(random_bits(MANY).int() + 32768, minlength=65536).double()
    expected = MANY / 65536
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    # 65,535 degrees of freedom: mean 65,535, standard deviation 362.
    assert abs(chi_square - 65535) < 5 * math.sqrt(2 * 65535)


def kept(p: float, count: int = MANY) -> torch.Tensor:
    return (drop(torch.ones(count), p)[0] != 0).double()


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_mean_and_variance_are_those_of_dropout(p):
    torch.manual_seed(1)
    values = fast_dropout(torch.ones(MANY, dtype=torch.float64), p)
    variance = p / (1 - p)
    assert abs(values.mean().item() - 1) < 5 * math.sqrt(variance / MANY) + 1 / 65536 / (1 - p)
    assert values.var().item() == pytest.approx(variance, rel=0.01)
    assert set(values.unique().tolist()) <= {0.0, 1 / (1 - p)}


@pytest.mark.parametrize("lag", [1, 2, 3, 8, 32, 384, 1 << 17, (1 << 18) + 1])
def test_positions_are_independent(lag):
    torch.manual_seed(2)
    mask = kept(0.1) - 0.9
    correlation = (mask[:-lag] * mask[lag:]).mean().item() / 0.09
    assert abs(correlation) < 5 / math.sqrt(MANY - lag)


def test_calls_are_independent():
    torch.manual_seed(3)
    masks = torch.stack([kept(0.1, MANY // 16) - 0.9 for _ in range(16)])
    between = (masks @ masks.T / masks.shape[1] / 0.09).triu(1)
    assert between.abs().max().item() < 5 / math.sqrt(masks.shape[1])


def test_masks_come_from_the_seed_and_differ_from_call_to_call():
    x = torch.ones(1000)
    torch.manual_seed(4)
    first, second = fast_dropout(x, 0.3), fast_dropout(x, 0.3)
    torch.manual_seed(4)
    assert torch.equal(fast_dropout(x, 0.3), first) and not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients_carry_the_same_mask(dtype, transposed):
    x = torch.randn(60, 50, generator=torch.Generator().manual_seed(5)).to(dtype)
    x[0] = 0  # a value of zero is kept like any other, and so gets its gradient
    x = (x.T if transposed else x).requires_grad_()
    torch.manual_seed(6)
    mask = drop(torch.ones_like(x), 0.25)[0]
    torch.manual_seed(6)
    y = fast_dropout(x, 0.25)
    y.backward(torch.full_like(y, 3))
    assert 0 < int(mask.count_nonzero()) < mask.numel() and y.dtype == dtype
    torch.testing.assert_close(y, x.detach() * mask * (1 / 0.75))
    torch.testing.assert_close(x.grad, 3 * mask * (1 / 0.75))


def test_the_native_masks_of_other_devices_obey_the_same_rules(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = torch.randn(100, 100)
    dropped, mask, factor = drop(x, 0.25)
    assert mask.dtype == torch.bool and 0.7 < mask.double().mean() < 0.8
    torch.testing.assert_close(dropped * factor, x * mask / 0.75)
    torch.testing.assert_close(drop_again(x, mask, 0.25) * factor, x * mask / 0.75)


def test_checkpointing_draws_the_mask_again():
    x = torch.randn(40, 40, requires_grad=True)
    torch.manual_seed(8)
    (expected,) = torch.autograd.grad(fast_dropout(x, 0.4).square().sum(), x)
    torch.manual_seed(8)
    y = checkpoint(lambda value: fast_dropout(value, 0.4), x, use_reentrant=False)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(grad, expected)


def test_the_layer_is_dropout():
    x = torch.randn(30, 30)
    layer = FastDropout(0.5)
    torch.manual_seed(9)
    expected = fast_dropout(x, 0.5)
    torch.manual_seed(9)
    assert isinstance(layer, nn.Dropout) and torch.equal(layer(x), expected)
    assert layer.eval()(x) is x and FastDropout(0.0)(x) is x
    assert not FastDropout(1.0)(x).any()
    inplace = x.clone()
    assert FastDropout(0.5, inplace=True)(inplace) is inplace
