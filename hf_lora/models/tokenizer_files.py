"""The tokenizer that an adapter brings: its files are read once, checked, and loaded as they were read."""

from __future__ import annotations

import base64
import fnmatch
import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_lora._files import parse_object, read_bytes
from hf_lora._text import shortened

# A pattern such as `tokenizer*` fits files of any kind: these endings only.
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "entity_vocab.json"),
    *("merges.txt", "bpe.codes", "spiece.model", "sentencepiece*", "*.model"),
)
_ENDINGS = (".json", ".txt", ".model", ".codes")
_CONFIG, _FILE = "tokenizer_config.json", "tokenizer.json"
_BEFORE, _AFTER = ("normalizer", "pre_tokenizer"), ("post_processor", "decoder")
# What a tokenizer may cost: far more than any that is in use.
_MAX_GROWTH, _MAX_PARTS, _MAX_TEXT = 100, 50, 1000
_PROBES = ["", "a", "A text of words, 123 numbers. \u00dcnknown \u6f22\u5b57 \U0001f642\n\tx" + "y" * 200]


def read_tokenizer(directory: Path) -> dict[str, bytes]:
    """The tokenizer's files in an adapter directory, by name. Raises ValueError for a link to another place."""
    names = [path.name for path in directory.iterdir() if path.name.endswith(_ENDINGS) and path.is_file()]
    chosen = {name for pattern in TOKENIZER_FILES for name in fnmatch.filter(names, pattern)}
    return {name: read_bytes(directory, name) for name in sorted(chosen)}


def load_tokenizer_files(contents: Mapping[str, bytes], source: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of these files; None if they are none. It can tokenize texts, in memory in proportion to them.

    The files are written anew for transformers, so that nothing else of the adapter's directory is read.
    Raises ValueError, naming `source`, for anything that cannot be used.
    """
    if _CONFIG not in contents:
        return None
    try:
        if _FILE in contents:
            _check_costs(parse_object(contents[_FILE], f"{_FILE} in {source!r}"), source)
        with tempfile.TemporaryDirectory(prefix="hf_lora_") as folder:
            for name, content in contents.items():
                (Path(folder) / name).write_bytes(content)
            # An adapter must not make code run, nor ask on the terminal.
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.name_or_path = source
        if _FILE not in contents and tokenizer.is_fast:
            _check_costs(json.loads(tokenizer.backend_tokenizer.to_str()), source)
        limit = tokenizer.model_max_length
        _expect(isinstance(limit, int | float) and limit >= 1, source, f"model_max_length={shortened(limit)}")
        tokenizer(_PROBES, truncation=True, max_length=min(int(limit), 64))
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of tokenizers is no Exception
        reason = str(error).strip().partition("\n")[0] or "no reason"
        if isinstance(error, ValueError) and source in reason and len(reason) < _MAX_TEXT:
            raise
        raise ValueError(
            f"the tokenizer in {source!r} cannot be used; got {type(error).__name__}: {reason[:300]}; expected files "
            "that transformers' save_pretrained wrote"
        ) from None
    return tokenizer


def _check_costs(values: Mapping[str, Any], source: str) -> None:
    """Refuse a tokenizer that makes a text much longer, or has expressions that unfold."""
    before, after = (list(_objects([values.get(name) for name in names])) for names in (_BEFORE, _AFTER))
    parts = before + after
    _expect(sum("type" in part for part in parts) <= _MAX_PARTS, source, f"{len(parts)} parts")
    growth = math.prod(map(_growth, before))
    _expect(growth <= _MAX_GROWTH, source, f"normalizers that make a text {growth:.3g} times as long")
    for part in parts:
        if isinstance(expression := part.get("Regex"), str):
            counts = [int(number) for number in re.findall(r"[{,](\d+)(?=[,}])", expression[: _MAX_TEXT + 1])]
            usable = len(expression) <= _MAX_TEXT and math.prod(filter(None, counts)) <= _MAX_TEXT
            _expect(usable, source, f"the expression {shortened(expression)}")
        added = [part.get(name) for name in ("single", "pair", "ids", "prepend")]
        longest = max((len(value) for value in added if isinstance(value, list | str)), default=0)
        _expect(longest <= _MAX_PARTS, source, f"{longest} pieces that are added to each text")
    model = values.get("model")
    for name, value in model.items() if isinstance(model, dict) else ():
        usable = not isinstance(value, int | float) or abs(value) <= 1e6
        if name == "max_input_chars_per_word":  # the time is quadratic in it
            usable = isinstance(value, int) and value <= _MAX_TEXT
        usable = usable and (not isinstance(value, str) or len(value) <= _MAX_TEXT)
        _expect(usable, source, f"{shortened(name)}={shortened(value)}")


def _expect(usable: bool, source: str, got: str) -> None:
    if not usable:
        raise ValueError(
            f"the tokenizer in {source!r} is not usable; got {got}; expected one of a usual model"
        )


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All JSON objects in a value."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _growth(part: Mapping[str, Any]) -> int:
    """How many times as long a part can make a text."""
    kind, content = part.get("type"), part.get("content")
    if kind == "Replace" and isinstance(content, str) and content:
        pattern = part.get("pattern")
        replaced = pattern.get("String") if isinstance(pattern, dict) else pattern
        # An expression can match nothing, and then its content is put between all characters.
        return (
            -(-len(content) // len(replaced)) if isinstance(replaced, str) and replaced else 1 + len(content)
        )
    if kind == "Precompiled":
        return _longest_replacement(part.get("precompiled_charsmap"))
    return 4 if kind == "ByteLevel" else 1


def _longest_replacement(charsmap: Any) -> int:
    """Of sentencepiece's table: the size of a trie, the trie, and what it points to, in UTF-8 and ended by zeros."""
    table = base64.b64decode(charsmap) if isinstance(charsmap, str) else b""
    start = 4 + int.from_bytes(table[:4], "little")
    if start > len(table):
        raise ValueError(
            f"precompiled_charsmap has {len(table):,} bytes, fewer than it says itself: {start:,}"
        )
    return max(1, *(len(text) // 3 for text in table[start:].split(b"\0")))
