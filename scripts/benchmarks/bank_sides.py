"""What the bank's benchmark compares: adapters with random updates, the bank, and others that run many of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from data_sets import BASE
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lora import AdapterBank, LoRAConfig, TextClassifier, load_classifier, lora_layers, save_adapter
from hf_lora.models.loading import cast_frozen, choose_precision, load_base
from hf_lora.models.pooling import NATIVE

RANK, BATCH, MAX_LENGTH = 8, 32, 128
POOLED = "mean"
# Drawn batches, which the rounds take one after the other.
DRAWS = 32


def labels_of(index: int) -> int:
    """The number of labels of an adapter: two to six."""
    return 2 + index % 5


def pooling_of(index: int, heads: str) -> str:
    """The head of an adapter. heads: "mean", "native", or "mixed", where every second one is native."""
    if heads == "mixed":
        return NATIVE if index % 2 else POOLED
    return heads


def write_adapters(
    folder: Path, count: int, heads: str, *, labels: int | None = None, layers: tuple[int, ...] | None = None
) -> list[Path]:
    """Directories of adapters with random updates and heads. labels: of each; None: `labels_of`. layers: adapted."""
    models: dict[tuple[str, int], PreTrainedModel] = {}
    places = []
    for index in range(count):
        kind = pooling_of(index, heads), labels or labels_of(index)
        if kind not in models:
            names = [f"label {number}" for number in range(kind[1])]
            config = LoRAConfig(rank=RANK, layers=layers)
            models[kind], _ = load_classifier(BASE, names, config, pooling=kind[0], max_length=MAX_LENGTH)
        _randomize(models[kind])
        places.append(save_adapter(models[kind], folder / str(index)))
    return places


@torch.no_grad()
def _randomize(model: PreTrainedModel) -> None:
    layers = {
        id(p): name[-1] for layer in lora_layers(model).values() for name, p in layer.named_parameters()
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            # A as it is drawn before a training, B and the head as large as after one.
            nn.init.normal_(parameter, std=0.05 if layers.get(id(parameter)) == "A" else 0.02)


def grow(bank: AdapterBank, places: Sequence[Path], count: int) -> None:
    """Add adapters, called by their numbers, until the bank has `count`."""
    for index in range(len(bank.adapters), count):
        bank.add(places[index], str(index))


def new_bank(place: Path, precision: str) -> AdapterBank:
    """A bank with one adapter, called "0"."""
    return AdapterBank.from_pretrained({"0": place}, precision=precision, device="cpu")


def plain_model(precision: str, pooling: str = POOLED, labels: int = 2) -> PreTrainedModel:
    """The classifier of the same class and precision without an adapter."""
    model, _ = load_base(BASE, [str(number) for number in range(labels)], pooling=pooling)
    cast_frozen(model, choose_precision(precision, "cpu").dtype)
    return model.requires_grad_(False).eval()


def token_inputs(tokens: int, count: int = BATCH) -> dict[str, Tensor]:
    """Random tokens `(count, tokens)` without padding."""
    ids = torch.randint(2000, 28000, (count, tokens), generator=torch.Generator().manual_seed(tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def drawn(count: int, size: int = BATCH, seed: int = 0) -> list[int]:
    """The numbers of the adapters, of `count`, that the rows of a batch have, in order."""
    return sorted(random.Random(1000 * seed + count).choices(range(count), k=size))


def spread_evenly(count: int, size: int = BATCH) -> list[int]:
    """The numbers of the adapters when each of `count` has as many rows as the others."""
    return [row * count // size for row in range(size)]


def plain_side(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """One pass without adapters."""

    @torch.inference_mode()
    def run() -> Tensor:
        return model(**inputs).logits

    return run


def bank_side(
    bank: AdapterBank, inputs: Mapping[str, Tensor], batches: Sequence[Sequence[int]]
) -> Callable[[], list[Tensor]]:
    """One pass of the bank's model; each call takes the next of the batches, which say the adapter of each row."""
    info = bank.adapters
    slots: Iterator[list[int]] = cycle(
        [
            # Those with one kind of head stand side by side.
            [bank._entries[name].slot or 0 for name in sorted(map(str, rows), key=lambda n: info[n].pooling)]
            for rows in batches
        ]
    )

    @torch.inference_mode()
    def run() -> list[Tensor]:
        return [logits for _, logits in bank._loader.model(inputs, next(slots))]

    return run


def fan_out_side(bank: AdapterBank, text: str) -> Callable[[], list[Tensor]]:
    """The outputs of all adapters for a text, without the answers that `predict` makes of them."""
    return lambda: bank._passes.logits([text], bank._known(["*"]), None)[0]


def peft_side(
    places: Sequence[Path], inputs: Mapping[str, Tensor], rows: Sequence[int]
) -> Callable[[], Tensor]:
    """peft's mixed batch: `adapter_names` says the adapter of each row."""
    import peft  # not in the processes whose memory is measured

    model = peft.PeftModel.from_pretrained(plain_model("fp32", NATIVE), places[0], adapter_name="0")
    for index, place in enumerate(places[1:], 1):
        model.load_adapter(place, str(index))
    model.eval()
    names = [str(row) for row in rows]

    @torch.inference_mode()
    def run() -> Tensor:
        return model(**inputs, adapter_names=names).logits

    return run


def copies_side(
    classifiers: Sequence[TextClassifier], inputs: Mapping[str, Tensor], rows: Sequence[int]
) -> Callable[[], Tensor]:
    """A merged model for each adapter, on its own rows."""
    parts = {
        number: [place for place, row in enumerate(rows) if row == number] for number in dict.fromkeys(rows)
    }
    given = {
        number: {name: tensor[places] for name, tensor in inputs.items()} for number, places in parts.items()
    }

    @torch.inference_mode()
    def run() -> Tensor:
        return torch.cat([classifiers[number].model(**own).logits for number, own in given.items()])

    return run


def one_after_the_other(
    classifiers: Sequence[TextClassifier], texts: Sequence[str], rows: Sequence[int]
) -> Callable[[], list[Any]]:
    """Each classifier predicts its own texts."""
    parts: dict[int, list[str]] = {}
    for text, row in zip(texts, rows, strict=True):
        parts.setdefault(row, []).append(text)
    return lambda: [answer for row, own in parts.items() for answer in classifiers[row].predict(own)]


def texts_of(tokenizer: Any, tokens: int, count: int) -> list[str]:
    """Texts of random words that are `tokens` tokens each, with those at both ends."""
    words = sorted(
        word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 3
    )
    draw = random.Random(tokens)
    return [" ".join(draw.choices(words, k=tokens - 2)) for _ in range(count)]
