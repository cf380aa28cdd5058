"""The mathematics of LoRA as pure functions (Hu et al. 2021, arXiv:2106.09685, equation 3).

    h = W x + b + scaling * B A x,    scaling = alpha / rank

and of DoRA (Liu et al. 2024, arXiv:2402.09353, equation 5), which learns the norms m of the rows of W' too:

    h = m / |W + scaling * B A| * (W + scaling * B A) x + b

Shapes: W `(out, in)`, A `(rank, in)`, B `(out, rank)`, m `(out,)`, x `(..., in)`, h `(..., out)`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_lora.lora.dropout import dropout as fast_dropout


def lora_update(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """`scaling * B A dropout(x)`, shape `(..., out)`, in the precision of A and B.

    `dropout` is the probability with which an input of A is zeroed; pass 0 outside training.
    """
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
    """DoRA's linear layer (equation 5), shape `(..., out)`. The norm gets no gradient (its section 4.3).

    Dropout acts on all that fine-tuning changes and not on the frozen product, as in PEFT.
    """
    delta = delta_weight(lora_A, lora_B, scaling)
    norm = torch.linalg.vector_norm(weight.to(delta.dtype) + delta, dim=1).detach()
    scale = magnitude / norm
    base = F.linear(x, weight)
    dropped, product = (fast_dropout(x, dropout), None) if dropout > 0.0 else (x, base)
    if product is None:
        product = F.linear(dropped, weight)
    update = lora_update(dropped, lora_A, lora_B, scaling)
    result = base + ((scale - 1) * product.to(update.dtype) + scale * update).to(base.dtype)
    return result if bias is None else result + bias


def delta_weight(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`scaling * B A`, shape `(out, in)`, in fp32 at least: half-precision factors are multiplied in fp32."""
    dtype = torch.promote_types(lora_A.dtype, torch.float32)
    return scaling * (lora_B.to(dtype) @ lora_A.to(dtype))


def merged_weight(weight: Tensor, delta: Tensor) -> Tensor:
    """`weight + delta`, added in the precision of `delta` and rounded once to the type of `weight`."""
    return (weight.to(delta.dtype) + delta).to(weight.dtype)
