"""A full fine-tuned checkpoint as an adapter of a bank, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from hf_lora._text import shortened
from hf_lora.adapters.extract import Finetuned, extract_finetuned
from hf_lora.bank.loading import BankLoader
from hf_lora.bank.sources import split_revision
from hf_lora.models.loading import cast_frozen
from hf_lora.serving.classifier import TextClassifier
from hf_lora.serving.encoding import Text
from hf_lora.tasks.calibration import Calibration


@dataclass(frozen=True)
class FinetunedReport:
    """What became of a full fine-tuned checkpoint that joined a bank.

    name: in the bank. ranks: by module. kept_energy: the share of all changes outside the head that is in the adapter.
    left_out: changed tensors that an adapter has no place for, with their relative changes. bytes: of its tensors.
    texts: how many were compared; same_labels: how many get the label that the checkpoint gives; None: a regression.
    largest_difference: of a probability; of a number in a regression.
    accuracy, checkpoint_accuracy: the share of right labels, where they are known: of the adapter, of the checkpoint.
    """

    name: str
    ranks: Mapping[str, int]
    kept_energy: float
    left_out: Mapping[str, float]
    bytes: int
    texts: int = 0
    same_labels: int | None = None
    largest_difference: float | None = None
    accuracy: float | None = None
    checkpoint_accuracy: float | None = None


@dataclass(frozen=True)
class Expected:
    """What the answers of a bank are compared with.

    logits: of the checkpoint itself, `(texts, labels)`. references: the texts' labels as numbers, where they are known.
    """

    logits: Tensor
    references: ndarray | None = None


def extracted(loader: BankLoader, path: str | Path, *, token: str | None, **budget: Any) -> Finetuned:
    """The adapter between a checkpoint and the bank's base, in fp32. The bank's own encoder may be rounded.

    budget: rank, energy and projections. Raises ValueError or OSError for what is no checkpoint of the base.
    """
    source, revision = split_revision(path)
    return extract_finetuned(
        loader.base,
        source,
        revision=loader.hub.get("revision"),
        finetuned_revision=revision,
        dtype=None if loader.precision is None else torch.float32,
        hub={**loader.hub, "token": token or loader.hub.get("token")},
        **budget,
    )


def expected_of(
    found: Finetuned, loader: BankLoader, texts: Sequence[Text], labels: Sequence[Any] | None
) -> Expected:
    """The checkpoint's own outputs. Raises ValueError for texts and labels that are not of its kind."""
    info = found.info
    checkpoint = TextClassifier(found.checkpoint.eval().to(loader.device), found.tokenizer, info)
    if labels is None:
        return Expected(checkpoint.logits(texts))
    if len(labels) != len(texts):
        raise ValueError(f"expected a label for each text; got {len(labels)} labels for {len(texts)} texts")
    if not info.task.has_classes:
        raise ValueError(f"a regression has no accuracy; got labels={shortened(list(labels))}; expected none")
    references = np.array(info.task.encode(list(labels), info.labels, "labels"))
    return Expected(checkpoint.logits(texts), references)


def classifier_of(found: Finetuned, loader: BankLoader) -> TextClassifier:
    """The base with the extracted adapter, in the precision and on the device of the bank."""
    if loader.precision is not None:
        cast_frozen(found.model, loader.precision.dtype)
    return TextClassifier(found.model.eval().to(loader.device), found.tokenizer, found.info, loader.precision)


def report_of(found: Finetuned, name: str, expected: Expected, logits: Sequence[Tensor]) -> FinetunedReport:
    """What a checkpoint became in a bank, whose outputs for the texts are `logits`."""
    extraction, task = found.extraction, found.info.task
    report = FinetunedReport(
        name,
        {module: entry.new_rank for module, entry in extraction.truncations.items()},
        extraction.kept_energy,
        {tensor: change.relative for tensor, change in extraction.left_out.items()},
        sum(tensor.nbytes for tensor in extraction.adapter.tensors().values()),
        len(logits),
    )
    if not logits:
        return report
    sides, plain = (torch.stack(list(logits)), expected.logits), Calibration()
    ours, theirs = (task.probabilities(side, plain) for side in sides)
    changed = task.changed(sides[0].numpy(), sides[1].numpy(), plain)
    accuracies: list[float | None] = [None, None]
    if expected.references is not None:
        accuracies = [float(task.quality(side.numpy(), expected.references).mean()) for side in sides]
    return replace(
        report,
        same_labels=len(logits) - changed if task.has_classes else None,
        largest_difference=(ours - theirs).abs().max().item(),
        accuracy=accuracies[0],
        checkpoint_accuracy=accuracies[1],
    )
