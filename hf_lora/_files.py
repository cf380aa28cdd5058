"""Files that are whole or not there, files that others wrote, and a folder that one process has for itself."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from hf_lora._text import shortened

if TYPE_CHECKING:
    from torch import Tensor

LOCK = ".hf_lora.lock"


@contextmanager
def replacing(directory: Path, *, last: Sequence[str] = ()) -> Iterator[Path]:
    """Yield an empty directory beside `directory`; on success its files replace those of the same name.

    A directory that did not exist appears complete, by one rename. In one that did, each file is replaced
    by a rename and those named in `last` come last, so that a digest in them tells a half-made change.
    Other files are left alone. On an exception nothing changes.
    """
    with writing(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(directory)
        try:
            temporary.mkdir()
            yield temporary
            synced(temporary)
            if not directory.exists():
                temporary.rename(directory)
            else:
                for path in sorted(temporary.iterdir(), key=lambda path: (path.name in last, path.name)):
                    if (directory / path.name).is_dir():
                        shutil.rmtree(directory / path.name)
                    path.replace(directory / path.name)
                _fsync(directory)
            _fsync(directory.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


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
        if isinstance(error, RuntimeError) and not re.search(
            "PytorchStreamWriter|inline_container|iostream", str(error)
        ):
            raise
        reason = (isinstance(error, OSError) and error.strerror) or str(error).partition("\n")[0]
        there = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
        raise WriteError(
            f"{str(target)!r} could not be written; got {reason!r}, with {shutil.disk_usage(there).free >> 20} MB free "
            "there; make room or give another directory"
        ) from error


def synced(folder: Path, *, inside: bool = True) -> None:
    """Wait until a folder is on the disk; `inside`: with all its files, which whoever may read the folder may read."""
    if inside:
        mode = stat.S_IMODE(
            folder.stat().st_mode
        )  # what the umask gave it; some writers make their files private
        for path in folder.rglob("*"):
            path.chmod(mode if path.is_dir() else mode & 0o666)
            _fsync(path)
    _fsync(folder)


@contextmanager
def whole_file(path: Path, *, binary: bool = False) -> Iterator[Any]:
    """Yield a stream for a file that appears under `path` when the block ends without an error: UTF-8, or bytes."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path)
        try:
            with temporary.open("xb") if binary else temporary.open("x", encoding="utf-8") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new contents, never a part."""
    with whole_file(path) as stream:
        stream.write(text)


def _beside(path: Path) -> Path:
    """A new hidden name beside `path`. What is made under it gets the modes that the umask gives."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


MAX_JSON_BYTES = 8 << 20
# Of a tokenizer; those of large vocabularies have 35 MB.
MAX_FILE_BYTES = 64 << 20
MAX_TENSORS_BYTES = 4 << 30
MAX_NAME = 500
MAX_HEADER_BYTES = 16 << 20
FLOATS = ("torch.float16", "torch.bfloat16", "torch.float32", "torch.float64")


def read_bytes(directory: Path, name: str, *, limit: int = MAX_FILE_BYTES) -> bytes:
    """The contents of a regular file in a directory; whatever an adapter brings is read here.

    Raises ValueError for a link out of it (but into the store of a Hub cache), for what is no file, such as a device,
    and for more bytes than `limit`.
    """
    path = directory / name
    real, root = path.resolve(), directory.resolve()
    # In a Hub cache, models--a--b/snapshots/<commit>/<file> links to models--a--b/blobs/<digest>.
    snapshots = (folder.parent for folder in (root, *root.parents) if folder.parent.name == "snapshots")
    stores = [folder.parent / "blobs" for folder in snapshots]
    what = f"{name} in {str(directory)!r}"
    if not real.is_relative_to(root) and real.parent not in stores:
        raise ValueError(f"{what} is a link to another place; got {str(real)!r}; expected a file")
    if not real.is_file():
        raise ValueError(f"{what} is no regular file; expected a file")
    size = real.stat().st_size
    if size > limit:
        raise ValueError(f"{what} is too large; got {size:,} bytes; expected at most {limit:,}")
    with real.open("rb") as stream:
        content = stream.read(size + 1)
    if len(content) != size:
        raise ValueError(f"{what} has another size than its directory says; got {len(content)}")
    return content


def parse_object(content: bytes, source: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError, naming `source`, for anything else."""
    try:
        value = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{source} is not usable JSON: it is nested too deeply") from None
    except ValueError as error:  # of decoding, of parsing, and of numbers with thousands of digits
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source} is not a JSON object; got {type(value).__name__}")
    return value


def parse_tensors(content: bytes, source: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, floating-point all. Raises ValueError, naming `source`, for anything else."""
    # Here, so that checks of names and patterns do not wait for torch.
    import safetensors.torch

    header = int.from_bytes(content[:8], "little")
    if header > min(MAX_HEADER_BYTES, len(content)):
        raise ValueError(
            f"{source} is no usable safetensors file; got a header of {header:,} bytes in {len(content):,}; "
            f"expected at most {MAX_HEADER_BYTES:,}, inside the file"
        )
    try:
        tensors = safetensors.torch.load(content)
    # Besides its own errors: types that torch does not have, and shapes that it cannot make.
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError, OverflowError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{source} cannot be read: {reason[:300]}") from None
    for name, tensor in tensors.items():
        if len(name) > MAX_NAME or not name.isprintable():
            raise ValueError(
                f"{source} is damaged; a tensor has no usable name; got {shortened(name)}; expected at most "
                f"{MAX_NAME} characters, all of them printable"
            )
        if str(tensor.dtype) not in FLOATS:
            raise ValueError(
                f"{source} is damaged; {name!r} holds something else than finite numbers; got {tensor.dtype}"
            )
    return tensors


def check_types(values: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], source: str) -> None:
    """Compare the values of a JSON object with the types they may have; what is not named in `kinds` is not looked at.

    Lists and dictionaries must hold strings as items and keys. Raises ValueError naming the first that differs.
    """
    for name, allowed in kinds.items():
        value = values.get(name)
        usable = isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool))
        if isinstance(value, list | dict):
            usable = usable and all(isinstance(item, str) for item in value)
        elif isinstance(value, float):
            usable = usable and math.isfinite(value)
        if value is not None and not usable:
            expected = " or ".join(kind.__name__ for kind in allowed)
            raise ValueError(f"{source} cannot be read; got {name}={shortened(value)}; expected {expected}")


def is_number(value: object) -> bool:
    """Whether a value is a finite number. True and False are integers to Python, and none here."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


@contextmanager
def reserved(output: Path) -> Iterator[None]:
    """Inside, the directory belongs to this process, until it ends, however it ends.

    Raises ValueError where another process has it, and OSError where nothing can be written.
    """
    lock = FileLock(output / LOCK)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"output_dir is in use by another run at this moment; got {str(output)!r}; expected a directory of "
                "its own for every run; wait for that run to end, or give another --output_dir"
            ) from None
    try:
        yield
    finally:
        (output / LOCK).unlink(missing_ok=True)
        lock.release()
        # A run that was refused before it wrote anything leaves nothing behind.
        if not any(output.iterdir()):
            output.rmdir()
