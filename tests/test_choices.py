from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, fields, replace

import pytest

from hf_lora._choices import Registry, nearest, option
from hf_lora.data import DataConfig
from hf_lora.lora.config import LoRAConfig
from hf_lora.recipe.options import FinetuneOptions


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


@pytest.mark.parametrize(
    ("name", "known", "near"),
    [
        ("adamm", ["sgd", "adamw_torch", "adamw_bnb_8bit", "adalomo"], "adamw_torch"),
        ("f1", ["loss", "f1_macro", "f1_micro"], "f1_macro"),
        ("cosin", ["linear", "cosine", "cosine_with_restarts"], "cosine"),
        ("BF16", ["auto", "bf16"], "bf16"),
        ("Label", ["text", "LABEL"], "LABEL"),
        (3, [1, 30], "30"),
        ("speed", ["loss", "accuracy"], None),
        ("", ["_hidden", "loss"], None),
        (["mean"] * 100_000, ["mean", "cls"], None),
    ],
)
def test_the_nearest_of_known_names_is_suggested(name, known, near):
    assert nearest(name, known) == (f"; did you mean {near!r}?" if near else "")


def test_a_suggestion_has_its_prefix_and_knows_other_tools():
    assert nearest("lr", ["learning_rate"], prefix="--", meant={"lr": "learning_rate"}) == (
        "; did you mean '--learning_rate'?"
    )


@pytest.mark.parametrize(
    ("kind", "keyword", "near"),
    [
        *((LoRAConfig, name, "rank") for name in ("rnk", "r", "lora_rank")),
        *((LoRAConfig, f"lora_{name}", name) for name in ("alpha", "dropout")),
        (LoRAConfig, "layers_to_transform", "layers"),
        (LoRAConfig, "use_dora", "variant"),
        (DataConfig, "txt_column", "text_column"),
        (FinetuneOptions, "poolng", "pooling"),
    ],
)
def test_an_unknown_keyword_is_answered_with_the_nearest_field(kind, keyword, near):
    expected = rf"^unknown keyword of {kind.__name__}; got '{keyword}'; expected some of .*; did you mean '{near}'\?$"
    with pytest.raises(ValueError, match=expected):
        kind(**{keyword: 4})


def test_a_dataclass_that_checks_its_keywords_is_copied_and_pickled_as_any():
    config = LoRAConfig(rank=3, rank_pattern={"query": 2})
    copies = [copy.deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config, alpha=16.0)]
    assert copies == [config] * 3


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
