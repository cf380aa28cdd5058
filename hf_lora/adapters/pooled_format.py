"""Adapters of pooled classifiers in PEFT's format: they are written as adapters of the bare encoder.

A classifier of transformers has another head, which would be random. None of its modules has a name of the encoder
alone, so that peft and transformers refuse it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from hf_lora.adapters.peft_format import NO_OTHER_TARGETS, PREFIX, by_pattern, from_peft, int_if_whole
from hf_lora.lora.head import belongs_to
from hf_lora.models.pooling import HEAD

_PATTERNS = ("rank_pattern", "alpha_pattern")
# A name with the number of a block in it, and what is before and after the number; or any other name.
_BLOCK = re.compile(r"(?:(.*?\.)(\d+)(?=\.))?(.*)", re.DOTALL)


def of_encoder(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Tensors and configuration of a pooled classifier as those of its bare encoder, and the encoder's name.

    The names no longer begin with the encoder's, so that peft and transformers load the adapter into the encoder and
    refuse it for a classifier, whose head would stay random.
    """
    own = from_peft(config, tensors)
    names = list(own.target_modules or ())
    encoder = names[0].partition(".")[0]
    short = {name: name.removeprefix(f"{encoder}.") for name in names}
    patterns = by_pattern(
        {short[name]: own.rank_of(name) for name in names},
        {short[name]: int_if_whole(own.alpha_of(name)) for name in names},
        anchor="^",
    )
    targets = {**NO_OTHER_TARGETS, "target_modules": _expression(short.values())}
    saved = [name.removeprefix(f"{encoder}.") for name in config.get("modules_to_save") or ()]
    changed = {"task_type": "FEATURE_EXTRACTION", "modules_to_save": saved or None, **targets, **patterns}
    start = f"{PREFIX}{encoder}."
    renamed = {
        PREFIX + key.removeprefix(start) if key.startswith(start) else key: tensor
        for key, tensor in tensors.items()
    }
    return renamed, {**config, **changed}, encoder


def _expression(names: Iterable[str]) -> str:
    """A regular expression for dotted names, the same modules of several blocks together.

    It has to match the whole name, where an item of a list matches the end of it.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        before, block, after = _BLOCK.fullmatch(name).groups(default="")  # type: ignore[union-attr]
        groups.setdefault((before, after), []).append(block)
    return "|".join(
        f"{re.escape(before)}({'|'.join(blocks)}){re.escape(after)}"
        for (before, after), blocks in groups.items()
    )


def of_classifier(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], encoder: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `of_encoder`: tensors and configuration, of checked types, with the names of the classifier."""
    changed: dict[str, Any] = {
        key: {
            rf"^{re.escape(encoder)}\.{pattern.removeprefix('^')}": number
            for pattern, number in config[key].items()
        }
        for key in _PATTERNS
        if config.get(key)
    }
    names = {key: key.removeprefix(PREFIX) for key in tensors}
    return {
        key if belongs_to(name, [HEAD]) else f"{PREFIX}{encoder}.{name}": tensors[key]
        for key, name in names.items()
    }, {**config, **changed}
