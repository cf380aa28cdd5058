"""Label values that stand for several labels: lists as text, names with a separator, vectors of 0 and 1."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from hf_lora.tasks.labels import SPACED_BITS, bad_label

# One item of a list in Python's notation. Two strings side by side are none: Python would join them.
_ITEM = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[+-]?[\w.]+""", re.DOTALL)
_BITS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
_BRACKETS = {"[": "]", "(": ")", "{": "}"}
# Python's parser takes much memory for each character.
_MAX_PARSED = 10_000


def as_bit(value: Any) -> int | None:
    """0 or 1, as a number, a boolean or text; None for anything else."""
    if isinstance(value, str):
        return _BITS.get(value.strip().lower())
    return int(value) if isinstance(value, int | float) and value in (0, 1) else None


def are_vectors(rows: Sequence[Any]) -> bool:
    """Whether lists are vectors of 0 and 1, a place for each label, and not the ids or names of labels.

    They are if all have the same length, two or more, and hold 0 and 1 alone. As ids of labels 0 and 1 they would name
    a label twice, or both in each row.
    """
    lengths = {len(row) if isinstance(row, list | tuple) else 0 for row in rows}
    return len(lengths) == 1 and min(lengths) > 1 and all(as_bit(v) is not None for row in rows for v in row)


def split_names(values: Sequence[Any], split: str, known: Sequence[str] = ()) -> tuple[list[Any], str]:
    """Label values with a list in the place of each text, and in words how the texts were understood.

    A text is a list in Python's or JSON's notation where all of them are, else names with a separator: "|", ";" or ",".
    known: names of labels; a text that is one is not divided.
    Raises ValueError: a list cannot be read, or both ";" and "," separate.
    """
    texts = [(row, value.strip()) for row, value in enumerate(values, 1) if isinstance(value, str)]
    filled = [(row, text) for row, text in texts if text and text not in known]
    opened = [
        row for row, text in filled if text[0] + text[-1] in ("[]", "{}") or SPACED_BITS.fullmatch(text)
    ]
    lists = {row: parsed(text) for row, text in filled if _BRACKETS.get(text[0]) == text[-1]}
    if opened or (len(lists) == len(filled) > 0 and None not in lists.values()):
        for row, text in filled:
            if lists.get(row) is None:
                raise bad_label(text, split, row, 'expected a list such as ["a", "b"], as in other rows')
        words = "lists written as text"
    else:
        marks = [mark for mark in "|;," if any(mark in text for _, text in filled)]
        if marks == [";", ","]:
            row, text = next((row, text) for row, text in filled if "," in text)
            raise bad_label(
                text, split, row, "both ';' and ',' are there; write '|' between labels, or a list"
            )
        mark = marks[0] if marks else "|"
        lists = {row: [part for part in map(str.strip, text.split(mark)) if part] for row, text in filled}
        words = f"names with {mark!r} between them" if marks else "one name each"
    found = {row: [text] if text else [] for row, text in texts} | lists
    return [found.get(row, value) for row, value in enumerate(values, 1)], words if filled else "lists"


def are_lists(texts: Sequence[str]) -> bool:
    """Whether texts are meant as lists: all are in square brackets, or in others and can be read."""
    texts = [text.strip() for text in texts]
    square = all(text[:1] + text[-1:] == "[]" for text in texts)
    return len(texts) > 0 and (
        square or all(_BRACKETS.get(text[:1]) == text[-1:] and parsed(text) is not None for text in texts)
    )


def parsed(text: str) -> list[Any] | None:
    """A list, tuple or set of plain values in JSON's or Python's notation; None for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if len(text) > _MAX_PARSED:
            return None
        try:
            node = ast.parse(text, mode="eval").body
            items = node.elts if isinstance(node, ast.List | ast.Tuple | ast.Set) else [node]
            sources = [ast.get_source_segment(text, item) or "" for item in items]
            value = ast.literal_eval(node) if all(map(_ITEM.fullmatch, sources)) else None
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return None
    if not isinstance(value, list | tuple | set):
        return None
    flat = [item for item in value if isinstance(item, str | int | float)]
    return flat if len(flat) == len(value) else None
