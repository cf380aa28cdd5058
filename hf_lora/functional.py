"""The mathematics of LoRA as pure functions (Hu et al. 2021, arXiv:2106.09685, equation 3).

    h = W x + b + scaling * B A x,    scaling = alpha / rank

Shapes: W `(out, in)`, A `(rank, in)`, B `(out, rank)`, x `(..., in)`, h `(..., out)`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_update(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """`scaling * B A dropout(x)`, shape `(..., out)`, in the precision of A and B.

    `dropout` is the probability with which an input of A is zeroed; pass 0 outside training.
    """
    x = x.to(lora_A.dtype)
    if dropout > 0.0:
        x = F.dropout(x, dropout)
    return F.linear(F.linear(x, lora_A), lora_B) * scaling


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """The adapted linear layer (equation 3), shape `(..., out)`, in the precision of the frozen product."""
    base = F.linear(x, weight, bias)
    return base + lora_update(x, lora_A, lora_B, scaling, dropout).to(base.dtype)


def delta_weight(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`scaling * B A`, shape `(out, in)`, in fp32 at least: half-precision factors are multiplied in fp32."""
    dtype = torch.promote_types(lora_A.dtype, torch.float32)
    return scaling * (lora_B.to(dtype) @ lora_A.to(dtype))


def merged_weight(weight: Tensor, delta: Tensor) -> Tensor:
    """`weight + delta`, added in the precision of `delta` and rounded once to the type of `weight`."""
    return (weight.to(delta.dtype) + delta).to(weight.dtype)
