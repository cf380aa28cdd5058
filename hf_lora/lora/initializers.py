"""How A and B start, given the frozen matrix W `(out, in)`; a table of named initializations.

Most begin with B A = 0. Those that begin elsewhere (PiSSA, OLoRA) keep their start A0, B0 as a frozen
correction, W x + scaling * (B A - B0 A0) x, so that the model starts as the pretrained one and W is untouched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lora._choices import Registry

Make = Callable[[Tensor, int, float], tuple[Tensor, Tensor]]
"""(W `(out, in)` in fp32 at least, rank, scaling) -> A `(rank, in)`, B `(out, rank)`, of W's type and device."""


@dataclass(frozen=True)
class Initialization:
    """`corrected`: the start is not zero and is subtracted, as A0 and B0, from then on."""

    make: Make
    corrected: bool = False


INITIALIZERS: Registry[str, Initialization] = Registry("initialization")


def kaiming(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A uniform in +-1/sqrt(in), B zero: what loralib and peft do (Kaiming with a = sqrt 5)."""
    lora_A, lora_B = blank(weight, rank, scaling)
    torch.nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    return lora_A, lora_B


def gaussian(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A normal with standard deviation 1/rank, B zero: peft's "gaussian"."""
    lora_A, lora_B = normal(weight, rank, scaling)
    return lora_A / rank, lora_B


def normal(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A standard normal, B zero: the paper's random Gaussian (section 4.1), as MNIST demonstrations take it."""
    lora_A, lora_B = blank(weight, rank, scaling)
    return torch.randn_like(lora_A), lora_B


def orthogonal(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B both random, B A = 0, since their rank dimensions span orthogonal halves. The rank is even."""
    if rank % 2:
        raise ValueError(f"init='orthogonal' halves the rank; got rank {rank}; expected an even one")
    out_features, in_features = weight.shape
    basis, _ = torch.linalg.qr(torch.randn_like(weight.new_empty(rank, rank)))
    lora_A = (torch.randn_like(weight.new_empty(in_features, rank // 2)) @ basis[0::2]).T / 10
    lora_B = torch.randn_like(weight.new_empty(out_features, rank // 2)) @ basis[1::2] / 10
    return lora_A.contiguous(), lora_B


def pissa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """scaling * B A is the best rank-r approximation of W (Meng et al. 2024, arXiv:2404.02948)."""
    _check_rank(weight, rank, "pissa")
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:rank] / scaling).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def olora(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """B and A are the first r columns and rows of W = Q R (Büyükakyüz 2024, arXiv:2406.01775)."""
    _check_rank(weight, rank, "olora")
    basis, triangle = torch.linalg.qr(weight)
    return triangle[:rank].contiguous(), basis[:, :rank].contiguous()


def blank(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B zero: for a file's values to be copied in."""
    out_features, in_features = weight.shape
    return weight.new_zeros(rank, in_features), weight.new_zeros(out_features, rank)


def _check_rank(weight: Tensor, rank: int, name: str) -> None:
    if rank > min(weight.shape):
        raise ValueError(
            f"init={name!r} needs a rank of at most the weight's smaller side; got rank {rank} for a weight "
            f"of {tuple(weight.shape)}"
        )


for _make in (kaiming, gaussian, normal, orthogonal):
    INITIALIZERS.register(_make.__name__, Initialization(_make))
# Until `start_lora` has seen the training data.
INITIALIZERS.register("gradient", Initialization(kaiming))
for _make in (pissa, olora):
    INITIALIZERS.register(_make.__name__, Initialization(_make, corrected=True))
