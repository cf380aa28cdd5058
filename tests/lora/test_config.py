import json
import math
import subprocess
import sys
from dataclasses import fields

import pytest

from hf_lora import LoRAConfig
from hf_lora.lora.config import INITS, pattern_matches
from hf_lora.lora.initializers import INITIALIZERS


@pytest.mark.parametrize("module", ["hf_lora.lora.config", "hf_lora.training.options"])
def test_options_are_imported_without_torch(module):
    heavy = "{'torch', 'transformers', 'numpy', 'datasets'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_a_config_knows_the_initializations_and_takes_registered_ones(monkeypatch):
    assert tuple(INITIALIZERS) == INITS
    monkeypatch.setitem(INITIALIZERS._entries, "mine", INITIALIZERS.get("kaiming"))
    assert LoRAConfig(init="mine").init == "mine"


def test_every_option_has_one_sentence_of_help():
    helps = {entry.name: entry.metadata["help"] for entry in fields(LoRAConfig)}
    assert all(text.endswith(".") and "\n" not in text for text in helps.values()), helps
    flags = {entry.name: entry.metadata["flag"] for entry in fields(LoRAConfig)}
    assert {name for name, flag in flags.items() if flag} == {"train_head"}


def test_order_and_repetition_of_projections_do_not_matter():
    assert LoRAConfig(projections="vqq") == LoRAConfig(projections="qv")
    assert LoRAConfig(projections=["o", "k"]).projections == "ko"


def test_scaling_is_alpha_over_rank_with_patterns():
    config = LoRAConfig(rank=8, alpha=16, rank_pattern={"query": 4}, alpha_pattern={r"layer\.1\..*": 2})
    assert config.scaling_of("layer.0.key") == 2.0
    assert config.scaling_of("layer.0.query") == 4.0
    assert config.scaling_of("layer.1.query") == 0.5
    assert config.rank_of("bert.layer.0.query") == 4 and config.rank_of("layer.0.my_query") == 8


def test_first_matching_pattern_wins():
    config = LoRAConfig(rank_pattern={"self.query": 2, "query": 4})
    assert (config.rank_of("layer.0.self.query"), config.rank_of("layer.0.cross.query")) == (2, 4)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("query", "a.b.query", True),
        ("query", "query", True),
        ("query", "a.myquery", False),
        ("query", "a.query.dense", False),
        (r"layer\.\d\.query", "bert.layer.3.query", True),
    ],
)
def test_patterns_match_the_end_of_the_name(pattern, name, expected):
    assert pattern_matches(pattern, name) is expected


def test_json_round_trip():
    config = LoRAConfig(
        rank=4, target_modules=["query"], layers=[0, -1], rank_pattern={"query": 2}, bias="all"
    )
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_key_is_refused():
    with pytest.raises(
        ValueError, match=r"unknown keyword of LoRAConfig; got 'ranks'; .*; did you mean 'rank'\?"
    ):
        LoRAConfig.from_dict({"ranks": 3})


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        LoRAConfig().rank = 3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rank", 0, "rank is not a rank; got 0"),
        ("rank", 2.0, "rank is not a rank; got 2.0"),
        ("rank", True, "rank is not a rank; got True"),
        ("alpha", 0, "alpha is not usable; got 0"),
        ("alpha", -1, "alpha is not usable; got -1"),
        ("alpha", math.nan, "alpha is not usable; got nan"),
        ("alpha", "16", "alpha is not usable; got '16'"),
        ("dropout", 1.0, "dropout is not a probability; got 1.0"),
        ("dropout", -0.1, "dropout is not a probability"),
        ("projections", "", "projections are not roles; got ''"),
        ("projections", "query", "projections are not roles; got 'query'"),
        ("projections", [1], r"projections are not roles; got \[1\]"),
        ("target_modules", [], "target_modules is not usable"),
        ("target_modules", ["query", 3], "target_modules is not usable"),
        ("target_modules", "quer(y", "target_modules has an invalid pattern"),
        ("layers", [], "layers are not block numbers"),
        ("layers", ["0"], "layers are not block numbers"),
        ("rank_pattern", {"query": 0}, r"rank_pattern\['query'\] is not a rank"),
        ("rank_pattern", {"(": 1}, "rank_pattern has an invalid pattern"),
        ("alpha_pattern", {"query": 0}, r"alpha_pattern\['query'\] is not usable"),
        ("bias", "some", "unknown bias mode; got 'some'; expected one of none, lora_only, all"),
        ("init", "zeros", "unknown initialization; got 'zeros'"),
    ],
)
def test_bad_values_are_refused_in_one_line(field, value, message):
    with pytest.raises(ValueError, match=message) as error:
        LoRAConfig(**{field: value})
    assert "\n" not in str(error.value)
