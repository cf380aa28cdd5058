"""How A and B start. Each entry maps (weight, rank, scaling) to A `(rank, in)` and B `(out, rank)`.

`out` and `in` come as `features`, not from the weight's shape: under ZeRO-3 a weight is empty. B is zero
at the start in every entry here, so the adapted model begins as the pretrained one.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from hf_lora.registry import Registry


class Initializer(Protocol):
    """Returns A `(rank, in_features)` and B `(out_features, rank)` in `dtype` on `device`."""

    def __call__(
        self, features: tuple[int, int], rank: int, *, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]: ...


INITIALIZERS: Registry[str, Initializer] = Registry("initialization")


def kaiming(
    features: tuple[int, int], rank: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A uniform in +-1/sqrt(in), B zero: what loralib and peft do (Kaiming with a = sqrt 5)."""
    out_features, in_features = features
    lora_A = torch.empty(rank, in_features, dtype=dtype, device=device)
    torch.nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    return lora_A, torch.zeros(out_features, rank, dtype=dtype, device=device)


def gaussian(
    features: tuple[int, int], rank: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A normal with standard deviation 1/rank, B zero: peft's "gaussian"."""
    out_features, in_features = features
    lora_A = torch.randn(rank, in_features, dtype=dtype, device=device) / rank
    return lora_A, torch.zeros(out_features, rank, dtype=dtype, device=device)


def normal(
    features: tuple[int, int], rank: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A standard normal, B zero: the paper's random Gaussian (section 4.1), as MNIST demonstrations take it."""
    out_features, in_features = features
    lora_A = torch.randn(rank, in_features, dtype=dtype, device=device)
    return lora_A, torch.zeros(out_features, rank, dtype=dtype, device=device)


INITIALIZERS.register("kaiming", kaiming)
INITIALIZERS.register("gaussian", gaussian)
INITIALIZERS.register("normal", normal)
