"""Texts for a terminal and a page; patterns in bounded time, compared with Python's own expressions."""

from __future__ import annotations

import json
import random
import re

import pytest

from hf_lora._text import (
    Budget,
    Pattern,
    PatternTable,
    dotted_ends,
    in_markdown,
    json_line,
    one_line,
    printable,
)

ATOMS = (
    *(
        "a",
        "b",
        "1",
        r"\.",
        ".",
        r"\d",
        r"\D",
        r"\w",
        r"\W",
        r"\s",
        r"\S",
        "[ab]",
        "[^a]",
        "[a-b1]",
        r"[^\d.]",
    ),
    *(r"\b", r"\B", "^", "$", r"\A", r"\Z", "", r"(?<=a)", r"(?<!b.)", r"(?<=[ab]\d)"),
)
COUNTS = ("*", "+", "?", "{2}", "{1,3}", "{2,}", "{,2}", "*?", "+?", "{1,2}?")


def random_pattern(draw: random.Random, depth: int = 0) -> str:
    """An expression of a few parts, mostly one that matches something."""
    kind = draw.random() if depth < 4 else 0.0
    if kind < 0.35:
        return draw.choice(ATOMS)
    inner = random_pattern(draw, depth + 1)
    if kind < 0.55:
        return inner + random_pattern(draw, depth + 1)
    if kind < 0.7:
        return f"({inner}|{random_pattern(draw, depth + 1)})"
    return f"(?:{inner}){draw.choice(COUNTS)}" if kind < 0.95 else f"(?{draw.choice('=!')}{inner})"


def test_patterns_match_what_pythons_expressions_match():
    draw, matched = random.Random(0), 0
    for _ in range(700):
        pattern = random_pattern(draw)
        whole, end = re.compile(pattern), re.compile(rf"(.*\.)?({pattern})")
        for _ in range(4):
            name = "".join(draw.choice("aab..1\n") for _ in range(draw.randint(0, 6)))
            wanted = whole.fullmatch(name) is not None
            assert Pattern("it", pattern).matches(name) is wanted, (pattern, name)
            at_end = end.fullmatch(name) is not None
            assert Pattern("it", pattern).matches(name, end=True) is at_end, (pattern, name)
            matched += wanted + at_end
    assert matched > 500


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        (r".*\.(query|value)", "layer.0.query", True),
        (r"^(?!.*(lm_head|vision)).*(q_proj|v_proj)$", "model.layers.0.q_proj", True),
        (r"^(?!.*(lm_head|vision)).*(q_proj|v_proj)$", "vision.layers.0.q_proj", False),
        (r"^(language_model(?=\.).*\.(o_proj|k_proj))$", "language_model.layers.3.k_proj", True),
        (
            r"(?:.*?)(?:layers|blocks)\.(?P<n>[0-9]{1,2})\..*\b(?:q|k)_proj",
            "m.layers.11.self_attn.q_proj",
            True,
        ),
        (r"model\.layers\.\d+\.mlp\.(?:up|down)_proj", "model.layers.0.mlp.gate_proj", False),
    ],
)
def test_patterns_that_people_write(pattern, name, matches):
    assert Pattern("it", pattern).matches(name) is matches


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "a{10000000}",
            "((a{1000}){1000}){1000}",
            "(.*)*(.*)*(.*)*!",
            "(a|a|b|.)*!",
            "(((.*)*)*)*!",
            "(a+)+$",
        ),
        *("(?:(?:(?:.?){300}){300}){300}!", r"(?=(.*)*!)", r"(.*a|.*b|.*)*(?<!a)!"),
    ],
)
def test_patterns_that_backtrack_or_unfold_cost_little(pattern):
    budget = Budget()
    assert not Pattern("it", pattern, budget).matches("a" * 60 + "b")
    assert Budget.STEPS - budget.left < Budget.STEPS / 10


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        *(
            ("(", "unterminated"),
            (")|(", "unbalanced"),
            ("a" * 2000, "at most 1000 characters"),
            (3, "unusable"),
        ),
        *((None, "unusable"), ("(?x)query #", "flags"), ("(?i)query", "flags"), ("(?s:.)", "flags")),
        *((r"(a)\1", "groupref is not supported"), ("a{99999999999999999999}", "invalid pattern")),
        *(
            ("(" * 400 + ")" * 400, "invalid pattern"),
            ("(?:" * 30 + "a" + ")*" * 30, "nested more than 20 deep"),
        ),
    ],
)
def test_what_is_no_pattern_is_refused_in_one_line(pattern, reason):
    with pytest.raises(ValueError, match=reason) as error:
        Pattern("rank_pattern", pattern)
    assert "rank_pattern" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300


