"""Fast training on a CPU: attention, dropout masks, memory and threads.

torch's scaled_dot_product_attention has no fast path on a CPU with dropout, and in bf16 its flash kernel is slow in the
backward. Plain batched products are quicker there. What they are not made for goes to transformers' own function.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_lora.lora.functional import FastDropout, drop, drop_again
from hf_lora.models._transformers_private import runs_sdpa, softmax_backward

# Under this name `attention` is registered with transformers.
NAME = "hf_lora"
# Numbers of mallopt's options in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Where sdpa's own kernel is quicker, without dropout.
_SDPA_IS_QUICKER = {torch.float32}
# What changes the function that is computed; where one is given, sdpa is asked.
_OTHER_FUNCTIONS = ("position_bias", "cache", "softcap", "s_aux")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling q k^T + mask) v with dropout on the probabilities (Vaswani et al. 2017, equation 1).

    query, key, value `(batch, heads, tokens, width)`; attention_mask, which broadcasts to `(batch, heads, queries,
    keys)`, is True where a key is attended to, or is added. Returns `(batch, queries, heads, width)`.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not (
        query.device.type == "cpu"
        and torch.is_grad_enabled()
        and (query.dtype not in _SDPA_IS_QUICKER or dropout > 0.0)
        and query.shape[1] == key.shape[1]
        and not (causal and attention_mask is None)
        and all(kwargs.get(name) is None for name in _OTHER_FUNCTIONS)
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    bias = attention_mask
    if bias is not None and bias.dtype == torch.bool:
        # The lowest number, not minus infinity: a query that may see no key must not become NaN.
        bias = query.new_zeros(bias.shape).masked_fill_(~bias, torch.finfo(query.dtype).min)
    bias = None if bias is None else bias.to(query.dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _Attention.apply(query, key, value, bias, scale, dropout), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, p: float
    ) -> Tensor:
        batch, heads, queries, _ = query.shape
        q, k, v = (tensor.flatten(0, 1) for tensor in (query, key, value))
        scores = q.new_empty(batch * heads, queries, k.shape[1])
        scores.baddbmm_(q, k.transpose(1, 2), beta=0, alpha=scale)
        if bias is not None:
            scores.view(batch, heads, queries, -1).add_(bias)
        probabilities = scores.softmax(-1)
        del scores
        dropped, mask, factor = drop(probabilities, p)
        ctx.scale, ctx.p, ctx.factor, ctx.shape = scale, p, factor, (batch, heads)
        ctx.save_for_backward(q, k, v, probabilities, mask)
        output = torch.bmm(dropped, v)
        if factor != 1.0:
            output.mul_(factor)
        return output.unflatten(0, (batch, heads)).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, probabilities, mask = ctx.saved_tensors
        grad = grad.transpose(1, 2).flatten(0, 1)
        if ctx.factor != 1.0:
            grad = grad * ctx.factor
        dropped = drop_again(probabilities, mask, ctx.p)
        grad_v = torch.bmm(dropped.transpose(1, 2), grad)
        grad_p = drop_again(torch.bmm(grad, v.transpose(1, 2)), mask, ctx.p)
        grad_scores = softmax_backward(grad_p, probabilities)
        grad_q = torch.bmm(grad_scores, k).mul_(ctx.scale)
        grad_k = torch.bmm(grad_scores.transpose(1, 2), q).mul_(ctx.scale)
        return *(g.unflatten(0, ctx.shape) for g in (grad_q, grad_k, grad_v)), None, None, None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def fast_training(model: nn.Module) -> Iterator[None]:
    """Inside, a model on a CPU trains with quick dropout masks and attention; the mathematics is the same.

    `attention` replaces "sdpa", transformers' default, and no other implementation. On other devices nothing changes.
    """
    if next(model.parameters()).device.type != "cpu":
        yield
        return
    keep_freed_memory()
    dropouts = [module for module in model.modules() if type(module) is nn.Dropout]
    switched: list[Any] = [module for module in model.modules() if runs_sdpa(module)]

    def switch(dropout: type[nn.Dropout], implementation: str) -> None:
        for module in dropouts:
            module.__class__ = dropout
        for module in switched:
            module.set_attn_implementation(implementation)

    try:
        switch(FastDropout, NAME)
        yield
    finally:
        switch(nn.Dropout, "sdpa")


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory, of which every step asks for the same sizes again.

    The system would hand it out page by page, zeroed. Does nothing where the C library has no `mallopt`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def set_threads(local_processes: int) -> None:
    """Share the host's cores among its training processes: each would take all or, under torchrun, one."""
    if local_processes > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_processes))
