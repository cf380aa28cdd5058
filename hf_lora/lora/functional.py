"""The mathematics of LoRA as pure functions, and a fast dropout (Hu et al. 2021, arXiv:2106.09685, equation 3).

    h = W x + b + scaling * B A x,    scaling = alpha / rank

and of DoRA (Liu et al. 2024, arXiv:2402.09353, equation 5), which learns the norms m of the rows of W' too:

    h = m / |W + scaling * B A| * (W + scaling * B A) x + b

Shapes: W `(out, in)`, A `(rank, in)`, B `(out, rank)`, m `(out,)`, x `(..., in)`, h `(..., out)`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def lora_update(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """`scaling * B A dropout(x)`, shape `(..., out)`, in the precision of A and B; dropout: 0 outside training."""
    x = x.to(lora_A.dtype)
    if dropout > 0.0:
        x = fast_dropout(x, dropout)
    return F.linear(F.linear(x, lora_A), lora_B) * scaling


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    magnitude: Tensor,
) -> Tensor:
    """DoRA's linear layer (equation 5), shape `(..., out)`. As in PEFT dropout does not act on the frozen product."""
    delta = delta_weight(lora_A, lora_B, scaling)
    norm = torch.linalg.vector_norm(weight.to(delta.dtype) + delta, dim=1).detach()
    scale = magnitude / norm
    base = F.linear(x, weight)
    dropped, product = x, base
    if dropout > 0.0:
        dropped = fast_dropout(x, dropout)
        product = F.linear(dropped, weight)
    update = lora_update(dropped, lora_A, lora_B, scaling)
    result = base + ((scale - 1) * product.to(update.dtype) + scale * update).to(base.dtype)
    return result if bias is None else result + bias


def delta_weight(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`scaling * B A`, shape `(out, in)`, in fp32 at least: half-precision factors are multiplied in fp32."""
    dtype = torch.promote_types(lora_A.dtype, torch.float32)
    return scaling * (lora_B.to(dtype) @ lora_A.to(dtype))


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, products are in the types of their factors, whatever autocast is on around it."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def merged_weight(weight: Tensor, delta: Tensor) -> Tensor:
    """`weight + delta`, added in the precision of `delta` and rounded once to the type of `weight`."""
    return (weight.to(delta.dtype) + delta).to(weight.dtype)


def block_indices(parts: tuple[tuple[int, ...], ...], rank: int) -> tuple[Tensor, Tensor]:
    """The row and column, in B of the whole weight, of every entry of the parts' rows `(rows, rank)`."""
    rows = torch.tensor([row for part in parts for row in part])
    block = torch.tensor([index for index, part in enumerate(parts) for _ in part])
    columns = block[:, None] * rank + torch.arange(rank)
    return rows[:, None].expand_as(columns), columns


def block_diagonal(lora_A: Tensor, groups: int) -> Tensor:
    """A of a grouped convolution, `(rank, in / groups, *kernel)`, as PEFT's: `(groups * rank, in, *kernel)`."""
    rank, inputs, *kernel = lora_A.shape
    whole = lora_A.new_zeros(groups, rank, groups, inputs, *kernel)
    for group in range(groups):
        whole[group, :, group] = lora_A
    return whole.reshape(groups * rank, groups * inputs, *kernel)


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
        # As a signed number of 32 bits.
        torch.add(counters[: len(word)], (start + first + (1 << 31)) % (1 << 32) - (1 << 31), out=word)
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


def drop(x: Tensor, p: float) -> tuple[Tensor, Tensor | None, float]:
    """x with elements zeroed, the mask for `drop_again`, and the factor: `factor * dropped` is dropout of x.

    On a CPU the mask is int8, -1 for kept elements and 0 for others, and the factor 1 / (1 - p), for products to take
    up at no cost. With p = 0 it is x itself, without a mask.
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
        dropped = drop_again(grad, ctx.saved_tensors[0], ctx.p)
        return (dropped.mul_(ctx.factor) if ctx.factor != 1.0 else dropped), None


def fast_dropout(x: Tensor, p: float) -> Tensor:
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
        return fast_dropout(input, self.p)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """W x + b + scaling * B A dropout(x) (Hu et al. 2021, equation 3), shape `(..., out)`.

    x `(..., in)`, weight `(out, in)`, lora_A `(rank, in)`, lora_B `(out, rank)`; `dropout` is the probability
    with which an input of A is zeroed, 0 outside training. Everything is multiplied in the precision of the
    frozen product, that of autocast where it is on; A and B and their gradients keep their own. No second derivatives.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    # In rows, since an output that is a view made inside a function could not be changed in place by the model.
    y = _LoRALinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, lora_A, lora_B, scaling, dropout)
    return y.view(*x.shape[:-1], len(weight))


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, lora_A, lora_B, scaling, p = inputs
        A, B = lora_A.to(weight.dtype), lora_B.to(weight.dtype)
        mask, factor, hidden = None, 1.0, None
        if p == 0.0 and _is_merged(len(x), weight, lora_A):
            y = F.linear(x, torch.addmm(weight, B, A, alpha=scaling), bias)
        else:
            dropped, mask, factor = drop(x, p)
            hidden = A @ dropped.T
            y = F.linear(x, weight, bias)
            y.addmm_(hidden.T, B.T, alpha=scaling * factor)
        ctx.scale, ctx.p = scaling * factor, p
        # x is for the gradients of A and of an unfrozen weight alone.
        kept = x if ctx.needs_input_grad[1] or ctx.needs_input_grad[3] else None
        ctx.save_for_backward(kept, weight, lora_A, lora_B, hidden, mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, hidden, mask = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_A = grad_B = None
        A, B = lora_A.to(G.dtype), lora_B.to(G.dtype)
        merged = hidden is None
        if needs_B:
            hidden = A @ x.T if merged else hidden
            grad_B = (hidden @ G).T.to(lora_B.dtype, memory_format=torch.contiguous_format).mul_(ctx.scale)
        if needs_A or (needs_x and not merged):
            H = (B.T @ G.T).mul_(ctx.scale)
        if needs_A:
            grad_A = (H @ drop_again(x, mask, ctx.p)).to(lora_A.dtype)
        if needs_x:
            grad_x = G @ (torch.addmm(weight, B, A, alpha=ctx.scale) if merged else weight)
            if mask is not None:
                grad_x.add_(drop_again(H.T @ A, mask, ctx.p))
            elif not merged:
                grad_x.addmm_(H.T, A)
        if needs_weight:
            grad_weight = G.T @ x
        grad_bias = G.sum(0) if needs_bias else None
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, None, None


def _is_merged(tokens: int, weight: Tensor, lora_A: Tensor) -> bool:
    """Whether adding the update to the weight is less work than adding it to the outputs.

    For each unit of rank: in * out, twice, against tokens * (in + out), for outputs and gradient. A must be trained:
    only then is x kept, from which A x is made.
    """
    out, features = weight.shape
    full = weight.dtype.itemsize >= 4 and lora_A.dtype == weight.dtype
    return full and lora_A.requires_grad and tokens * (features + out) > 2 * features * out
