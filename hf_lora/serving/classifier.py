"""A trained classifier: predictions for texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lora.adapters.hub import adapter_directory
from hf_lora.adapters.info import AdapterInfo
from hf_lora.lora.inject import is_injected, lora_layers, merge_lora, shared_weights
from hf_lora.lora.quantized import is_quantized
from hf_lora.models.loading import Precision, cast_frozen, choose_precision
from hf_lora.serving.encoding import (
    CPU_TOKENS,
    TOKENS,
    WINDOW,
    Text,
    batches,
    encode,
    is_pair,
    longest_text,
    several,
    shown,
    to_tensors,
)
from hf_lora.serving.loading import load_trained


@dataclass(eq=False, repr=False)
class TextClassifier:
    """A trained classifier: model, tokenizer and what the adapter knows of its labels.

    model: in evaluation mode on the device it is to run on. info: labels, problem type, longest input, calibration.
    precision: what the frozen network was cast to, and why; None: the model runs in the types it came in.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: AdapterInfo
    precision: Precision | None = None

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
        merge: bool = True,
        precision: str | None = "auto",
    ) -> TextClassifier:
        """The classifier of an adapter directory or Hub id; labels, tokenizer and base model come from it.

        base: another place of the base model. check_base: refuse one with other weights than trained on.
        device: default: the GPU where there is one.
        merge: put the updates into the weights, in fp32, for a plain model's speed; `lora_disabled` still works. Where
            another module shares an adapted weight, they stay beside it, which gives the same outputs.
        precision: of the encoder, "fp32", "bf16", or "auto": bf16 where the device multiplies it natively; None: the
            types the base is stored in. The head is fp32. A quantized base is neither merged nor cast.
        Raises ValueError if there is no such adapter or anything in it does not fit.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen = None if precision is None else choose_precision(precision, device)
        directory = adapter_directory(adapter, revision=revision, token=token)
        model, tokenizer, info = load_trained(directory, base=base, check_base=check_base, token=token)
        model.to(device)
        if any(is_quantized(module) for module in model.modules()):
            if precision not in (None, "auto"):
                raise ValueError(
                    f"the base of the adapter in {str(directory)!r} is quantized and runs in the types it is stored "
                    f"in; got precision={precision!r}; expected 'auto'"
                )
            return cls(model, tokenizer, info)
        if chosen is not None:
            # Merging rounds to the type of the weights, which may be another one than they are to have.
            cast_frozen(model, torch.float32)
        if merge and not shared_weights(model):
            merge_lora(model)
        if chosen is not None:
            cast_frozen(model, chosen.dtype)
        return cls(model, tokenizer, info, chosen)

    @property
    def merged(self) -> bool:
        """Whether the updates are in the weights."""
        return is_injected(self.model) and all(layer.merged for layer in lora_layers(self.model).values())

    @property
    def setting(self) -> str:
        """How the model runs, in one line for people."""
        weights = "the adapter merged into the weights" if self.merged else "the adapter beside the weights"
        return f"{self.precision or 'precision: as the model was loaded'}; {weights}{self._temperature}"

    @property
    def _temperature(self) -> str:
        return "" if self.info.temperature is None else f"; temperature {self.info.temperature:.3g}"

    def predict(
        self, texts: Text | Sequence[Text], *, batch_size: int | None = None
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """The prediction for one text, or a list of them for a list of texts (or of text pairs), in order.

        For an adapter of text pairs a tuple of two strings is one pair; half a pair is refused.
        Each is `{"text", "label", "score", "scores"}`: the best label with its probability, and all by label. For
        multi-label models `label` and `score` are lists of those above their thresholds, 0.5 where none were fitted;
        for regression `score` is the predicted number. Probabilities are calibrated if the adapter has a temperature.
        batch_size: as in `logits`. Raises ValueError for anything but texts of the kind that the adapter knows.
        """
        if isinstance(texts, str | Mapping) or is_pair(texts, self.info.text_columns):
            return next(self.predict_stream([cast(Text, texts)], batch_size=batch_size))
        return list(self.predict_stream(texts, batch_size=batch_size))

    def predict_stream(
        self, texts: Iterable[Text], *, batch_size: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Predictions for any number of texts, in order, holding 2,048 of them at a time."""
        stream = iter(several(texts))
        while window := list(islice(stream, WINDOW)):
            logits = self.logits(window, batch_size=batch_size)
            results = self.info.task.predictions(logits, self.info.labels, self.info.calibration)
            for text, result in zip(window, results, strict=True):
                yield {"text": shown(text, self.info.text_columns), **result}

    @torch.inference_mode()
    def logits(self, texts: Sequence[Text], *, batch_size: int | None = None) -> Tensor:
        """The head's outputs `(len(texts), labels)`, fp32 on the CPU, in order of the texts: not calibrated.

        Texts of similar length share a batch, so that little padding is computed.
        batch_size: texts in a batch; None: as many as make 2,048 tokens with their padding, on a GPU 16,384.
        """
        texts, device, pad = several(texts), self.model.device, self.model.config.pad_token_id
        budget = CPU_TOKENS if device.type == "cpu" else TOKENS
        result = torch.empty(len(texts), len(self.info.labels))
        for first in range(0, len(texts), WINDOW):
            window = texts[first : first + WINDOW]
            encoded = encode(self.tokenizer, window, self.info.text_columns, self.longest)
            lengths = [len(ids) for ids in encoded["input_ids"]]
            for rows in batches(lengths, batch_size, budget):
                chosen = {name: [values[row] for row in rows] for name, values in encoded.items()}
                tensors = to_tensors(self.tokenizer, chosen, self.longest, pad)
                inputs = {name: tensor.to(device) for name, tensor in tensors.items()}
                result[[first + row for row in rows]] = self.model(**inputs).logits.float().cpu()
        return result

    @property
    def longest(self) -> int:
        """The tokens to which texts are cut."""
        return longest_text(self.info, self.tokenizer, self.model.config)
