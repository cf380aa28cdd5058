"""A bank that was saved is the same again, wherever its folder is moved; a file that is broken is told in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub, folder_files
from helpers_serving import TEXTS, make_adapter

from hf_lora import AdapterBank, TextClassifier
from hf_lora.bank.saved import SavedAdapter, SavedBank

LABELS = {"news": ["a", "b"], "mood": ["c", "d", "e"], "far": ["f", "g"]}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub() as server:
        server.use(monkeypatch, tmp_path, token="")
        yield server


@pytest.fixture(scope="module")
def adapters(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("saved")
    return {
        name: make_adapter(tiny_bert_dir, folder / name, labels, max_length=32)
        for name, labels in LABELS.items()
    }


def bare(adapter: Path, directory: Path, base: str) -> Path:
    """The adapter as peft writes one: without labels and tokenizer."""
    directory.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": base, "revision": None})
    )
    shutil.copy(adapter / "adapter_model.safetensors", directory)
    return directory


def logits(bank: AdapterBank) -> dict[str, torch.Tensor]:
    return {name: torch.stack(bank.logits(TEXTS, name)) for name in bank.adapters}


def test_the_same_bank_again_from_the_hub_at_its_commit_and_from_a_folder_that_moved(
    hub: FakeHub, adapters: dict[str, Path], tiny_bert_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bank"
    shutil.copytree(adapters["news"], folder / "runs" / "news")
    peft = bare(adapters["news"], folder / "peft", "elsewhere")
    repository = hub.publish("me/mood", folder_files(adapters["mood"]))
    commit = repository.refs["main"]
    bank = AdapterBank.from_pretrained(
        {"first": "me/mood@main", "news": folder / "runs" / "news", "far": adapters["far"]},
        precision="fp32",
        capacity=2,
    )
    bank.add(peft, labels=["x", "y"], check_base=False)
    expected = logits(bank)
    assert bank.save(folder / "bank.json") == folder / "bank.json"
    assert json.loads((folder / "bank.json").read_text()) == {
        "adapters": [
            {"name": "first", "source": "me/mood", "revision": commit, "labels": None, "check_base": True},
            {"name": "news", "source": "runs/news", "revision": None, "labels": None, "check_base": True},
            {
                "name": "far",
                "source": str(adapters["far"]),
                "revision": None,
                "labels": None,
                "check_base": True,
            },
            {"name": "peft", "source": "peft", "revision": None, "labels": ["x", "y"], "check_base": False},
        ],
        "base_model": {"name_or_path": str(tiny_bert_dir), "revision": None},
        "capacity": 2,
        "format_version": 1,
    }

    repository.commit("main", {}, "everything is gone")
    shutil.move(folder, tmp_path / "moved")
    again = AdapterBank.from_pretrained(tmp_path / "moved" / "bank.json", precision="fp32")
    assert list(again.adapters) == ["first", "news", "far", "peft"] and len(again.loaded) == 2
    assert again.adapters == bank.adapters
    found = logits(again)
    for name in expected:
        assert torch.equal(found[name], expected[name])
    again.save(tmp_path / "moved" / "again.json")
    assert SavedBank.read(tmp_path / "moved" / "again.json") == SavedBank.read(
        tmp_path / "moved" / "bank.json"
    )
    assert AdapterBank.from_pretrained(tmp_path / "moved" / "bank.json", capacity=1).loaded == ["peft"]


def test_the_base_is_that_of_the_bank_and_not_of_the_adapter_that_comes_first_now(
    hub: FakeHub, adapters: dict[str, Path], tiny_bert_dir: Path, tmp_path: Path
) -> None:
    """The first one is removed, and the next one names its base by a revision that is not there."""
    repository = hub.publish("org/base", folder_files(tiny_bert_dir))
    for name in ("news", "mood"):
        shutil.copytree(adapters[name], tmp_path / name)
        values = json.loads((tmp_path / name / "hf_lora.json").read_text())
        values["base_model"].update(
            name_or_path="org/base", revision=repository.refs["main"] if name == "news" else "gone"
        )
        (tmp_path / name / "hf_lora.json").write_text(json.dumps(values))
    bank = AdapterBank.from_pretrained([tmp_path / "news", tmp_path / "mood"], precision="fp32")
    bank.remove("news")
    saved = SavedBank.read(bank.save(tmp_path / "bank.json"))
    assert (saved.base, saved.revision) == ("org/base", repository.refs["main"])
    again = AdapterBank.from_pretrained(tmp_path / "bank.json", precision="fp32")
    assert torch.equal(logits(again)["mood"], logits(bank)["mood"])
    with pytest.raises((ValueError, OSError), match="gone"):
        AdapterBank.from_pretrained([tmp_path / "mood"])
    elsewhere = AdapterBank.from_pretrained(tmp_path / "bank.json", base=str(tiny_bert_dir), precision="fp32")
    assert torch.equal(logits(elsewhere)["mood"], logits(bank)["mood"])


def test_what_was_in_memory_cannot_be_saved(adapters: dict[str, Path], tmp_path: Path) -> None:
    bank = AdapterBank.from_pretrained([adapters["news"]])
    bank.add(TextClassifier.from_pretrained(adapters["mood"]), "mood")
    with pytest.raises(
        ValueError, match=r"adapters from memory, \['mood'\]; .*save_adapter, and add the dir"
    ):
        bank.save(tmp_path / "bank.json")
    bank.remove("mood")
    bank.remove("news")
    with pytest.raises(ValueError, match="cannot be saved; got none"):
        bank.save(tmp_path / "bank.json")
    assert not list(tmp_path.iterdir())


ADAPTER = {"name": "news", "source": "news"}
GOOD: dict[str, Any] = {
    "adapters": [ADAPTER],
    "base_model": {"name_or_path": "base"},
    "capacity": None,
    "format_version": 1,
}
BROKEN: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "is not valid JSON"),
    "a list": ([], "is not a JSON object"),
    "a later version": ({**GOOD, "format_version": 2}, "another format version; got 2; expected 1"),
    "no version": ({"adapters": []}, "another format version; got None"),
    "an unknown key": ({**GOOD, "adaptors": []}, r"unknown keys; got \['adaptors'\]"),
    "an unknown key of an adapter": (
        {**GOOD, "adapters": [{**ADAPTER, "url": "x"}]},
        r"adapter 0 in .* unknown keys; got \['url'\]",
    ),
    "an unknown key of the base": (
        {**GOOD, "base_model": {"name_or_path": "x", "path": "y"}},
        r"base_model in .* unknown keys; got \['path'\]",
    ),
    "no base": ({**GOOD, "base_model": None}, "base_model in .* got None; expected an object"),
    "a base without a name": ({**GOOD, "base_model": {"revision": "x"}}, "base_model .* got no name_or_path"),
    "no adapters": ({**GOOD, "adapters": []}, r"got adapters=\[\]; expected a list of some"),
    "adapters by name": ({**GOOD, "adapters": {"a": "b"}}, "got adapters=.*; expected a list of some"),
    "an adapter that is a string": ({**GOOD, "adapters": ["news"]}, "adapter 0 in .*expected an object"),
    "an adapter without a name": ({**GOOD, "adapters": [ADAPTER, {"source": "x"}]}, "adapter 1 .* no name"),
    "an adapter without a place": ({**GOOD, "adapters": [{"name": "x"}]}, "adapter 0 .* got no source"),
    "a name that is a number": ({**GOOD, "adapters": [{**ADAPTER, "name": 3}]}, "got name=3; expected str"),
    "labels in a string": ({**GOOD, "adapters": [{**ADAPTER, "labels": "ab"}]}, "got labels='ab'"),
    "labels of numbers": ({**GOOD, "adapters": [{**ADAPTER, "labels": [1, 2]}]}, r"got labels=\[1, 2\]"),
    "a check that is a word": (
        {**GOOD, "adapters": [{**ADAPTER, "check_base": "no"}]},
        "got check_base='no'",
    ),
    "a capacity that is true": ({**GOOD, "capacity": True}, "got capacity=True; expected int"),
    "a capacity with a fraction": ({**GOOD, "capacity": 2.5}, "got capacity=2.5; expected int"),
    "an adapter that is gone": (GOOD, "no such adapter; got '.*news', which is neither a directory nor"),
    "a Hub id without a revision": (
        {**GOOD, "adapters": [{"name": "x", "source": "me/mood"}]},
        "no such adapter; got '/.*me/mood', which is neither a directory nor",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_clear_line(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    path = tmp_path / "bank.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        AdapterBank.from_pretrained(path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_two_adapters_of_one_name_and_a_capacity_of_none_are_refused(
    adapters: dict[str, Path], tiny_bert_dir: Path, tmp_path: Path
) -> None:
    entry = {"name": "x", "source": str(adapters["news"])}
    good = {**GOOD, "base_model": {"name_or_path": str(tiny_bert_dir)}, "adapters": [entry]}
    path = tmp_path / "bank.json"
    path.write_text(json.dumps(good))
    assert list(AdapterBank.from_pretrained(path).adapters) == ["x"]
    for values, message in (
        ({"adapters": [entry, entry]}, "an adapter of that name; got 'x'"),
        ({"capacity": 0}, "capacity is not usable; got 0"),
    ):
        path.write_text(json.dumps({**good, **values}))
        with pytest.raises(ValueError, match=message):
            AdapterBank.from_pretrained(path)


def test_places_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "large.json").write_text(" " * (8 << 20) + "{}")
    (tmp_path / "link.json").symlink_to("/dev/zero")
    for name, message in {
        "": "which is a directory; expected a file that AdapterBank.save wrote, or a list",
        "missing.json": "which is no file",
        "link.json": "which is no file",
        "large.json": "is too large",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            AdapterBank.from_pretrained(str(tmp_path / name))
        assert "\n" not in str(error.value)


def test_a_hub_id_is_never_taken_for_a_directory_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "mood").mkdir(parents=True)
    saved = SavedBank((SavedAdapter("mood", "me/mood", "0123"),), "base")
    saved.write(tmp_path / "bank.json")
    with pytest.raises(ValueError, match="a directory has no revisions; got 'me/mood@0123'"):
        AdapterBank.from_pretrained("bank.json")
