"""TextClassifier: load an adapter, predict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lora.hub import adapter_directory
from hf_lora.modeling import load_trained
from hf_lora.sidecar import AdapterInfo

Text = str | Sequence[str]
"""A text, or a pair (first, second) for models of text pairs."""

# Texts held at a time when a stream is classified: enough to sort by length to good effect.
WINDOW = 2048


class TextClassifier:
    """A trained classifier: model, tokenizer and what the adapter knows of its labels.

    model: in evaluation mode on the device it is to run on. info: labels, problem type, longest input.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, info: AdapterInfo) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.info = info

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        base: str | None = None,
        check_base: bool = True,
        device: str | torch.device | None = None,
    ) -> TextClassifier:
        """The classifier of an adapter directory or Hub id; labels, tokenizer and base model come from it.

        base: another place of the base model. check_base: refuse one with other weights than trained on.
        device: default: the GPU where there is one.
        Raises ValueError if there is no such adapter or anything in it does not fit.
        """
        directory = adapter_directory(adapter, revision=revision, token=token)
        model, tokenizer, info = load_trained(directory, base=base, check_base=check_base, token=token)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(model, tokenizer, info)

    def predict(
        self, texts: Text | Sequence[Text], *, batch_size: int = 32
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """The prediction for one text, or a list of them for a list of texts (or of text pairs), in order.

        Each is `{"text", "label", "score", "scores"}`: the best label with its probability and all by
        label; for multi-label models `label` and `score` are lists of those of at least 0.5; for
        regression `score` is the predicted number. Raises ValueError for anything but texts.
        """
        if not isinstance(texts, Iterable) or isinstance(texts, bytes | Mapping):
            raise ValueError(f"not texts; got {texts!r}; expected a string or a list of strings")
        if isinstance(texts, str):
            return next(self.predict_stream([texts], batch_size=batch_size))
        return list(self.predict_stream(texts, batch_size=batch_size))

    def predict_stream(self, texts: Iterable[Text], *, batch_size: int = 32) -> Iterator[dict[str, Any]]:
        """Predictions for any number of texts, in order, holding 2,048 of them at a time."""
        stream = iter(texts)
        while window := list(islice(stream, WINDOW)):
            for text, row in zip(window, self.logits(window, batch_size=batch_size), strict=True):
                yield self._result(text, row)

    @torch.inference_mode()
    def logits(self, texts: Sequence[Text], *, batch_size: int = 32) -> Tensor:
        """The head's outputs `(len(texts), labels)`, fp32 on the CPU, in order of the texts.

        Texts of similar length share a batch, so that little padding is computed.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is not usable; got {batch_size}; expected at least 1")
        encoded = self._encode(texts)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        order = sorted(range(len(texts)), key=lengths.__getitem__, reverse=True)
        result = torch.empty(len(texts), len(self.info.labels))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = self.tokenizer.pad(
                {name: [values[row] for row in rows] for name, values in encoded.items()}, return_tensors="pt"
            )
            result[rows] = self.model(**batch.to(self.model.device)).logits.float().cpu()
        return result

    def _encode(self, texts: Sequence[Text]) -> dict[str, list[list[int]]]:
        pairs = [_as_pair(text) for text in texts]
        if not pairs:
            return {"input_ids": []}
        if len({second is None for _, second in pairs}) > 1:
            raise ValueError("single texts and text pairs cannot be mixed in one call")
        first = [text for text, _ in pairs]
        second = None if pairs[0][1] is None else [text for _, text in pairs]
        return dict(self.tokenizer(first, second, truncation=True, max_length=self._max_length()))

    def _max_length(self) -> int:
        # Tokenizers without a limit report a huge number; the position embeddings are the limit then.
        positions = (
            getattr(self.model.config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        )
        return self.info.max_length or min(self.tokenizer.model_max_length, positions)

    def _result(self, text: Text, logits: Tensor) -> dict[str, Any]:
        labels = self.info.labels
        result = _INTERPRETERS[self.info.problem_type](labels, logits)
        return {"text": text if isinstance(text, str) else list(text), **result}


def _as_pair(text: Any) -> tuple[str, str | None]:
    if isinstance(text, str):
        return text, None
    if isinstance(text, list | tuple) and len(text) in (1, 2) and all(isinstance(part, str) for part in text):
        return text[0], text[1] if len(text) == 2 else None
    raise ValueError(f"not a text; got {text!r}; expected a string or a pair of strings")


def _single_label(labels: Sequence[str], logits: Tensor) -> dict[str, Any]:
    scores = dict(zip(labels, logits.softmax(-1).tolist(), strict=True))
    label = max(scores, key=scores.__getitem__)
    return {"label": label, "score": scores[label], "scores": scores}


def _multi_label(labels: Sequence[str], logits: Tensor) -> dict[str, Any]:
    scores = dict(zip(labels, logits.sigmoid().tolist(), strict=True))
    chosen = [label for label, score in scores.items() if score >= 0.5]
    return {"label": chosen, "score": [scores[label] for label in chosen], "scores": scores}


def _regression(labels: Sequence[str], logits: Tensor) -> dict[str, Any]:
    scores = dict(zip(labels, logits.tolist(), strict=True))
    label = labels[0] if len(labels) == 1 else list(labels)
    return {
        "label": label,
        "score": logits.tolist()[0] if len(labels) == 1 else logits.tolist(),
        "scores": scores,
    }


_INTERPRETERS = {
    "single_label_classification": _single_label,
    "multi_label_classification": _multi_label,
    "regression": _regression,
}
