"""The adapted linear layer as one autograd function: the frozen product and little more.

Forward, for T tokens: h = A drop(x)^T `(rank, T)`, y = x W^T + b, and y += c h^T B^T in place, where c is the
scaling over the share of inputs that dropout keeps. Written out in torch, autograd would keep the
dropped-out copy of x, its mask in the type of x and the scaled update for every adapted layer; here it keeps
x, which q, k and v share, one byte an element for the mask, and h. drop(x) is computed again in the
backward, which is cheaper than to keep it. With G the gradient of y and H = c B^T G^T `(rank, T)`:

    dB = c (h G)^T        dA = H drop(x)        dx = G W + drop(H^T A)

h and H lie on their side because products with few rows are up to five times as quick as those with few columns.

Without dropout and in full precision the update is rather added to the weight, y = x (W + c B A)^T + b, where that
is less work (`_is_merged`). In half precision small updates would be rounded away.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_lora.lora.dropout import drop, drop_again


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
    return y.view(*x.shape[:-1], -1)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        p: float,
    ) -> Tensor:
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

    A x and B^T G are needed for the gradients in either form. What remains, for each unit of rank, is in * out to
    make the merged weight, in the forward and again in the backward, against tokens * out to add the update to the
    outputs and tokens * in to add it to the gradient. A must be trained: only then is x kept, of which h is made.
    """
    out, features = weight.shape
    full = weight.dtype.itemsize >= 4 and lora_A.dtype == weight.dtype
    return full and lora_A.requires_grad and tokens * (features + out) > 2 * features * out