def test_all_patterns_of_an_adapter_share_one_budget(monkeypatch):
    monkeypatch.setattr(Budget, "STEPS", 200_000)
    budget = Budget()
    table = PatternTable("rank_pattern", {f"(.*.*)*{number}": 1 for number in range(400)}, budget)
    with pytest.raises(ValueError, match="takes too long"):
        for number in range(1000):
            table.get(f"layer.{number}.attention.output.dense", None)
    with pytest.raises(ValueError, match="too many patterns; got 30,000"):
        PatternTable("rank_pattern", {f"a.*{number}": 1 for number in range(30_000)}, budget)


def test_the_first_pattern_that_matches_wins_and_names_are_looked_up():
    values = {
        r"^layer\.1\.query": 1,
        r"layer\..*query": 2,
        "query": 3,
        r"1\.value": 4,
        "^value": 5,
        "query.*": 6,
    }
    table = PatternTable("rank_pattern", values, budget := Budget())
    names = (
        "layer.1.query",
        "a.layer.1.query",
        "b.query",
        "layer.1.value",
        "value",
        "b.value",
        "query_2",
        "query",
    )
    assert [table.get(name, 0) for name in names] == [1, 2, 3, 4, 5, 0, 6, 3]
    many = PatternTable("rank_pattern", {f"layer\\.{n}\\.query": n for n in range(15_000)}, budget)
    assert [many.get(f"bert.layer.{n}.query", None) for n in range(15_000)] == list(range(15_000))
    assert budget.left > Budget.STEPS / 2


def test_dotted_ends():
    assert list(dotted_ends("a.b.c")) == ["a.b.c", "b.c", "c"] and list(dotted_ends("")) == []


def test_printable_texts():
    assert printable("a\x1b[31mb\n\u202ec\x00\x9b é 漢") == "a\\x1b[31mb\\n\\u202ec\\x00\\x9b é 漢"


def test_an_error_is_one_line_of_bounded_length():
    assert one_line(ValueError("a\n  b\x9bc")) == "a b\\x9bc"
    assert len(one_line(ValueError("x" * 100_000))) < 2100


@pytest.mark.parametrize(
    "text", ["\x1b]0;owned\x07", "\x9b31m", "a\u202eb", "\x7f", "\U000e0041", "\u2028", "\ud800", "é漢 \xa0"]
)
def test_json_lines_have_nothing_that_a_terminal_obeys(text):
    line = json_line({"label": text})
    assert json.loads(line) == {"label": text}
    assert printable(line) == line and ("\\" in line or text in line)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("not_entailment", "not_entailment"),
        ("LABEL_0, a-b (c) & d #1", "LABEL_0, a-b (c) & d #1"),
        ("<img src=x onerror=alert(1)>", r"\<img src=x onerror=alert(1)\>"),
        ("![](https://x/y.png)", r"!\[\](https://x/y.png)"),
        ("a|b\\|c `d` *e*", r"a\|b\\\|c \`d\` \*e\*"),
        ("---\nlicense: mit\n---", "--- license: mit ---"),
        ("&lt;b&gt; \u202e", r"\&lt;b\&gt; \\u202e"),
    ],
)
def test_texts_on_a_page_are_no_markup(text, shown):
    assert in_markdown(text) == shown
