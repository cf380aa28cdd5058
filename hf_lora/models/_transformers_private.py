"""Every private part of transformers and torch that is used below training; a contract test names one that moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file, extract_commit_hash


class AnyAttention(PreTrainedModel):
    """A model that lets its encoder choose among all implementations of attention."""

    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True


def runs_sdpa(module: nn.Module) -> bool:
    """Whether a model's attention is torch's own, and can be replaced."""
    return (
        isinstance(module, PreTrainedModel)
        and module.config._attn_implementation == "sdpa"
        and module._can_set_attn_implementation()
    )


def set_eager_attention(config: Any) -> None:
    """Let models of this configuration compute attention by plain products."""
    config._attn_implementation = "eager"


def record_origin(model: PreTrainedModel, name: str, source: str, **hub: Any) -> None:
    """Note on a model the name it was asked for by, not where its files are, and the Hub commit of its files."""
    model.config._name_or_path = model.name_or_path = name
    path = None if Path(source).is_dir() else optional_file(source, "config.json", **hub)
    model.config._commit_hash = None if path is None else extract_commit_hash(str(path), None)


def commit_of(config: Any) -> str | None:
    """The Hub commit that a model was loaded from, where it is known."""
    return getattr(config, "_commit_hash", None)


def softmax_backward(grad: Tensor, probabilities: Tensor) -> Tensor:
    """The gradient of a softmax's input over the last dimension."""
    return torch._softmax_backward_data(grad, probabilities, -1, probabilities.dtype)


def optional_file(source: str, name: str, **hub: Any) -> Path | None:
    """A file of a Hub repository or directory; None where there is none, or no network."""
    path = cached_file(
        source,
        name,
        **{option: hub.get(option) for option in ("revision", "cache_dir", "token")},
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)


def forget_tokens(tokenizer: Any, token: str, first: int) -> None:
    """Take an added token, if its id is `first` or more, out of a fast tokenizer; texts then do not give it."""
    backend: Any = getattr(tokenizer, "_tokenizer", None)
    if not hasattr(backend, "to_str") or token == tokenizer.pad_token:
        return
    state = json.loads(backend.to_str())
    kept = [added for added in state["added_tokens"] if added["id"] < first or added["content"] != token]
    if len(kept) < len(state["added_tokens"]):
        tokenizer._tokenizer = type(backend).from_str(json.dumps({**state, "added_tokens": kept}))
