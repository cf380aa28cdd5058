"""`hf_lora.json`: what an adapter directory knows beyond PEFT's own two files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from hf_lora._files import check_types, parse_object, shortened
from hf_lora.tasks import SINGLE, Task, task_of
from hf_lora.tasks.calibration import Calibration

FILE = "hf_lora.json"
FORMAT_VERSION = 1
# What each key may hold besides null.
_KINDS: dict[str, tuple[type, ...]] = {
    "problem_type": (str,),
    "pooling": (str,),
    "max_length": (int,),
    "text_columns": (list,),
    "projections": (str,),
    "lora": (dict,),
    "base_model": (dict,),
    "metrics": (dict,),
    "sha256": (dict,),
    "hf_lora_version": (str,),
    "transformers_version": (str,),
}


@dataclass(frozen=True)
class BaseModel:
    """The pretrained model an adapter was trained on: Hub id (or path), revision, digest of its weights."""

    name_or_path: str | None = None
    revision: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class AdapterInfo:
    """The sidecar's contents. `labels` are in the order of the head's outputs; `metrics` as measured.

    pooling: how tokens become one vector: "native", as transformers' own head does, or a name of
        `hf_lora.models.pooling.POOLINGS`, whose head peft has no class for.
    lora: the LoRAConfig, of which PEFT's file can hold only a part.
    temperature: what `predict` divides logits by before the softmax or sigmoid; None, as of a regression: 1.
    thresholds: of a multi-label classifier, the probability above which each label is given; None: 0.5.
    """

    labels: tuple[str, ...]
    problem_type: str = SINGLE
    pooling: str = "native"
    max_length: int | None = None
    text_columns: tuple[str, ...] = ()
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
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = FILE) -> AdapterInfo:
        """Parse the file's text. Raises ValueError, naming `source`, for anything but what `to_json` writes."""
        values = parse_object(text.encode("utf-8", "surrogatepass"), source)
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{source} has another format version; got {version!r}; expected {FORMAT_VERSION}; "
                "upgrade hf_lora to read it"
            )
        unknown = sorted(set(values) - {entry.name for entry in fields(cls)})
        if unknown:
            raise ValueError(f"{source} has unknown keys; got {shortened(unknown)}")
        labels = values.get("labels")
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise ValueError(
                f"{source} has no usable labels; got {shortened(labels)}; expected a list of strings"
            )
        check_types(values, _KINDS, source)
        base = values.pop("base_model", None) or {}
        check_types(base, dict.fromkeys((entry.name for entry in fields(BaseModel)), (str,)), source)
        digests = values.get("sha256") or {}
        check_types(digests, dict.fromkeys(digests, (str,)), source)
        try:
            info = cls(
                **{name: value for name, value in values.items() if value is not None},
                base_model=BaseModel(**base),
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source} cannot be read: {error}") from None
        thresholds = None if info.thresholds is None else tuple(info.thresholds)
        return replace(
            info, labels=tuple(labels), text_columns=tuple(info.text_columns), thresholds=thresholds
        )
