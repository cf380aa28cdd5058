"""Adapters come and go while other threads predict: an answer is always that of a whole adapter, or an error."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_serving import TEXTS, random_adapter
from torch import Tensor

from hf_lora import AdapterBank, TextClassifier

# All that an adapter can leave behind in a slot: factors, magnitudes, biases, norms, heads of several kinds.
KINDS: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (2, {}, {}),
    (5, {"rank": 6}, {}),
    (3, {"variant": "dora", "bias": "all"}, {}),
    (4, {"bias": "lora_only", "projections": "v"}, {"pooling": "mean"}),
    (2, {"variant": "dora"}, {"pooling": "mean_layers"}),
    (6, {"layers": (-1,)}, {"pooling": "cls"}),
]
SECONDS = 120.0  # for a test that hangs


def make(base: Path, directory: Path, number: int) -> Path:
    count, lora, options = KINDS[number % len(KINDS)]
    labels = [f"{number} {label}" for label in range(count)]
    return random_adapter(base, directory, labels, number, lora, **options)


@pytest.fixture(scope="module")
def adapters(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("threads")
    return {f"a{number}": make(tiny_bert_dir, folder / str(number), number) for number in range(12)}


@pytest.fixture(scope="module")
def expected(adapters: Mapping[str, Path]) -> dict[str, Tensor]:
    """The logits of every adapter alone."""
    return {
        name: TextClassifier.from_pretrained(place, precision="fp32", merge=False).logits(TEXTS)
        for name, place in adapters.items()
    }


def run_all(*works: Callable[[], None]) -> None:
    """Run each in a thread of its own; raises what one of them raised, and for one that does not end."""
    errors: list[BaseException] = []

    def caught(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=caught, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"


def check(bank: AdapterBank, expected: Mapping[str, Tensor], names: list[str], seed: int, times: int) -> None:
    """Mixed batches of random texts: each answer against the adapter's alone."""
    chooser = random.Random(seed)
    for _ in range(times):
        asked = [chooser.choice(names) for _ in range(chooser.choice([1, 3, 12]))]
        places = [chooser.randrange(len(TEXTS)) for _ in asked]
        got = bank.logits([TEXTS[place] for place in places], asked, batch_size=chooser.choice([None, 4]))
        for name, place, row in zip(asked, places, got, strict=True):
            torch.testing.assert_close(
                row, expected[name][place], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("capacity", [None, pytest.param(3, marks=pytest.mark.slow)])
def test_three_threads_predict_while_one_adds_removes_and_replaces(
    adapters: dict[str, Path], expected: dict[str, Tensor], capacity: int | None
) -> None:
    names = list(adapters)
    steady, moving = names[:6], names[6:]
    bank = AdapterBank.from_pretrained(
        {name: adapters[name] for name in steady}, precision="fp32", capacity=capacity
    )

    def change() -> None:
        for number in range(24):
            name = moving[number % len(moving)]
            bank.add(adapters[name], name)
            check(bank, expected, [name], number, 1)
            if number % 3 == 0:  # by another one, under its name
                other = moving[(number + 1) % len(moving)]
                bank.add(adapters[other], name, replace=True)
                check(bank, {name: expected[other]}, [name], number, 1)
            bank.remove(name)

    run_all(change, *(lambda seed=seed: check(bank, expected, steady, seed, 40) for seed in range(3)))
    assert list(bank.adapters) == steady and len(bank.loaded) == min(len(steady), capacity or len(steady))
    check(bank, expected, steady, 9, 5)


def test_calls_that_have_an_adapter_end_with_it(
    adapters: dict[str, Path], expected: dict[str, Tensor]
) -> None:
    """It is removed after each batch of a call, and another one of its name added: never half of each."""
    first, second = "a1", "a4"
    bank = AdapterBank.from_pretrained({"x": adapters[first]}, precision="fp32")
    own = bank._loader.model.__class__.__call__
    calls = 0

    def changing(model: Any, *inputs: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        bank.add(adapters[second if calls % 2 else first], "x", replace=True)
        return own(model, *inputs, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bank._passes, "loader", _Patched(bank._loader, changing))
        got = torch.stack(bank.logits(TEXTS, "x", batch_size=2))
    assert calls == 3
    torch.testing.assert_close(got, expected[first], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.stack(bank.logits(TEXTS, "x")), expected[second], atol=1e-5, rtol=1e-5)
    assert len(bank._slots._entries) == 1


class _Patched:
    """A loader whose model is called through a function."""

    def __init__(self, loader: Any, call: Callable[..., Any]) -> None:
        self._loader, self._call = loader, call

    def model(self, *inputs: Any, **options: Any) -> Any:
        return self._call(self._loader.model, *inputs, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def test_an_evicted_adapter_whose_directory_has_gone_is_an_error_and_the_others_go_on(
    adapters: dict[str, Path], expected: dict[str, Tensor], tmp_path: Path
) -> None:
    gone = shutil.copytree(adapters["a0"], tmp_path / "gone")
    places = {"a0": gone, **{name: adapters[name] for name in ("a1", "a2")}}
    bank = AdapterBank.from_pretrained(places, precision="fp32", capacity=2)
    assert bank.loaded == ["a1", "a2"]
    shutil.rmtree(gone)

    def fails() -> None:
        for _ in range(5):
            with pytest.raises((ValueError, OSError)) as caught:
                bank.logits(TEXTS[:1], "a0")
            assert "\n" not in str(caught.value) and str(gone) in str(caught.value)

    run_all(fails, *(lambda seed=seed: check(bank, expected, ["a1", "a2"], seed, 10) for seed in range(2)))
    assert bank.loaded == ["a1", "a2"] and list(bank.adapters) == ["a0", "a1", "a2"]


@pytest.mark.slow
def test_more_adapters_than_there_is_room_for_wait_for_each_other(
    adapters: dict[str, Path], expected: dict[str, Tensor]
) -> None:
    """Every thread wants other adapters, one at a time or as many as there are slots."""
    names = list(adapters)
    bank = AdapterBank.from_pretrained(adapters, precision="fp32", capacity=2)
    parts = [names[:5], names[3:9], names[7:]]
    run_all(
        *(
            lambda seed=seed, part=part: check(bank, expected, part, seed, 12)
            for seed, part in enumerate(parts)
        )
    )


def test_memory_is_looked_at_before_a_stack_is_made(
    adapters: dict[str, Path], expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = AdapterBank.from_pretrained({"a0": adapters["a0"]}, precision="fp32")
    model = bank._loader.model
    before = {name: layer.factors for name, layer in model._linear.items()}
    state = model.slots, model.rank

    class Full:
        available = 1000

    monkeypatch.setattr("hf_lora.bank.slots.psutil.virtual_memory", Full)
    with pytest.raises(ValueError, match=r"16 adapters of rank 6 do not fit into memory; got 0\.0 GB"):
        bank.add(adapters["a1"], "a1")
    assert (model.slots, model.rank) == state and bank.loaded == list(bank.adapters) == ["a0"]
    assert all(layer.factors is before[name] for name, layer in model._linear.items())
    check(bank, expected, ["a0"], 0, 2)
    monkeypatch.undo()
    bank.add(adapters["a1"], "a1")
    check(bank, expected, ["a0", "a1"], 0, 5)
