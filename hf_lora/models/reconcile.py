"""Make a tokenizer and a model agree when they are loaded: padding, vocabulary, token types and positions.

Training, prediction, evaluation, merging and export all load through `reconcile`, so that a text has the same logits in
each of them, alone or beside others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lora.models._transformers_private import forget_tokens
from hf_lora.models.bundled import warn_once

# What model types call their table of absolute positions.
_POSITIONS = {
    "position_embeddings",
    "embed_positions",
    "wpe",
    "positions_embed",
    "char_position_embeddings",
    "pos_encoding",
}
# Model types that classify at the last place of a row, whatever is there.
_READ_THE_END = {"xlnet", "t5gemma"}
# A vocabulary this many times smaller than the model's is another one, or what is left without its files.
_FAR_SMALLER = 8
# Tokenizers without a limit report a huge number.
NO_LIMIT = 1_000_000


def reconcile(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare a tokenizer with the model that is to read its tokens, and make them agree; one warning says how.

    The configuration of the model and the tokenizer are changed in place, never a weight; the model may be on the meta
    device. Padding is the tokenizer's, or that of a model which counts positions by it. Token types that the model has
    no row for are left out. The longest text is what the model has positions for.
    Raises ValueError where the tokenizer is not the one of the model: tokens without an embedding, far too few tokens,
    no token to pad with.
    """
    rows = vocabulary_rows(model)
    changes = _pad_alike(model, tokenizer, rows)
    _check_vocabulary(tokenizer, rows)
    changes += [*_end_alike(model, tokenizer), *_leave_out_types(model, tokenizer)]
    side = _padding_side(model, tokenizer.padding_side)
    if side != tokenizer.padding_side:
        changes.append(
            f"padding side {tokenizer.padding_side} to {side}, where this kind of model does not read it"
        )
        tokenizer.padding_side = side
    limit = most_tokens(model)
    if limit is not None and limit < tokenizer.model_max_length:
        if tokenizer.model_max_length < NO_LIMIT:
            changes.append(f"longest text {tokenizer.model_max_length:,} to {limit:,}, the model's positions")
        tokenizer.model_max_length = limit
    if changes:
        warn_once(f"tokenizer and model {model.name_or_path!r} differ; set {'; '.join(changes)}")


def vocabulary_rows(model: nn.Module) -> int | None:
    """How many tokens have an embedding; None for a model that has no table of tokens, such as CANINE."""
    try:
        table: Any = model.get_input_embeddings()  # type: ignore[operator]
    except (NotImplementedError, AttributeError):
        return None
    return None if table is None else _rows(table)


def most_tokens(model: PreTrainedModel) -> int | None:
    """The most tokens that the model has absolute positions for; None where positions are relative or computed."""
    config, tables = model.config, _position_tables(model)
    # MPT's slopes have no table, and a limit. Some tables have rows that are never read.
    stated = config.max_position_embeddings if tables else getattr(config, "max_seq_len", None)
    limits = [_rows(table) - _first(table) for table in tables]
    return min([*limits, *([stated] if isinstance(stated, int) and stated > 0 else [])], default=None)


def check_max_length(max_length: int | None, model: PreTrainedModel) -> None:
    """Raise ValueError for texts of more tokens than the model has positions for."""
    limit = most_tokens(model)
    if max_length is not None and limit is not None and max_length > limit:
        raise ValueError(
            f"max_length is {max_length}; the model has positions for {limit} tokens; expected at most that"
        )


def usable_length(max_length: int | None, model: PreTrainedModel) -> int | None:
    """The longest text of an adapter, cut with a warning to what the model has positions for."""
    limit = most_tokens(model)
    if max_length is None or limit is None or max_length <= limit:
        return max_length
    warn_once(
        f"the adapter's max_length is {max_length}; texts are cut to {limit} tokens, the model's positions"
    )
    return limit


def check_known(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Sequence[int]]) -> None:
    """Raise ValueError if the tokenizer does not know most tokens of tokenized texts; rows: their ids."""
    unknown, special = tokenizer.unk_token_id, set(tokenizer.all_special_ids)
    if unknown is None:
        return
    tokens = [token for row in rows for token in row if token == unknown or token not in special]
    share = tokens.count(unknown) / max(1, len(tokens))
    if share > 0.5:
        raise ValueError(
            f"the tokenizer does not know most of the texts; got {share:.0%} of their tokens as "
            f"{tokenizer.unk_token!r}; expected a base for the language of the texts, with all files of its tokenizer"
        )


@torch.no_grad()
def check_finite(model: nn.Module, base: str) -> None:
    """Raise ValueError for weights that hold NaN or infinity, by the name of the tensor."""
    for name, tensor in model.named_parameters():
        if type(tensor) is not nn.Parameter or not tensor.is_floating_point() or tensor.is_meta:
            continue
        # One pass without a copy; a sum that overflows is looked at again.
        if not tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).isfinite():
            count = int(tensor.isfinite().logical_not().sum())
            if count:
                raise ValueError(
                    f"the weights of {base!r} are broken; got NaN or infinity in {count:,} of {tensor.numel():,} "
                    f"numbers of {name!r}; expected finite numbers; try another copy of the base"
                )


