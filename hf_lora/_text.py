"""Texts for a terminal and a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unicodedata import category

# A table of more labels than these is folded on a card, and cut on the terminal.
MANY_LABELS = 20

# Control and format characters, lone surrogates, line and paragraph separators.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str) -> str:
    """The text with control characters, line breaks included, and marks that turn the direction of writing escaped.

    Labels and names come from files of others; a terminal must not obey what stands in them.
    """
    return "".join(
        character.encode("unicode_escape").decode() if category(character) in _UNSEEN else character
        for character in text
    )


def in_words(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values for people: three digits of a float, lists with commas, nothing for None."""
    rows = []
    for name, value in facts.items():
        if isinstance(value, list | tuple):
            value = ", ".join(map(str, value))
        elif isinstance(value, int | float):
            value = f"{value:.3g}" if isinstance(value, float) else f"{value:,}"
        if value is not None:
            rows.append((name.replace("_", " "), str(value)))
    return rows
