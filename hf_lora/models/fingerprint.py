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

    It is the same for a model in fp32 and in bf16, and takes milliseconds. Other checkpoints, and fine-tuned ones,
    differ in nearly every value; a change of single values between the samples is not seen.
    Raises ValueError for tensors without values (meta device).
    """
    if meta := sorted(name for name, tensor in tensors.items() if tensor.is_meta):
        raise ValueError(f"cannot take the fingerprint of a model without weights; got {meta[0]!r} on meta")
    # Those of one device are fetched at once, since a GPU would be waited for at each of hundreds of tensors.
    samples: dict[str, Tensor] = {}
    for device in {tensor.device for tensor in tensors.values()}:
        group = {name: _sample(tensor) for name, tensor in tensors.items() if tensor.device == device}
        fetched = torch.cat(list(group.values())).cpu().split([len(sample) for sample in group.values()])
        samples.update(zip(group, fetched, strict=True))
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}:{tuple(tensors[name].shape)};".encode())
        digest.update(samples[name].view(torch.uint8).numpy().data)
    return _PREFIX + digest.hexdigest()


def _sample(tensor: Tensor) -> Tensor:
    """Rounded one by one: sharing so little work among threads costs more than the work on a busy machine."""
    if type(tensor).__module__.startswith("torchao"):
        tensor = tensor.dequantize()
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, math.ceil(flat.numel() / SAMPLES))].to(torch.bfloat16)
