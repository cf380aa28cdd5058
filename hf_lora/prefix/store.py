"""Where the states of the frozen prefix are kept: a file of fixed size, in memory or on disk."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO

import torch
from torch import Tensor


class StateStore:
    """The states of many examples, one after the other: rows `(width,)`, at most `tokens` of them.

    mode: "memory", "disk", or "auto": memory if the rows take at most `limit` bytes, else disk.
    directory: on whose disk. No file is seen there, and none is left.
    Raises ValueError if the rows do not fit, before anything is written.
    """

    def __init__(
        self, tokens: int, width: int, dtype: torch.dtype, *, mode: str, limit: float, directory: str | Path
    ) -> None:
        self._width, self._dtype, self._row_bytes = width, dtype, width * dtype.itemsize
        self._tokens, self._used = tokens, 0
        self._slots: dict[bytes, tuple[int, int]] = {}
        size = tokens * self._row_bytes
        self.place = mode if mode != "auto" else "memory" if size <= limit else "disk"
        where, most = "in memory", _mb(limit)
        advice = "use cache_frozen_prefix=disk, or a larger frozen_prefix_cache_gb"
        if self.place == "disk":
            os.makedirs(directory, exist_ok=True)
            limit = shutil.disk_usage(directory).free
            where, most = "on the disk", f"the {_mb(limit)} free in {str(directory)!r}"
            advice = "use another output_dir, or bf16"
        if size > limit:
            raise ValueError(
                f"the frozen prefix's cache does not fit {where}; got {_mb(size)} for {tokens:,} tokens; expected at "
                f"most {most}; {advice}"
            )
        if self.place == "memory":
            # The system gives the pages as they are written, so that what is not used costs nothing.
            self._file: IO[bytes] | mmap.mmap = mmap.mmap(-1, max(1, size))
            return
        # A file without a name, whose space is given back when the process ends, however it does. Read and written,
        # not mapped: mapped pages count as memory of the process.
        self._file = tempfile.TemporaryFile(dir=directory, prefix="frozen_prefix_")  # noqa: SIM115
        # Taken now, so that the run does not end in the middle because others have filled the disk.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file.fileno(), 0, size)

    def __len__(self) -> int:
        """How many examples are kept."""
        return len(self._slots)

    def get(self, key: bytes) -> Tensor | None:
        """The states `(length, width)` of an example, on the CPU; None if they are not kept."""
        if key not in self._slots:
            return None
        start, stop = self._slots[key]
        self._file.seek(start * self._row_bytes)
        content = bytearray(self._file.read((stop - start) * self._row_bytes))
        return torch.frombuffer(content, dtype=self._dtype).view(-1, self._width)

    def put(self, key: bytes, states: Tensor) -> bool:
        """Keep the states `(length, width)` of an example, from the CPU; False if there is no room left."""
        stop = self._used + len(states)
        if stop > self._tokens:
            return False
        self._file.seek(self._used * self._row_bytes)
        # numpy has no bf16, but it has bytes.
        self._file.write(states.contiguous().view(torch.uint8).numpy().data)
        self._slots[key], self._used = (self._used, stop), stop
        return True

    def close(self) -> None:
        """Give the memory or the disk space back; nothing is kept any more."""
        self._slots.clear()
        self._used = self._tokens
        self._file.close()


def _mb(size: float) -> str:
    return f"{size / (1 << 20):,.1f} MB"
