"""A short digest of the pretrained weights under an adapter, to refuse loading it onto others."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

SAMPLES = 4096
_PREFIX = "sha256-sampled-bf16:"


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, shapes and up to 4,096 evenly spaced values of every tensor, rounded to bf16.

    Rounding makes the digest the same whether a model is loaded in fp32 or in bf16. Sampling keeps it in
    milliseconds (hashing all of BERT-base takes a quarter of a second): other checkpoints, and fine-tuned
    ones, differ in nearly every value; a change of single values between the samples is not seen.
    Raises ValueError for tensors without values (meta device).
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta:
            raise ValueError(f"cannot take the fingerprint of a model without weights; got {name!r} on meta")
        digest.update(f"{name}:{tuple(tensor.shape)};".encode())
        if type(tensor).__module__.startswith("torchao"):
            tensor = tensor.dequantize()
        flat = tensor.detach().reshape(-1)
        step = max(1, math.ceil(flat.numel() / SAMPLES))
        sample = flat[::step].to(torch.bfloat16).cpu().contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return _PREFIX + digest.hexdigest()