def _pad_alike(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int | None) -> list[str]:
    """One padding token in tokenizer and configuration."""
    given, before, changes = model.config.get_text_config().pad_token_id, tokenizer.pad_token, []
    special = {tokenizer.convert_tokens_to_ids(token): token for token in tokenizer.all_special_tokens}
    # A model that counts positions by its padding token was built with it, and keeps it.
    counts = any(getattr(table, "padding_idx", None) is not None for table in _position_tables(model))
    if counts and given in special:
        tokenizer.pad_token = special[given]
    elif not _in_table(tokenizer.pad_token_id, rows):
        tokenizer.pad_token = _substitute(tokenizer, special.get(given), rows)
        if rows is not None and before is not None:
            forget_tokens(tokenizer, before, rows)
    if tokenizer.pad_token != before:
        changes.append(f"the tokenizer's padding token {before!r} to {tokenizer.pad_token!r}")
    if not counts and given != tokenizer.pad_token_id:
        for config in (model.config, model.config.get_text_config()):
            config.pad_token_id = tokenizer.pad_token_id
        if given is not None:
            changes.append(f"the model's pad_token_id {given} to {tokenizer.pad_token_id}")
    return changes


def _substitute(tokenizer: PreTrainedTokenizerBase, stated: str | None, rows: int | None) -> str:
    """The token to pad with where the tokenizer's own has no embedding: that of the model, or one that ends texts."""
    for token in (stated, tokenizer.eos_token, tokenizer.sep_token, tokenizer.unk_token):
        if token is not None and _in_table(tokenizer.convert_tokens_to_ids(token), rows):
            return token
    raise ValueError(
        f"there is no token to pad with; got pad_token {tokenizer.pad_token!r} and no eos_token that the model has an "
        "embedding for; expected one; set pad_token in the tokenizer_config.json of the base"
    )


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> None:
    if rows is None:
        return
    count = len(tokenizer)
    if count * _FAR_SMALLER < rows:
        files = " or ".join(sorted(type(tokenizer).vocab_files_names.values()))
        raise ValueError(
            f"the tokenizer is not that of the model; got {count:,} tokens for {rows:,} embeddings; expected its files "
            f"beside config.json, such as {files}; copy them there, or download the base again"
        )
    beyond = {row: token for token, row in tokenizer.get_vocab().items() if row >= rows}
    if beyond:
        raise ValueError(
            f"the tokenizer has tokens that the model has no embedding for; got {len(beyond):,}, first "
            f"{beyond[min(beyond)]!r} with id {min(beyond)}; expected ids below {rows}; save the base after "
            f"model.resize_token_embeddings({max(beyond) + 1}), or take its own tokenizer"
        )


def _end_alike(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """One end of a text: an encoder-decoder reads its class there, and training takes the tokenizer's."""
    config, end = model.config, tokenizer.eos_token_id
    before = config.eos_token_id
    if not config.is_encoder_decoder or end is None or end == before:
        return []
    config.eos_token_id = end
    return [] if before is None else [f"the model's eos_token_id {before} to {end}"]


def _padding_side(model: PreTrainedModel, given: str) -> str:
    """Where padding changes nothing: behind the text, for models that count from the left or read the first token.

    Those that read the last token by its id may have it on either side, if their positions are relative.
    """
    if model.config.model_type in _READ_THE_END:
        return "left"
    reads_last_id = hasattr(model, "score") and not _position_tables(model)
    return given if reads_last_id else "right"


def _leave_out_types(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Without token types where the model has one row for all: such as RoBERTa's, for pairs."""
    tables = [module for name, module in model.named_modules() if name.endswith("token_type_embeddings")]
    given = "token_type_ids" in tokenizer.model_input_names
    if not given or not tables or _rows(tables[0]) > 1 or not any(tokenizer("a", "a")["token_type_ids"]):
        return []
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.model_input_names = names
    return ["the tokenizer's inputs to those without token_type_ids, since the model has one type"]


def _position_tables(model: nn.Module) -> list[Any]:
    """Modules and buffers with a row for each absolute position of a token."""
    named: list[tuple[str, Any]] = [*model.named_modules(), *model.named_buffers()]
    tables = [table for name, table in named if name.rpartition(".")[2] in _POSITIONS]
    return [table for table in tables if isinstance(table, Tensor) or hasattr(table, "weight")]


def _rows(table: Any) -> int:
    if isinstance(table, Tensor):
        return len(table)
    # Under ZeRO-3 the tensor is empty.
    return int(getattr(table, "num_embeddings", None) or len(table.weight))


def _first(table: Any) -> int:
    """The row of the first position: after that of padding, as in RoBERTa, or after an offset, as in BART."""
    padding = getattr(table, "padding_idx", None)
    return int(getattr(table, "offset", 0)) if padding is None else int(padding) + 1


def _in_table(token: Any, rows: int | None) -> bool:
    return isinstance(token, int) and 0 <= token < (float("inf") if rows is None else rows)
