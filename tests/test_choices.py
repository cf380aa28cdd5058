from __future__ import annotations

from dataclasses import dataclass, fields

import pytest

from hf_lora._choices import Registry, option


@pytest.fixture
def registry():
    entries = Registry("fruit")
    entries.register("apple", 1)
    entries.register("pear", 2)
    return entries


def test_get_returns_what_was_registered(registry):
    assert (registry.get("apple"), registry.get("pear")) == (1, 2)
    assert registry.items() == [("apple", 1), ("pear", 2)]
    assert "apple" in registry and "plum" not in registry and len(registry) == 2


def test_unknown_key_lists_the_known_and_suggests_the_closest(registry):
    with pytest.raises(
        ValueError, match=r"unknown fruit; got 'aple'; expected one of apple, pear; did you mean 'apple'"
    ):
        registry.get("aple")


def test_a_key_is_not_replaced_by_accident(registry):
    with pytest.raises(ValueError, match="'apple' is registered already"):
        registry.register("apple", 3)
    registry.register("apple", 3, replace=True)
    assert registry.get("apple") == 3


@dataclass
class Options:
    needed: str = option(help="Needed.")
    size: int = option(3, help="Size.", flag="n")
    names: list[str] = option([], help="Names.", level=2)


def test_an_option_holds_help_and_flag_and_copies_a_default_that_can_change() -> None:
    first, second = Options("a"), Options("b")
    first.names.append("x")
    assert (second.size, second.names) == (3, [])
    assert [dict(entry.metadata) for entry in fields(Options)] == [
        {"help": "Needed.", "flag": None},
        {"help": "Size.", "flag": "n"},
        {"help": "Names.", "flag": None, "level": 2},
    ]
    with pytest.raises(TypeError, match="needed"):
        Options()
