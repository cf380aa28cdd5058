"""Where the states of the frozen prefix are kept: an array of fixed size, in memory or in a file."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

CACHE_MODES = ("no", "auto", "memory", "disk")
_MB = 1 << 20


class _MemoryArray:
    """Rows `(width,)` of one type, written and read by number."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, directory: str | Path) -> None:
        # The system gives the pages as they are written, so that what is not used costs nothing.
        self._rows: Tensor = torch.empty(shape, dtype=dtype)

    def read(self, start: int, stop: int) -> Tensor:
        return self._rows[start:stop]

    def write(self, start: int, rows: Tensor) -> None:
        self._rows[start : start + len(rows)] = rows

    def close(self) -> None:
        self._rows = self._rows.new_empty(0)


class _DiskArray:
    """A file without a name, whose space is given back when the process ends, however it does.

    Read and written, not mapped: mapped pages count as memory of the process.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, directory: str | Path) -> None:
        self._width, self._dtype = shape[1], dtype
        self._row_bytes = shape[1] * dtype.itemsize
        size = shape[0] * self._row_bytes
        os.makedirs(directory, exist_ok=True)
        free = shutil.disk_usage(directory).free
        if size > free:
            raise ValueError(
                f"the frozen prefix's cache does not fit on the disk; got {_mb(size)} for {shape[0]:,} tokens; "
                f"expected at most the {_mb(free)} free in {str(directory)!r}; use another output_dir, or bf16"
            )
        self._file = tempfile.TemporaryFile(dir=directory, prefix="frozen_prefix_")  # noqa: SIM115
        # Taken now, so that the run does not end in the middle because others have filled the disk.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file.fileno(), 0, size)

    def read(self, start: int, stop: int) -> Tensor:
        content = bytearray((stop - start) * self._row_bytes)
        self._file.seek(start * self._row_bytes)
        self._file.readinto(content)
        return torch.frombuffer(content, dtype=self._dtype).view(-1, self._width)

    def write(self, start: int, rows: Tensor) -> None:
        self._file.seek(start * self._row_bytes)
        # numpy has no bf16, but it has bytes.
        self._file.write(rows.contiguous().view(torch.uint8).numpy().data)

    def close(self) -> None:
        self._file.close()


class StateStore:
    """The states of many examples, one after the other in an array `(tokens, width)`.

    mode: "memory", "disk", or "auto": memory if the array takes at most `limit` bytes, else disk.
    directory: on whose disk. No file is seen there, and none is left.
    Raises ValueError if the array does not fit, before anything is written.
    """

    def __init__(
        self, tokens: int, width: int, dtype: torch.dtype, *, mode: str, limit: float, directory: str | Path
    ) -> None:
        size = tokens * width * dtype.itemsize
        self.place = mode if mode != "auto" else "memory" if size <= limit else "disk"
        if self.place == "memory" and size > limit:
            raise ValueError(
                f"the frozen prefix's cache does not fit in memory; got {_mb(size)} for {tokens:,} tokens; expected at "
                f"most {_mb(limit)}; use cache_frozen_prefix=disk, or a larger frozen_prefix_cache_gb"
            )
        array: type[_MemoryArray | _DiskArray] = _MemoryArray if self.place == "memory" else _DiskArray
        self._array = array((tokens, width), dtype, directory)
        self._tokens, self._used = tokens, 0
        self._slots: dict[bytes, tuple[int, int]] = {}

    def __len__(self) -> int:
        """How many examples are kept."""
        return len(self._slots)

    def get(self, key: bytes) -> Tensor | None:
        """The states `(length, width)` of an example, on the CPU; None if they are not kept."""
        slot = self._slots.get(key)
        return None if slot is None else self._array.read(*slot)

    def put(self, key: bytes, states: Tensor) -> bool:
        """Keep the states `(length, width)` of an example, from the CPU; False if there is no room left."""
        stop = self._used + len(states)
        if stop > self._tokens:
            return False
        self._array.write(self._used, states)
        self._slots[key], self._used = (self._used, stop), stop
        return True

    def close(self) -> None:
        """Give the memory or the disk space back; nothing is kept any more."""
        self._slots.clear()
        self._used = self._tokens
        self._array.close()


def _mb(size: float) -> str:
    return f"{size / _MB:,.1f} MB"
