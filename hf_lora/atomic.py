"""Files that are either whole or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError


@contextmanager
def replacing(directory: Path, *, last: Sequence[str] = ()) -> Iterator[Path]:
    """Yield an empty directory beside `directory`; on success its files replace those of the same name.

    A directory that did not exist appears complete, by one rename. In one that did, each file is replaced
    by a rename and those named in `last` come last, so that a digest in them tells a half-made change.
    Other files are left alone. On an exception nothing changes.
    """
    with writing(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".tmp", dir=directory.parent))
        try:
            yield temporary
            synced(temporary)
            if not directory.exists():
                temporary.rename(directory)
            else:
                for path in sorted(temporary.iterdir(), key=lambda path: (path.name in last, path.name)):
                    _replace(path, directory / path.name)
                _fsync(directory)
            _fsync(directory.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


# How the messages of torch.save's writer are told from others.
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container")


class WriteError(OSError):
    """A file or directory could not be written."""


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Inside, errors of writing `target` become a WriteError in one line.

    A full disk shows itself in another way in each library that writes.
    """
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save's writer in C++ says it in a RuntimeError; others are not about files.
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in _TORCH_WRITER):
            raise
        reason = (isinstance(error, OSError) and error.strerror) or str(error).partition("\n")[0]
        raise WriteError(
            f"{str(target)!r} could not be written; got {reason!r}, with {_free_mb(target)} MB free there; "
            "make room or give another directory"
        ) from error


def synced(folder: Path, *, inside: bool = True) -> None:
    """Wait until a folder is on the disk; `inside`: with all its files, which are made readable for others."""
    if inside:
        folder.chmod(0o755)
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # some writers make their files private
            _fsync(path)
    _fsync(folder)


def _free_mb(path: Path) -> int:
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free >> 20


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """Yield a stream for a text file in UTF-8 that appears under `path` when the block ends without an error."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new contents, never a part."""
    with whole_file(path) as stream:
        stream.write(text)


def _replace(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
