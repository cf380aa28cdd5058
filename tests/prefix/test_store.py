import os
import shutil
from collections import namedtuple

import pytest
import torch

from hf_lora.prefix.store import StateStore

KEYS = [bytes([number]) for number in range(4)]


def store(directory, tokens=12, mode="memory", limit=1e9, dtype=torch.float32):
    return StateStore(tokens, 5, dtype, mode=mode, limit=limit, directory=directory)


def states(length, dtype=torch.float32):
    return torch.randn(length, 5, generator=torch.Generator().manual_seed(length)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_what_is_put_in_comes_out_bit_for_bit_in_any_order(mode, dtype, tmp_path):
    kept = store(tmp_path, mode=mode, dtype=dtype)
    for key, length in zip(KEYS, (3, 1, 8), strict=False):
        assert kept.put(key, states(length, dtype))
    for key, length in reversed(list(zip(KEYS, (3, 1, 8), strict=False))):
        assert torch.equal(kept.get(key), states(length, dtype))
    assert kept.get(KEYS[3]) is None and len(kept) == 3


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_a_full_store_takes_no_more_and_keeps_what_it_has(mode, tmp_path):
    kept = store(tmp_path, tokens=4, mode=mode)
    assert kept.put(KEYS[0], states(3)) and not kept.put(KEYS[1], states(2)) and kept.put(KEYS[2], states(1))
    assert kept.get(KEYS[1]) is None
    assert torch.equal(kept.get(KEYS[0]), states(3)) and torch.equal(kept.get(KEYS[2]), states(1))


@pytest.mark.parametrize(("limit", "place"), [(240, "memory"), (239, "disk")])
def test_auto_takes_memory_up_to_the_limit_and_then_the_disk(limit, place, tmp_path):
    """12 tokens of 5 values of 4 bytes are 240 bytes."""
    assert store(tmp_path, mode="auto", limit=limit).place == place


def test_more_than_the_memory_limit_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"not fit in memory; got 20.0 MB for 1,048,576 .* at most 19.0 MB; use .*=disk"
    ):
        store(tmp_path, tokens=1 << 20, limit=19 << 20)


def test_more_than_the_free_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100 << 20, 81 << 20, 19 << 20))
    with pytest.raises(
        ValueError, match=r"not fit on the disk; got 20.0 MB for 1,048,576 .* at most the 19.0 MB free in"
    ):
        store(tmp_path, tokens=1 << 20, mode="disk")
    assert list(tmp_path.iterdir()) == []


def test_the_disk_space_is_taken_at_once_and_given_back(tmp_path):
    """10 MB from the start, in a file that no one sees: it goes with the process, however that ends."""
    kept = store(tmp_path / "new", tokens=1 << 20, mode="disk", dtype=torch.bfloat16)
    file = kept._file
    assert os.fstat(file.fileno()).st_blocks * 512 >= 10 << 20
    assert list((tmp_path / "new").iterdir()) == []
    kept.close()
    assert file.closed


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_a_closed_store_keeps_nothing(mode, tmp_path):
    kept = store(tmp_path, mode=mode)
    kept.put(KEYS[0], states(3))
    kept.close()
    assert kept.get(KEYS[0]) is None and not kept.put(KEYS[1], states(1)) and len(kept) == 0
