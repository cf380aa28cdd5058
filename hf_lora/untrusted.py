"""Files that others wrote, read within bounds: of size, of depth, of place, and of the time a pattern may take.

An adapter comes from anywhere. Whatever stands in its files, reading them is a correct load or a ValueError in one
line; nothing in them is executed, followed out of the directory, or believed about how much memory to take.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

MAX_JSON_BYTES = 8 << 20
MAX_HEADER_BYTES = 16 << 20
MAX_PATTERN_LENGTH = 1000
PATTERN_SECONDS = 1.0
"""How long the patterns of one adapter may take to be matched with one name."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_bytes(directory: Path, name: str, *, limit: int | None = None) -> bytes:
    """The contents of a regular file in a directory.

    Raises ValueError for a link out of it (but into the store of a Hub cache) and for more bytes than `limit`.
    """
    path = directory / name
    real, root = path.resolve(), directory.resolve()
    # In a Hub cache, models--a--b/snapshots/<commit>/<file> links to models--a--b/blobs/<digest>.
    stores = [
        folder.parent.parent / "blobs"
        for folder in (root, *root.parents)
        if folder.parent.name == "snapshots"
    ]
    if not real.is_relative_to(root) and real.parent not in stores:
        raise ValueError(
            f"{name} in {str(directory)!r} is a link to another place; got {str(real)!r}; expected a file"
        )
    size = real.stat().st_size
    if limit is not None and size > limit:
        raise ValueError(
            f"{name} in {str(directory)!r} is too large; got {size:,} bytes; expected at most {limit:,}"
        )
    with real.open("rb") as stream:
        content = stream.read(size + 1)
    if len(content) != size:
        raise ValueError(
            f"{name} in {str(directory)!r} has another size than its directory says; got {len(content)}"
        )
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
        raise ValueError(f"{source} cannot be read: {reason}") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
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
        if value is None:
            continue
        usable = isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool))
        if usable and isinstance(value, list | dict):
            usable = all(isinstance(item, str) for item in value)
        if usable and isinstance(value, float):
            usable = math.isfinite(value)
        if not usable:
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


def shortened(value: Any, limit: int = 80) -> str:
    """`repr` of a value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def check_pattern(what: str, pattern: Any) -> None:
    """Raise ValueError for what is no regular expression of reasonable length."""
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN_LENGTH:
        raise ValueError(
            f"{what} has an unusable pattern; got {shortened(pattern)}; expected a regular expression of at most "
            f"{MAX_PATTERN_LENGTH} characters"
        )
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(
            f"{what} has an invalid pattern; got {shortened(pattern)}; expected a regular expression ({error})"
        ) from None


def full_match(pattern: str, name: str) -> bool:
    """Whether a regular expression matches the whole of a name. Raises ValueError if that takes more than a second."""
    try:
        return regex.fullmatch(pattern, name, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        raise ValueError(
            f"a pattern takes too long to match; got {shortened(pattern)} for {name!r}; expected an answer within "
            f"{PATTERN_SECONDS:g} s; use one without nested repetitions"
        ) from None
