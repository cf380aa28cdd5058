"""Text from files of others, made fit for a terminal and a page."""

from __future__ import annotations

from unicodedata import category

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
