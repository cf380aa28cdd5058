"""Texts for a terminal and a page, and patterns for names."""

from __future__ import annotations

import importlib
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar
from unicodedata import category

# A table of more labels than these is folded on a card, and cut on the terminal.
MANY_LABELS = 20

# Control and format characters, lone surrogates, line and paragraph separators.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str) -> str:
    """The text with control characters, line breaks included, and marks that turn the direction of writing escaped.

    Labels and names come from files of others; a terminal must not obey what stands in them.
    """
    return _escaped(text, lambda character: character.encode("unicode_escape").decode())


def shortened(value: Any, limit: int = 80) -> str:
    """`repr` of a value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def one_line(error: object, limit: int = 2000) -> str:
    """What an error says, for a terminal: in one line that is cut where it is long."""
    text = printable(" ".join(str(error).split()))
    return text if len(text) <= limit else f"{text[:limit]}..."


def json_line(value: Any) -> str:
    """JSON in one line for people and programs: letters as they are, and escaped what `printable` escapes."""
    return _escaped(json.dumps(value, ensure_ascii=False), lambda character: json.dumps(character)[1:-1])


def in_markdown(text: Any) -> str:
    """The text in one line of a page or a cell of a table in Markdown, where it makes no picture, link or HTML."""
    line = printable(" ".join(str(text).split()))
    return re.sub(r"[\\`*\[\]<>|]|&(?=#?\w+;)", lambda found: f"\\{found[0]}", line)


def _escaped(text: str, escape: Callable[[str], str]) -> str:
    if text.isprintable():  # nearly always, and much quicker
        return text
    return "".join(escape(character) if category(character) in _UNSEEN else character for character in text)


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


# The parser of Python's own expressions, which PEFT uses; it has no public name.
_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_CATEGORIES = {
    **{"CATEGORY_DIGIT": r"\d", "CATEGORY_SPACE": r"\s", "CATEGORY_WORD": r"\w"},
    **{"CATEGORY_NOT_DIGIT": r"\D", "CATEGORY_NOT_SPACE": r"\S", "CATEGORY_NOT_WORD": r"\W"},
}
_PLACES = {
    **{"AT_BEGINNING": "^", "AT_BEGINNING_STRING": r"\A", "AT_END": "$", "AT_END_STRING": r"\Z"},
    **{"AT_BOUNDARY": r"\b", "AT_NON_BOUNDARY": r"\B"},
}
_CHARACTERS = ("LITERAL", "NOT_LITERAL", "IN", "ANY")


class Budget:
    """What all patterns of one adapter may cost: steps, each of which is a character that is looked at."""

    # A few seconds. The usual patterns of a large model take some ten thousands.
    STEPS = 2_000_000

    def __init__(self) -> None:
        self.left = self.STEPS

    def spend(self, steps: int, pattern: str) -> None:
        """Raises ValueError if there are not so many left."""
        self.left -= steps
        if self.left < 0:
            raise ValueError(
                f"a pattern takes too long to match; got {shortened(pattern)}; expected less than {self.STEPS:,} steps "
                "for all patterns of an adapter; use module names, or no nested repetitions"
            )


class Pattern:
    """A regular expression of Python for dotted names, without flags and back references.

    It is not searched by trial, which may take for ever: the set of all places that can be reached is taken through it
    part by part, as the bits of an integer. The time is thereby bounded by its size and the name's.
    """

    MAX_LENGTH, MAX_DEPTH = 1000, 20

    def __init__(self, what: str, pattern: Any, budget: Budget | None = None) -> None:
        """Raises ValueError, which names `what`, for anything that is no such expression."""
        expected = "expected a regular expression"
        if not isinstance(pattern, str) or len(pattern) > self.MAX_LENGTH:
            expected += f" of at most {self.MAX_LENGTH} characters"
            raise ValueError(f"{what} has an unusable pattern; got {shortened(pattern)}; {expected}")
        self.pattern, self._budget = pattern, budget or Budget()
        self._budget.spend(len(pattern), pattern)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._parts = _parser.parse(pattern)
            if self._parts.state.flags != re.UNICODE:
                raise re.error("flags are not supported")
            self._check(self._parts, 0)
        except (re.error, RecursionError, OverflowError, MemoryError) as error:
            raise ValueError(
                f"{what} has an invalid pattern; got {shortened(pattern)}; {expected} ({error})"
            ) from None

    def _check(self, parts: Any, depth: int) -> None:
        if depth > self.MAX_DEPTH:
            raise re.error(f"groups are nested more than {self.MAX_DEPTH} deep")
        for kind, value in parts:
            if kind.name not in self._STEPS and kind.name not in _CHARACTERS:
                raise re.error(f"{kind.name.lower()} is not supported")
            if kind.name == "SUBPATTERN" and (value[1] or value[2]):
                raise re.error("flags are not supported")
            for inner in _inner(kind.name, value):
                self._check(inner, depth + 1)

    def matches(self, name: str, *, end: bool = False) -> bool:
        """Whether it matches the whole of a name, or with `end` the whole or what follows one of its dots."""
        starts = 1
        for place, character in enumerate(name) if end else ():
            if character == "\n":
                break
            starts |= (character == ".") << place + 1
        return bool(self._after(self._parts, name, starts) >> len(name) & 1)

    def _after(self, parts: Any, name: str, at: int) -> int:
        """The places, as bits, that can be reached from those in `at`."""
        for kind, value in parts:
            if not at:
                break
            self._budget.spend(1 + len(name) // 64, self.pattern)
            if kind.name in _CHARACTERS:
                at = self._next(kind.name, value, name, at)
            else:
                at = self._STEPS[kind.name](self, value, name, at)
        return at

    def _next(self, kind: str, value: Any, name: str, at: int) -> int:
        """One character further, where it fits."""
        reached = 0
        for place in _places(at & ~(1 << len(name))):
            self._budget.spend(1, self.pattern)
            reached |= _fits(kind, value, name[place]) << place + 1
        return reached

    def _repeated(self, value: Any, name: str, at: int) -> int:
        low, high, parts = value
        # More repetitions than there are places reach nothing more.
        for _ in range(min(low, len(name) + 1)):
            before, at = at, self._after(parts, name, at)
            if at == before:
                break
        reached = at
        for _ in range(min(high - low, len(name) + 1)):
            at = self._after(parts, name, at) & ~reached
            if not at:
                break
            reached |= at
        return reached

    def _branched(self, value: Any, name: str, at: int) -> int:
        reached = 0
        for parts in value[1]:
            reached |= self._after(parts, name, at)
        return reached

    def _looked(self, value: Any, name: str, at: int) -> int:
        direction, parts = value
        if direction < 0:
            return at & self._after(parts, name, (2 << len(name)) - 1)
        return sum(1 << place for place in _places(at) if self._after(parts, name, 1 << place))

    _STEPS: ClassVar[dict[str, Callable[[Pattern, Any, str, int], int]]] = {
        "AT": lambda self, value, name, at: at & _found(_PLACES[value.name], name),
        "MAX_REPEAT": _repeated,
        "MIN_REPEAT": _repeated,
        "SUBPATTERN": lambda self, value, name, at: self._after(value[3], name, at),
        "BRANCH": _branched,
        "ASSERT": _looked,
        "ASSERT_NOT": lambda self, value, name, at: at & ~self._looked(value, name, at),
    }


class PatternTable:
    """Values by patterns for the end of a dotted name, as in PEFT: the first that matches gives the value."""

    MAX_PATTERNS = 20_000

    def __init__(self, what: str, values: Mapping[str, Any], budget: Budget) -> None:
        """Raises ValueError, which names `what`, for a pattern that cannot be used."""
        if len(values) > self.MAX_PATTERNS:
            expected = f"expected at most {self.MAX_PATTERNS:,}"
            raise ValueError(f"{what} has too many patterns; got {len(values):,}; {expected}")
        self._values = values
        self._exact: dict[str, tuple[int, str]] = {}
        self._others: list[tuple[int, Pattern]] = []
        self._known: dict[str, str | None] = {}
        for order, pattern in enumerate(values):
            # Large models have thousands of patterns, all of them names: these are looked up.
            if isinstance(pattern, str) and re.fullmatch(r"\^?(?:\w|\\[.-]){1,500}", pattern):
                self._exact.setdefault(pattern.replace("\\", ""), (order, pattern))
            else:
                self._others.append((order, Pattern(what, pattern, budget)))

    def first(self, name: str) -> str | None:
        """The pattern that decides about a name; None if none matches. Raises ValueError if that takes too long."""
        if name not in self._known:
            ends = (self._exact[end] for end in (f"^{name}", *dotted_ends(name)) if end in self._exact)
            order, exact = min(ends, default=(self.MAX_PATTERNS, None))
            earlier = (other for at, other in self._others if at < order)
            self._known[name] = next((o.pattern for o in earlier if o.matches(name, end=True)), exact)
        return self._known[name]

    def get(self, name: str, default: Any) -> Any:
        """The value for a name. Raises ValueError if that takes too long."""
        pattern = self.first(name)
        return default if pattern is None else self._values[pattern]


def dotted_ends(name: str) -> Iterator[str]:
    """A dotted name, and all that follows one of its dots: "a.b.c", "b.c", "c"."""
    while name:
        yield name
        name = name.partition(".")[2]


def _inner(kind: str, value: Any) -> Sequence[Any]:
    """The patterns in a part of a pattern."""
    if kind == "BRANCH":
        return list(value[1])
    return [value[-1]] if kind in ("MAX_REPEAT", "MIN_REPEAT", "SUBPATTERN", "ASSERT", "ASSERT_NOT") else []


def _places(bits: int) -> Iterator[int]:
    while bits:
        yield (bits & -bits).bit_length() - 1
        bits &= bits - 1


def _found(pattern: str, name: str) -> int:
    return sum(1 << match.start() for match in re.finditer(pattern, name))


def _fits(kind: str, value: Any, character: str) -> bool:
    """Whether a part of a pattern that stands for one character fits this one."""
    if kind == "ANY":
        return character != "\n"
    if kind == "IN":
        negated = value[0][0].name == "NEGATE"
        return any(_fits(inner.name, item, character) for inner, item in value[negated:]) is not negated
    if kind == "RANGE":
        low, high = value
        return bool(low <= ord(character) <= high)
    if kind == "CATEGORY":
        return re.match(_CATEGORIES[value.name], character) is not None
    return (ord(character) == value) is (kind == "LITERAL")
