import pytest

from hf_lora._choices import Registry


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
