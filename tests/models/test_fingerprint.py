from __future__ import annotations

import hashlib
import re

import pytest
import torch
from torch import Tensor

from hf_lora.models.fingerprint import fingerprint

SHAPES = {"embed.weight": (300, 32), "layer.weight": (64, 64), "layer.bias": (64,), "other.weight": (64, 64)}


def random_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def test_digest_is_sha256_of_names_shapes_and_bf16_bits() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    # bf16 is the upper half of the fp32 bits; 1, -2, 0.5 and 3 fit without rounding.
    bits = bytes.fromhex("3f80 c000 3f00 4040")
    little_endian = bytes(byte for pair in zip(bits[1::2], bits[::2], strict=True) for byte in pair)
    expected = hashlib.sha256(b"a:(1,);" + bytes(2) + b"b:(2, 2);" + little_endian).hexdigest()
    assert fingerprint({"b": weight, "a": torch.zeros(1)}) == f"sha256-sampled-bf16:{expected}"


def test_fp32_and_bf16_copies_agree() -> None:
    tensors = random_tensors()
    copies = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    assert not torch.equal(copies["layer.weight"].float(), tensors["layer.weight"])
    assert fingerprint(copies) == fingerprint(tensors)


def test_each_tensor_has_its_own_bytes_whatever_the_types_of_the_others() -> None:
    tensors = {
        "a": torch.arange(3, dtype=torch.float16) / 3,
        "b": torch.randn(5000, 3, generator=torch.Generator().manual_seed(6)),
        "c": torch.arange(-4, 4, dtype=torch.int8),
        "d": torch.randn(7, dtype=torch.float64) * 1e-9,
        "e": torch.empty(0),
        "f": torch.randn(2, 2).to(torch.bfloat16),
    }
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        # 15,000 values are more than are sampled: every fourth.
        values = tensor.flatten()[:: 4 if name == "b" else 1].to(torch.bfloat16)
        digest.update(f"{name}:{tuple(tensor.shape)};".encode() + bytes(values.view(torch.uint8).tolist()))
    assert fingerprint(tensors) == f"sha256-sampled-bf16:{digest.hexdigest()}"


def test_order_of_names_and_memory_layout_do_not_matter() -> None:
    tensors = random_tensors()
    other = {
        name: tensors[name].t().contiguous().t() for name in reversed(tensors) if tensors[name].ndim == 2
    }
    assert fingerprint({**other, "layer.bias": tensors["layer.bias"]}) == fingerprint(tensors)


@pytest.mark.parametrize("name", SHAPES)
def test_scaling_any_one_tensor_is_seen(name: str) -> None:
    tensors = random_tensors()
    assert fingerprint({**tensors, name: tensors[name] * 1.001}) != fingerprint(tensors)


def test_swapped_names_are_seen() -> None:
    tensors = random_tensors()
    swapped = {**tensors, "layer.weight": tensors["other.weight"], "other.weight": tensors["layer.weight"]}
    assert fingerprint(swapped) != fingerprint(tensors)


def test_shape_and_missing_tensor_are_seen() -> None:
    tensors = random_tensors()
    reshaped = {**tensors, "layer.weight": tensors["layer.weight"].reshape(32, 128)}
    without = {name: tensor for name, tensor in tensors.items() if name != "layer.bias"}
    assert len({fingerprint(tensors), fingerprint(reshaped), fingerprint(without)}) == 3


def test_tensors_are_left_alone() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    fingerprint({"weight": weight})
    assert weight.requires_grad and weight.dtype == torch.float32
    assert torch.equal(weight.detach(), torch.ones(4, 4))


def test_meta_tensor_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=re.escape("fingerprint of a model without weights; got 'layer.bias'")
    ):
        fingerprint({"layer.bias": torch.empty(3, device="meta")})
