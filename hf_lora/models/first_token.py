"""Compute the last block for the first token alone, where the classifier reads no other.

BERT and its relatives classify by the state of the first token. In their last block attention needs the keys and values
of every token, but the output projection and the feed-forward layers only the first: leaving out the others changes
neither logits nor gradients, and saves an eighth of the arithmetic of six blocks. Each model is tried, not looked up.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_lora.models.verify import evaluating, relative_difference

_ROWS, _TOKENS = 3, 7


@contextmanager
def first_token_only(model: nn.Module) -> Iterator[str | None]:
    """Inside, the last block leaves out all tokens but the first, if the logits stay the same.

    Yields the dotted name of the module from which on they are left out, which joins attention and residual in the last
    block; None where nothing is changed. The last hidden state is `(batch, 1, width)` inside.
    """
    name = _join_to_cut(model)
    with nullcontext() if name is None else model.get_submodule(name).register_forward_pre_hook(_first_token):
        yield name


def _join_to_cut(model: nn.Module) -> str | None:
    """The first join of the last block, if the logits of a probe stay the same with other tokens left out."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    names = inspect.signature(model.forward).parameters
    if not vocabulary or not {"input_ids", "attention_mask"} <= names.keys():
        return None
    ids = torch.randint(vocabulary, (_ROWS, _TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[-1, _TOKENS // 2 :] = 0
    parameter = next(model.parameters())
    inputs = {"input_ids": ids.to(parameter.device), "attention_mask": mask.to(parameter.device)}
    with torch.no_grad(), evaluating(model):
        joins: list[str] = []
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                hooks.enter_context(module.register_forward_pre_hook(partial(_note_join, joins, name)))
            expected = _logits(model, inputs)
        block = re.match(r".*\.\d+(?=\.)", joins[-1]) if joins else None
        found = next((join for join in joins if block and join.startswith(f"{block.group()}.")), None)
        if expected is None or found is None:
            return None
        with model.get_submodule(found).register_forward_pre_hook(_first_token):
            got = _logits(model, inputs)
    if got is None or got.shape != expected.shape:
        return None
    # Products of other shapes round otherwise; another token read would change the first digits.
    tolerance = torch.finfo(parameter.dtype).eps ** (2 / 3)
    return found if relative_difference(got, expected) <= tolerance else None


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """The logits; None if the model cannot run on this."""
    try:
        return model(**inputs)["logits"]
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError):
        return None


def _is_join(args: tuple[Any, ...]) -> bool:
    states = [value for value in args if isinstance(value, Tensor) and value.dim() == 3]
    return len(args) == len(states) == 2 and states[0].shape == states[1].shape


def _note_join(joins: list[str], name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    if _is_join(args) and args[0].shape[:2] == (_ROWS, _TOKENS):
        joins.append(name)


def _first_token(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    return tuple(states[:, :1] for states in args) if _is_join(args) else None
