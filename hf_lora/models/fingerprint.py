"""A short digest of the pretrained weights under an adapter, to refuse loading it onto others."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

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
    digest = hashlib.sha256()
    names = sorted(tensors)
    for name, values in zip(names, _samples([tensors[name] for name in names]), strict=True):
        digest.update(f"{name}:{tuple(tensors[name].shape)};".encode())
        digest.update(values)
    return _PREFIX + digest.hexdigest()


def _samples(tensors: Sequence[Tensor]) -> list[memoryview]:
    """The sampled values of each tensor, as the bytes of bf16 numbers.

    Those of one device are fetched at once, since a GPU would be waited for at each of hundreds of tensors. They are
    rounded one by one: sharing so little work among threads costs more than the work on a busy machine.
    """
    devices: dict[torch.device, dict[int, Tensor]] = {}
    for index, tensor in enumerate(tensors):
        if type(tensor).__module__.startswith("torchao"):
            tensor = tensor.dequantize()
        flat = tensor.detach().reshape(-1)
        step = max(1, math.ceil(flat.numel() / SAMPLES))
        devices.setdefault(tensor.device, {})[index] = flat[::step].to(torch.bfloat16)
    samples = [memoryview(b"")] * len(tensors)
    for group in devices.values():
        values = memoryview(torch.cat(list(group.values())).cpu().view(torch.uint8).numpy())
        start = 0
        for index, sample in group.items():
            end = start + torch.bfloat16.itemsize * len(sample)
            samples[index], start = values[start:end], end
    return samples
