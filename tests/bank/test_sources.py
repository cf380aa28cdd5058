"""Where a bank's adapters come from: memory, directories and the Hub, and what it loads again of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub, folder_files
from helpers_serving import TEXTS, make_adapter
from torch.testing import assert_close

from hf_lora import AdapterBank, TextClassifier


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub() as server:
        server.use(monkeypatch, tmp_path, token="")
        yield server


def logits_of(bank: AdapterBank, name: str) -> torch.Tensor:
    return torch.stack(bank.logits(TEXTS, name))


def test_a_model_from_memory_stays_as_it_was_added_and_is_not_kept(
    tiny_bert_dir: Path, tmp_path: Path
) -> None:
    first = make_adapter(tiny_bert_dir, tmp_path / "first", ["a", "b"], max_length=32)
    other = TextClassifier.from_pretrained(
        make_adapter(tiny_bert_dir, tmp_path / "other", list("abc"), max_length=32), precision="fp32"
    )
    bank = AdapterBank.from_pretrained([first], precision="fp32", capacity=1)
    bank.add(other, "other")
    expected = other.logits(TEXTS)
    for parameter in other.model.parameters():
        parameter.data.fill_(1)
    model = weakref.ref(other.model)
    del other
    gc.collect()
    assert model() is None
    for _ in range(2):
        assert_close(logits_of(bank, "other"), expected, atol=1e-5, rtol=1e-5)
        logits_of(bank, "first")


def test_an_adapter_of_a_branch_is_loaded_again_at_its_commit(
    hub: FakeHub, tiny_bert_dir: Path, tmp_path: Path
) -> None:
    first, second = (
        make_adapter(tiny_bert_dir, tmp_path / name, labels, max_length=32)
        for name, labels in (("first", ["a", "b"]), ("second", ["c", "d", "e"]))
    )
    commit = hub.publish("me/mood", folder_files(first)).refs["main"]
    bank = AdapterBank.from_pretrained(["me/mood", second], precision="fp32", capacity=1)
    others = hub.publish("me/other", folder_files(second)).find("main")
    assert others is not None
    hub.repositories["me/mood"].commit("main", others.files, "other labels")
    expected = TextClassifier.from_pretrained(first, precision="fp32").logits(TEXTS)
    assert bank.loaded == ["second"]
    assert_close(logits_of(bank, "mood"), expected, atol=1e-5, rtol=1e-5)
    bank.add("me/mood@main", "newer")
    assert bank.adapters["newer"].labels == ("c", "d", "e")
    assert bank.add(f"me/mood@{commit}", "older") == "older"
    assert_close(logits_of(bank, "older"), expected, atol=1e-5, rtol=1e-5)


def test_a_directory_has_no_revisions(tiny_bert_dir: Path, tmp_path: Path) -> None:
    directory = make_adapter(tiny_bert_dir, tmp_path / "first", ["a", "b"])
    with pytest.raises(
        ValueError, match=r"a directory has no revisions; got '.*first@v2'; expected '.*first'"
    ):
        AdapterBank.from_pretrained([f"{directory}@v2"])
    renamed = directory.rename(tmp_path / "first@v2")
    assert AdapterBank.from_pretrained([renamed]).loaded == ["first@v2"]
    # A directory that looks like one of the Hub's cache is one all the same.
    (tmp_path / "snapshots").mkdir()
    inside = renamed.rename(tmp_path / "snapshots" / "first")
    assert AdapterBank.from_pretrained([inside]).loaded == ["first"]
