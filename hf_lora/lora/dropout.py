"""Dropout whose masks cost little on a CPU (Srivastava et al. 2014, JMLR 15).

torch draws a CPU's masks one element at a time on one thread, which takes a third of a training step with
the usual dropouts. Here sixteen bits for each element come out of a counter-based hash in a few vectorized
integer operations, and a mask is an integer, all ones or all zeros, to be ANDed with the values' own bits.
An element is dropped with probability p rounded to 1 / 65536. Other devices draw their own masks.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Words hashed at a time: with its temporary a block stays in the second-level caches.
_BLOCK = 1 << 17
# The 32-bit finalizer "lowbias32" of C. Wellons (2018), as signed numbers.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def random_bits(count: int) -> Tensor:
    """Uniform int16 values `(count,)` on the CPU, reproducible from torch's seed.

    Two 32-bit keys are drawn from torch's generator at each call: one shifts the counters, the other enters
    between the rounds of the hash, so that overlapping counters of two calls have nothing in common.
    """
    start, key = torch.empty(2, dtype=torch.int32).random_(-(1 << 31), 1 << 31).tolist()
    counters = _counters(_BLOCK)
    words = torch.empty((count + 1) // 2, dtype=torch.int32)
    scratch = torch.empty(min(len(words), _BLOCK), dtype=torch.int32)
    for first in range(0, len(words), _BLOCK):
        word = words[first : first + _BLOCK]
        shifted = scratch[: len(word)]
        torch.add(counters[: len(word)], _as_int32(start + first), out=word)
        _fold(word, 16, shifted)
        word.mul_(_FIRST).bitwise_xor_(key)
        _fold(word, 15, shifted)
        word.mul_(_SECOND)
        _fold(word, 16, shifted)
    return words.view(torch.int16)[:count]


@cache
def _counters(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32)


def _fold(word: Tensor, bits: int, shifted: Tensor) -> None:
    """word ^= word >> bits, with zeros shifted in: torch's own shift repeats the sign."""
    torch.bitwise_right_shift(word, bits, out=shifted)
    word.bitwise_xor_(shifted.bitwise_and_((1 << (32 - bits)) - 1))


def _as_int32(number: int) -> int:
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def drop(x: Tensor, p: float) -> tuple[Tensor, Tensor | None, float]:
    """x with elements zeroed, the mask, and the factor that is still to be applied.

    `factor * dropped` is dropout of x. The mask is what `drop_again` takes; where x is on a CPU it is int8, -1
    for kept elements and 0 for others, and the factor is 1 / (1 - p): products can take it up at no cost. With p = 0
    it is x itself, without a mask.
    """
    if p == 0.0:
        return x, None, 1.0
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        dropped, mask = torch.native_dropout(x, p, True)
        return dropped, mask, 1.0
    mask = random_bits(x.numel()).ge_(round(p * 65536) - 32768).neg_().view(x.shape)
    return _kept(x, mask), mask.to(torch.int8), 1.0 / (1.0 - p)


def drop_again(x: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """The same elements of x zeroed, and scaled as `drop` did: for x itself or its gradient."""
    if mask is None:
        return x
    if mask.dtype == torch.int8:
        return _kept(x, mask)
    return torch.ops.aten.native_dropout_backward(x, mask, 1.0 / (1.0 - p))


def _kept(x: Tensor, mask: Tensor) -> Tensor:
    integer = _INTEGERS[x.dtype.itemsize]
    return x.contiguous().view(integer).bitwise_and(mask.to(integer)).view(x.dtype)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        dropped, mask, ctx.factor = drop(x, p)
        ctx.p = p
        ctx.save_for_backward(mask)
        return dropped.mul_(ctx.factor) if ctx.factor != 1.0 else dropped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        dropped = drop_again(grad, mask, ctx.p)
        return (dropped.mul_(ctx.factor) if ctx.factor != 1.0 else dropped), None


def dropout(x: Tensor, p: float) -> Tensor:
    """Elements of x zeroed with probability p, the others scaled by 1 / (1 - p); same shape and type."""
    return _Dropout.apply(x, p)


class FastDropout(nn.Dropout):
    """`nn.Dropout` with the masks of this module, on any device."""

    def forward(self, input: Tensor) -> Tensor:
        """Dropout in training; the input itself otherwise."""
        if not self.training or self.p == 0.0:
            return input
        if self.inplace or self.p == 1.0 or not input.is_floating_point():
            return super().forward(input)
        return dropout(input, self.p)
