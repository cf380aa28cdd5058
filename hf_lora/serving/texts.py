"""What a classifier takes: texts, or pairs of texts, as the columns of its training say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_lora._text import shortened

Text = str | Sequence[str] | Mapping[str, str]
"""A text; for models of text pairs (first, second); or either as a dictionary with the adapter's `text_columns`."""

_KINDS = {1: "one text", 2: "a pair"}
# What bytes of another encoding, or half an emoji of JSON, leave in a string. No tokenizer takes it.
_SURROGATE = re.compile("[\ud800-\udfff]")


def is_pair(texts: Any, columns: Sequence[str]) -> bool:
    """Whether a tuple is one pair. Raises ValueError where it could be two texts as well."""
    if not isinstance(texts, tuple) or [type(part) for part in texts] != [str, str]:
        return False
    if not columns:
        raise ValueError(
            f"the adapter does not say whether it knows pairs; got the tuple {shortened(texts)}; expected "
            "[(first, second)] for a pair, [first, second] for two texts"
        )
    return len(columns) == 2


def several(texts: Any) -> Any:
    """The same. Raises ValueError for what is no collection of texts, or one text: its letters would be they."""
    if not isinstance(texts, Iterable) or isinstance(texts, str | bytes | Mapping):
        raise ValueError(f"not texts; got {shortened(texts)}; expected a string or a list of strings")
    if hasattr(texts, "columns"):  # a DataFrame gives the names of its columns
        raise ValueError(
            f"not texts; got a {type(texts).__name__}; expected one of its columns, or a list of strings"
        )
    return texts


def shown(text: Text, columns: Sequence[str]) -> str | list[str]:
    """A text as it is answered: a string, or a list of a pair's two."""
    if isinstance(text, str):
        return text
    parts = _parts(text, columns)
    return parts[0] if isinstance(text, Mapping) and len(parts) == 1 else list(parts)


def in_columns(texts: Sequence[Text], columns: Sequence[str]) -> list[list[str]]:
    """The texts, or the first and the second of all pairs. Raises ValueError for what the adapter does not know."""
    parts = [_parts(text, columns) for text in texts]
    if len(set(map(len, parts))) > 1:
        raise ValueError("single texts and text pairs cannot be mixed in one call")
    if parts and columns and len(parts[0]) != len(columns):
        raise ValueError(
            f"not what the adapter was trained on; got {_KINDS[len(parts[0])]}, {shortened(texts[0])}; expected "
            f"{_KINDS[len(columns)]} ({', '.join(columns)})"
        )
    return list(map(list, zip(*parts, strict=True)))


def _parts(text: Any, columns: Sequence[str]) -> tuple[str, ...]:
    if isinstance(text, Mapping):
        if not columns or not text.keys() >= set(columns):
            expected = (
                f"the adapter's columns {', '.join(columns)}" if columns else "a string or a pair of strings"
            )
            raise ValueError(
                f"not a text; got a dictionary with the keys {shortened(list(text))}; expected {expected}"
            )
        text = tuple(text[name] for name in columns)
    parts = (text,) if isinstance(text, str) else text
    if isinstance(parts, list | tuple) and len(parts) in (1, 2) and all(isinstance(p, str) for p in parts):
        if any(_SURROGATE.search(part) for part in parts):
            raise ValueError(
                f"not a text; got {shortened(text)}, with half a character; expected valid Unicode"
            )
        return tuple(parts)
    raise ValueError(f"not a text; got {text!r}; expected a string or a pair of strings")
