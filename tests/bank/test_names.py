"""Adapters in words: names, paths, Hub ids, and what is a text."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_lora.bank.names import adapters_in, may_be_adapter, named, split_name


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: two adapters in `runs`, one beside it, and what is none."""
    monkeypatch.chdir(tmp_path)
    for place in ("runs/news", "runs/mood", "single", "rank=8"):
        Path(place).mkdir(parents=True)
        Path(place, "adapter_config.json").touch()
    Path("runs/.news.0.tmp").mkdir()
    Path("runs/.news.0.tmp/adapter_config.json").touch()
    Path("runs/notes.txt").touch()
    Path("empty/logs").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("word", "name", "place"),
    [
        ("runs/news", "", "runs/news"),
        ("a=runs/news", "a", "runs/news"),
        ("a=me/mood@v=2", "a", "me/mood@v=2"),
        ("rank=8", "", "rank=8"),  # a directory
        ("rank=9", "rank", "9"),
        ("runs/rank=8", "", "runs/rank=8"),
        ("=runs/news", "", "=runs/news"),
        ("a=", "", "a="),
    ],
)
def test_a_name_stands_in_front_of_the_first_equals_sign(word: str, name: str, place: str) -> None:
    assert split_name(word) == (name, place)


@pytest.mark.parametrize(
    "word",
    [
        "single",
        "./single",
        "runs/news",
        "runs/missing",
        "me/mood",
        "me/mood@v2",
        "a=me/mood",
        "a=single",
        "~/x",
        "and/or",
    ],
)
def test_what_may_be_an_adapter(word: str) -> None:
    assert may_be_adapter(word)


@pytest.mark.parametrize(
    "word",
    [
        "good",
        "a text",
        "this and/or that",
        "",
        "empty",
        "E=mc2",
        "https://me.org/mood",
        "me@mood.org",
        "x" * 5000,
        "\x00",
    ],
)
def test_what_is_a_text(word: str) -> None:
    assert not may_be_adapter(word)


def test_adapters_are_called_like_the_last_part_of_their_path() -> None:
    words = ["runs/news/", "me/mood@v2", "other=runs/news", str(Path("single").absolute())]
    expected = {"news": "runs/news/", "mood": "me/mood@v2", "other": "runs/news", "single": words[-1]}
    assert named(words) == expected


def test_the_working_directory_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("runs/news")
    assert named([".", "../mood"]) == {"news": ".", "mood": "../mood"}


def test_two_adapters_of_one_name_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"name 'news'; got 'runs/news' and 'a/news@v2'; .* such as news_2=a/news@v2"
    ):
        named(["runs/news", "a/news@v2"])


def test_a_folder_has_its_adapters_in_order() -> None:
    found = adapters_in("runs")
    assert list(found.items()) == [("mood", Path("runs/mood")), ("news", Path("runs/news"))]


def test_half_an_adapter_is_one_so_that_it_is_an_error_later() -> None:
    Path("empty/logs/adapter_model.safetensors").touch()
    assert adapters_in("empty") == {"logs": Path("empty/logs")}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere", "no such folder; got 'nowhere'"),
        ("runs/notes.txt", "no such folder; got 'runs/notes.txt'"),
        ("empty", r"no adapter in 'empty'; got \['logs'\]; expected directories with adapter_config.json$"),
        ("single", "'single' is an adapter itself"),
    ],
)
def test_a_folder_without_adapters_is_refused(place: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapters_in(place)
