"""What cannot be used is an error of one line, and the bank is afterwards as it was, to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import tiny_tokenizer
from helpers_serving import TEXTS, random_adapter
from transformers import AutoConfig, AutoModel

from hf_lora import AdapterBank, TextClassifier

TENSORS, CONFIG, SIDECAR = "adapter_model.safetensors", "adapter_config.json", "hf_lora.json"


def make(base: Path | str, directory: Path, labels: int = 3, seed: int = 0, **lora: Any) -> Path:
    names = [f"label {number}" for number in range(labels)]
    return random_adapter(base, directory, names, seed, lora, max_length=32)


@pytest.fixture(scope="module")
def adapters(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("refused")
    return {
        "news": make(tiny_bert_dir, folder / "news"),
        "mood": make(tiny_bert_dir, folder / "mood", 2, 1, variant="dora", bias="all"),
        "spam": make(tiny_bert_dir, folder / "spam", 5, 2, rank=4),
    }


@pytest.fixture(params=[None, 3], ids=["any number", "full"])
def bank(request: pytest.FixtureRequest, adapters: dict[str, Path]) -> AdapterBank:
    return AdapterBank.from_pretrained(adapters, precision="fp32", capacity=request.param)


def state_of(bank: AdapterBank) -> dict[str, Any]:
    """The answers of all adapters, their names, and what is in the slots of those that are loaded."""
    model = bank._loader.model
    slots = {name: entry.slot for name, entry in bank._entries.items()}
    loaded = bank.loaded
    stacks = {
        (layer, name): [stacked.factors.lora_A[slot], stacked.factors.lora_B[slot]]
        for layer, stacked in model._linear.items()
        for name, slot in slots.items()
        if slot is not None
    }
    rest = {
        (layer, which): sorted(vectors.own)
        for layer, stacked in model._linear.items()
        for which, vectors in (("scale", stacked.scale), ("shift", stacked.shift))
    }
    modules = {key: sorted(place.own) for key, place in model._replaced.items()}
    return {
        "infos": list(bank.adapters.items()),
        "loaded": loaded,
        "slots": slots,
        "taken": dict(model._kinds),
        "stacks": {key: [part.clone() for part in parts] for key, parts in stacks.items()},
        "rest": rest,
        "modules": modules,
        "logits": {name: torch.stack(bank.logits(TEXTS, name)) for name in loaded},
        "plain": {name: torch.stack(bank.logits(TEXTS, name, enabled=False)) for name in loaded},
    }


def assert_same(got: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, torch.Tensor):
        rank = len(expected)  # a stack may have grown for an adapter that did not stay
        extra = got[rank:] if got.ndim and len(got) > rank else got[:0]
        assert torch.equal(got[:rank], expected) and not extra.any(), where
    elif isinstance(expected, dict):
        assert expected.keys() <= got.keys(), where
        for key in got:
            assert_same(got[key], expected.get(key, []), f"{where} {key}")
    elif isinstance(expected, list) and expected and isinstance(expected[0], torch.Tensor):
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other, where)
    else:
        assert got == expected, where


@contextmanager
def refused(bank: AdapterBank, match: str) -> Iterator[None]:
    before = state_of(bank)
    with pytest.raises((ValueError, OSError), match=match) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert_same(state_of(bank), before)


def test_an_unknown_name_is_refused_with_the_nearest(bank: AdapterBank) -> None:
    with refused(bank, "unknown adapter; got 'new'.*did you mean 'news'"):
        bank.predict("a text", "new")
    with refused(bank, "unknown adapter; got 'new'.*did you mean 'news'"):
        bank.predict(["a text", "another"], [["mood"], ["news", "new"]])
    with refused(bank, "unknown adapter; got 'new'.*did you mean 'news'"):
        bank.logits(["a text"], "new")
    with refused(bank, "unknown adapter; got 'new'.*did you mean 'news'"):
        next(bank.predict_stream(["a text"], "new"))
    with refused(bank, "unknown adapter; got 'new'.*did you mean 'news'"):
        bank.remove("new")


def test_a_name_that_exists_is_refused(bank: AdapterBank, adapters: dict[str, Path]) -> None:
    with refused(bank, "has an adapter of that name; got 'news'"):
        bank.add(adapters["mood"], "news")
    with refused(bank, "needs a name; got '\\*'"):
        bank.add(adapters["mood"], "*")


def test_a_hub_id_that_is_not_there_is_refused(bank: AdapterBank) -> None:
    for name in ("nobody/nothing", "nobody/nothing@v2"):
        with refused(bank, "nobody/nothing"):
            bank.add(name)


def other_base(folder: Path, tokenizer: Any = None) -> Path:
    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = AutoConfig.for_model("bert", **sizes, max_position_embeddings=64, vocab_size=64)
    AutoModel.from_config(config).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def test_an_adapter_of_another_base_is_refused(bank: AdapterBank, tmp_path: Path) -> None:
    place = make(other_base(tmp_path / "base"), tmp_path / "other")
    with refused(bank, "base"):
        bank.add(place)
    with refused(bank, "another base model"):
        bank.add(TextClassifier.from_pretrained(place, merge=False), "memory")


def test_an_adapter_of_another_tokenizer_is_refused(
    bank: AdapterBank, adapters: dict[str, Path], tmp_path: Path
) -> None:
    place = shutil.copytree(adapters["news"], tmp_path / "other")
    path = next(place.rglob("tokenizer.json"))
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words["good"], words["bad"] = words["bad"], words["good"]
    path.write_text(json.dumps(tokenizer))
    _undigested(place)
    with refused(bank, "another tokenizer than the bank"):
        bank.add(place)


def _undigested(place: Path) -> None:
    """Let the sidecar say nothing about the other files, so that what they hold is looked at."""
    path = place / SIDECAR
    path.write_text(json.dumps({**json.loads(path.read_text()), "sha256": {}}))


def _tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def broken(place: Path) -> None:
        tensors = safetensors.torch.load_file(place / TENSORS)
        change(tensors)
        safetensors.torch.save_file(tensors, place / TENSORS, metadata={"format": "pt"})

    return broken


def _json(name: str, **values: Any) -> Callable[[Path], None]:
    def broken(place: Path) -> None:
        path = place / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return broken


def _truncated(place: Path) -> None:
    content = (place / TENSORS).read_bytes()
    (place / TENSORS).write_bytes(content[: len(content) // 2])


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    next(tensor for name, tensor in tensors.items() if "lora_B" in name)[0, 0] = float("nan")


def _no_head(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "classifier" in name]:
        del tensors[name]


def _no_factor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if "lora_A" in name)]


def _wide(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = torch.zeros(len(tensors[name]) + 1, tensors[name].shape[1])


def _other_rank(place: Path) -> None:
    """As peft's own adapters are, which have nothing else that says it."""
    (place / SIDECAR).unlink()
    _json(CONFIG, r=3)(place)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "changed": (_tensors(lambda tensors: next(iter(tensors.values())).mul_(2)), "was changed after it was"),
    "truncated": (_truncated, TENSORS),
    "not finite": (_tensors(_nan), "finite"),
    "no head": (_tensors(_no_head), "missing"),
    "no factor": (_tensors(_no_factor), "missing"),
    "other shapes": (_tensors(_wide), "shape"),
    "other labels": (_json(SIDECAR, labels=["a", "b", "c", "d"]), "shape"),
    "other rank": (_other_rank, "shape"),
    "no configuration": (lambda place: (place / CONFIG).unlink(), CONFIG),
    "no tensors": (lambda place: (place / TENSORS).unlink(), TENSORS),
    "half a configuration": (lambda place: (place / CONFIG).write_text('{"r": '), CONFIG),
    "nothing": (shutil.rmtree, "broken"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_adapter_is_refused(
    bank: AdapterBank, adapters: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    place = shutil.copytree(adapters["news"], tmp_path / "broken")
    damage, match = BROKEN[kind]
    if kind != "changed":
        _undigested(place)
    damage(place)
    with refused(bank, match):
        bank.add(place)
    with refused(bank, match):
        bank.add(place, "news", replace=True)


@pytest.mark.parametrize("late", ["put", "verify"])
def test_a_failure_in_the_last_step_leaves_all_others_as_they_were(
    bank: AdapterBank, tiny_bert_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    """Of an adapter with more of everything than those that are there, after all was written."""
    place = make(
        tiny_bert_dir, tmp_path / "new", 9, rank=8, variant="dora", bias="all", target_modules="all-linear"
    )
    owner = bank._loader.model if late == "put" else bank._loader
    own = getattr(owner, late)

    def failing(*values: Any) -> None:
        own(*values)
        raise ValueError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(owner, late, failing)
        for options in ({}, {"replace": True}):
            with refused(bank, "no more"):
                bank.add(place, "news" if options else None, **options)
    bank.add(place)
    alone = TextClassifier.from_pretrained(place, precision="fp32").logits(TEXTS)
    torch.testing.assert_close(torch.stack(bank.logits(TEXTS, "new")), alone, atol=1e-5, rtol=1e-5)
