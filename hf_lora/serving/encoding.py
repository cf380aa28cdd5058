"""From texts, or pairs of texts as the columns of the training say, to tokens, and to batches of similar length."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_lora._text import shortened
from hf_lora.adapters.info import AdapterInfo
from hf_lora.data.collation import fill_empty, filled_places, padded
from hf_lora.models.reconcile import NO_LIMIT

Text = str | Sequence[str] | Mapping[str, str]
"""A text; for models of text pairs (first, second); or either as a dictionary with the adapter's `text_columns`."""

# Texts of a stream that are held, and sorted by length, at a time.
WINDOW = 2048
# Tokens of a batch, padding included. With more, activations grow and leave a CPU's caches.
CPU_TOKENS, TOKENS = 2048, 16_384

_KINDS = {1: "one text", 2: "a pair"}
# What bytes of another encoding, or half an emoji of JSON, leave in a string. No tokenizer takes it.
_SURROGATE = re.compile("[\ud800-\udfff]")


def is_pair(texts: Any, columns: Sequence[str]) -> bool:
    """Whether a tuple is one pair. Raises ValueError where it could be two texts as well."""
    if not isinstance(texts, tuple) or [type(part) for part in texts] != [str, str]:
        return False
    if not columns:
        raise ValueError(
            f"the adapter does not say whether it knows pairs; got the tuple {shortened(texts)}; expected "
            "[(first, second)] for a pair, [first, second] for two texts"
        )
    return len(columns) == 2


def several(texts: Any) -> Any:
    """The same. Raises ValueError for what is no collection of texts, or one text: its letters would be they."""
    if not isinstance(texts, Iterable) or isinstance(texts, str | bytes | Mapping):
        raise ValueError(f"not texts; got {shortened(texts)}; expected a string or a list of strings")
    if hasattr(texts, "columns"):  # a DataFrame gives the names of its columns
        raise ValueError(
            f"not texts; got a {type(texts).__name__}; expected one of its columns, or a list of strings"
        )
    return texts


def shown(text: Text, columns: Sequence[str]) -> str | list[str]:
    """A text as it is answered: a string, or a list of a pair's two."""
    if isinstance(text, str):
        return text
    parts = _parts(text, columns)
    return parts[0] if isinstance(text, Mapping) and len(parts) == 1 else list(parts)


def in_columns(texts: Sequence[Text], columns: Sequence[str]) -> list[list[str]]:
    """The texts, or the first and the second of all pairs. Raises ValueError for what the adapter does not know."""
    parts = [_parts(text, columns) for text in texts]
    if len(set(map(len, parts))) > 1:
        raise ValueError("single texts and text pairs cannot be mixed in one call")
    if parts and columns and len(parts[0]) != len(columns):
        raise ValueError(
            f"not what the adapter was trained on; got {_KINDS[len(parts[0])]}, {shortened(texts[0])}; expected "
            f"{_KINDS[len(columns)]} ({', '.join(columns)})"
        )
    return list(map(list, zip(*parts, strict=True)))


def _parts(text: Any, columns: Sequence[str]) -> tuple[str, ...]:
    if isinstance(text, Mapping):
        if not columns or not text.keys() >= set(columns):
            expected = (
                f"the adapter's columns {', '.join(columns)}" if columns else "a string or a pair of strings"
            )
            raise ValueError(
                f"not a text; got a dictionary with the keys {shortened(list(text))}; expected {expected}"
            )
        text = tuple(text[name] for name in columns)
    parts = (text,) if isinstance(text, str) else text
    if isinstance(parts, list | tuple) and len(parts) in (1, 2) and all(isinstance(p, str) for p in parts):
        if any(_SURROGATE.search(part) for part in parts):
            raise ValueError(
                f"not a text; got {shortened(text)}, with half a character; expected valid Unicode"
            )
        return tuple(parts)
    raise ValueError(f"not a text; got {text!r}; expected a string or a pair of strings")


def longest_text(info: AdapterInfo, tokenizer: PreTrainedTokenizerBase, config: Any) -> int:
    """The tokens to which texts are cut. config: the model's."""
    # Tokenizers without a limit report a number that they cannot take themselves.
    limit = int(min(tokenizer.model_max_length, NO_LIMIT))
    positions = getattr(config, "max_position_embeddings", None) or limit
    return info.max_length or min(limit, positions if positions > 0 else limit)


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], columns: Sequence[str], longest: int
) -> dict[str, list[list[int]]]:
    """The tokens of each text, at most `longest` and at least one; columns: those of the training."""
    encoded = dict(tokenizer(*in_columns(texts, columns), truncation=True, max_length=longest))
    fill_empty(tokenizer, encoded)
    return encoded


def batches(lengths: Sequence[int], batch_size: int | None, budget: int) -> Iterator[list[int]]:
    """Indices of the texts in each batch, the longest first: `batch_size`, or at most `budget` tokens, or one text.

    Raises ValueError for a size below 1.
    """
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ValueError(f"batch_size is not usable; got {batch_size!r}; expected at least 1")
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    while order:
        size = batch_size or max(1, budget // max(1, rounded(lengths[order[0]])))
        yield order[:size]
        del order[:size]


def to_tensors(
    tokenizer: PreTrainedTokenizerBase,
    batch: Mapping[str, list[list[int]]],
    longest: int,
    model_pad: int | None,
) -> Mapping[str, Tensor]:
    """What `tokenizer.pad` gives, in a tenth of its time: each `(rows, width)`, the width rounded up.

    longest: the tokens to which texts are cut. model_pad: the model's padding token.
    """
    pad = tokenizer.pad_token_id
    fillers = {"input_ids": pad, "token_type_ids": tokenizer.pad_token_type_id, "attention_mask": 0}
    if pad is None or not batch.keys() <= fillers.keys():
        return tokenizer.pad(dict(batch), return_tensors="pt")
    lengths = np.array([len(ids) for ids in batch["input_ids"]])
    width = int(lengths.max())
    # Only where the model is told what is padding; others may read it in a batch of one text too.
    if "attention_mask" in batch and model_pad == pad:
        width = max(width, min(rounded(width), longest))
    filled = filled_places(lengths, width, tokenizer.padding_side)
    return {name: padded(rows, filled, fillers[name]) for name, rows in batch.items()}


def rounded(length: int) -> int:
    """A length rounded up to one of eight in each doubling: 16, 18, 20, ... 32, 36, 40, ... 64, 72, ...

    oneDNN makes and keeps kernels of a few megabytes for every shape. The padding costs less: 4 % on average.
    """
    step = max(1, 1 << length.bit_length() >> 4)
    return -(-length // step) * step
