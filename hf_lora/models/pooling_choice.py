"""Which pooling suits a base model, read from what its repository says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils import cached_file

from hf_lora.models.bundled import resolve_base
from hf_lora.models.pooling import CLS, MEAN, MEAN_LAYERS, NATIVE, check_pooling
from hf_lora.untrusted import MAX_JSON_BYTES, parse_object, read_bytes

AUTO = "auto"

# More make the fit on three layers long and the head large.
MOST_LABELS = 64

# Where sentence-transformers writes how a model was pooled in training.
_FOLDER, _FILE = "1_Pooling", "config.json"
# Its keys that mean a pooling of ours: older files have a flag for each, newer ones a name.
_FLAGS = {"pooling_mode_mean_tokens": MEAN, "pooling_mode_cls_token": CLS}
_NAMES = {"mean": MEAN, "cls": CLS}


@dataclass(frozen=True)
class PoolingChoice:
    """A pooling, `native` or a name of `POOLINGS`, and why it was taken."""

    pooling: str
    reason: str

    def __str__(self) -> str:
        return f"pooling: {self.pooling} ({self.reason})"


def choose_pooling(
    requested: str,
    base: str,
    *,
    labels: int | None = None,
    last_only: str | None = None,
    revision: str | None = None,
    **hub: Any,
) -> PoolingChoice:
    """The pooling for a base model, a Hub id or a directory; `requested`: a pooling, or "auto".

    labels: their number; a checkpoint that has a trained head for as many keeps it under "auto".
    last_only: why auto may not read several layers, in words.
    Auto takes what a sentence encoder's own files name, a mean in three layers, and the model's own head for any other.
    Raises ValueError for an unknown name.
    """
    if requested != AUTO:
        check_pooling(requested)
        return PoolingChoice(requested, "as asked for")
    # Once: it may ask whether the Hub answers.
    source = resolve_base(base, revision=revision, cache_dir=hub.get("cache_dir"))
    if labels is not None and has_head(source, labels, revision=revision, **hub):
        return PoolingChoice(NATIVE, f"the checkpoint has a trained head for {labels} labels")
    declared = declared_pooling(source, revision=revision, **hub)
    if declared is None:
        return PoolingChoice(NATIVE, "the model's own head; its files name no pooling")
    named = f"by the {_FOLDER}/{_FILE} of this sentence encoder"
    if declared != MEAN:
        return PoolingChoice(declared, named)
    if labels is not None and labels > MOST_LABELS:
        last_only = f"a head of {labels} labels is large"
    if last_only is not None:
        return PoolingChoice(MEAN, f"{named}; in the last layer alone, since {last_only}")
    return PoolingChoice(MEAN_LAYERS, f"{named}, in three layers")


def has_head(source: str, labels: int, *, revision: str | None = None, **hub: Any) -> bool:
    """Whether a checkpoint, as `resolve_base` gives it, says of itself that it is a classifier of so many labels."""
    config = AutoConfig.from_pretrained(source, revision=revision, **hub)
    names = config.architectures or ()
    return config.num_labels == labels and any(name.endswith("ForSequenceClassification") for name in names)


def declared_pooling(source: str, *, revision: str | None = None, **hub: Any) -> str | None:
    """The pooling that the files of a sentence encoder name; None where there are none, or another than ours.

    source: as `resolve_base` gives it.
    """
    values = _pooling_file(source, revision=revision, **hub)
    if isinstance(values.get("pooling_mode"), str):
        return _NAMES.get(values["pooling_mode"])
    chosen = {key for key, value in values.items() if key.startswith("pooling_mode_") and value is True}
    # Several at once are concatenated, which no head of ours is for.
    return _FLAGS.get(chosen.pop()) if len(chosen) == 1 else None


def _pooling_file(source: str, *, revision: str | None, **hub: Any) -> dict[str, Any]:
    path = cached_file(
        source,
        f"{_FOLDER}/{_FILE}",
        revision=revision,
        cache_dir=hub.get("cache_dir"),
        token=hub.get("token"),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return {}
    found = Path(path)
    return parse_object(read_bytes(found.parent, found.name, limit=MAX_JSON_BYTES), str(found))
