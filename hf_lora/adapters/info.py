"""`hf_lora.json`: what PEFT's two files do not hold. docs/reference/hf_lora_json.md describes every key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hf_lora._files import MAX_JSON_BYTES, check_types, parse_object, read_bytes
from hf_lora._text import one_line, shortened
from hf_lora.tasks import SINGLE, Task, task_of
from hf_lora.tasks.calibration import Calibration

FILE = "hf_lora.json"
FORMAT_VERSION = 1
# The types of the keys; all but labels and format_version may also be null.
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("problem_type", "pooling", "projections"), (str,)),
    **dict.fromkeys(("hf_lora_version", "transformers_version"), (str,)),
    **dict.fromkeys(("lora", "base_model", "metrics", "sha256"), (dict,)),
    **dict.fromkeys(("text_columns", "label_columns"), (list,)),
    **{"max_length": (int,), "label_layout": (str,)},
}


@dataclass(frozen=True)
class BaseModel:
    """The pretrained model: Hub id or path, revision, and a digest of the weights.

    encoder: its name in a pooled classifier, which the names in PEFT's files leave out; None: they leave out nothing.
    """

    name_or_path: str | None = None
    revision: str | None = None
    fingerprint: str | None = None
    encoder: str | None = None


@dataclass(frozen=True)
class AdapterInfo:
    """The contents of `hf_lora.json`.

    labels: in the order of the head's outputs.
    pooling: how token states become the head's input: "native", the architecture's own head, or a name of
        `hf_lora.models.pooling.POOLINGS`.
    label_columns, label_layout: where the training data had the labels, and how: "values", "names", "vectors" or
        "columns", as in `hf_lora.data.columns.LAYOUTS`.
    lora: the LoRAConfig; PEFT's file can hold only a part of it.
    temperature: logits are divided by it before the softmax or sigmoid; None: 1.
    thresholds: multi-label only: the probability above which each label is given; None: 0.5.
    """

    labels: tuple[str, ...]
    problem_type: str = SINGLE
    pooling: str = "native"
    max_length: int | None = None
    text_columns: tuple[str, ...] = ()
    label_columns: tuple[str, ...] = ()
    label_layout: str | None = None
    projections: str | None = None
    lora: Mapping[str, Any] | None = None
    temperature: float | None = None
    thresholds: tuple[float, ...] | None = None
    base_model: BaseModel = field(default_factory=BaseModel)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)
    hf_lora_version: str | None = None
    transformers_version: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        length = self.max_length
        if length is not None and not 1 <= length < 1 << 31:
            raise ValueError(
                f"max_length is not usable; got {length}; expected a number of tokens, such as 128"
            )
        self.task.check_calibration(self.calibration, len(self.labels))

    @property
    def task(self) -> Task:
        """What the problem type means: losses, decisions, metrics."""
        return task_of(self.problem_type)

    @property
    def calibration(self) -> Calibration:
        """Temperature and thresholds, as `predict` applies them."""
        return Calibration(self.temperature, self.thresholds)

    def calibrated(self, calibration: Calibration) -> AdapterInfo:
        """The same with another calibration; `Calibration()` removes it."""
        return replace(self, temperature=calibration.temperature, thresholds=calibration.thresholds)

    def to_json(self) -> str:
        """The text of the file."""
        values = asdict(self)
        if self.base_model.encoder is None:
            del values["base_model"]["encoder"]
        return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = FILE) -> AdapterInfo:
        """Parse the file's text. Raises ValueError, naming `source`, for anything that `to_json` does not write."""
        values = parse_object(text.encode("utf-8", "surrogatepass"), source)
        version, labels = values.get("format_version"), values.get("labels")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{source} has another format version; got {version!r}; expected {FORMAT_VERSION}; "
                "upgrade hf_lora to read it"
            )
        unknown = sorted(set(values) - {entry.name for entry in fields(cls)})
        if unknown:
            raise ValueError(f"{source} has unknown keys; got {shortened(unknown)}")
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise ValueError(
                f"{source} has no usable labels; got {shortened(labels)}; expected a list of strings"
            )
        check_types(values, _KINDS, source)
        base, digests = values.pop("base_model", None) or {}, values.get("sha256") or {}
        check_types(base, dict.fromkeys((entry.name for entry in fields(BaseModel)), (str,)), source)
        check_types(digests, dict.fromkeys(digests, (str,)), source)
        given = {name: value for name, value in values.items() if value is not None}
        for name in given.keys() & {"labels", "text_columns", "label_columns", "thresholds"}:
            given[name] = tuple(given[name]) if isinstance(given[name], list) else given[name]
        try:
            return cls(**given, base_model=BaseModel(**base))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source} cannot be read: {one_line(error, 300)}") from None


def read_info(directory: Path) -> AdapterInfo | None:
    """What `hf_lora.json` of a directory says; None without that file. Raises ValueError as `AdapterInfo.from_json`."""
    if not (directory / FILE).is_file():
        return None
    text = read_bytes(directory, FILE, limit=MAX_JSON_BYTES).decode("utf-8", "replace")
    return AdapterInfo.from_json(text, str(directory / FILE))
