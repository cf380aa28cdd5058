"""Load a trained classifier from its adapter, and predict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lora.adapters.directory import AdapterFiles, check_task, load_files, read_adapter
from hf_lora.adapters.hub import adapter_directory
from hf_lora.adapters.info import AdapterInfo, BaseModel
from hf_lora.adapters.peft_format import PREFIX
from hf_lora.data.collation import fill_empty, filled_places, padded
from hf_lora.lora.inject import injection, is_injected, lora_layers, merge_lora, shared_weights
from hf_lora.lora.quantized import is_quantized
from hf_lora.models.loading import (
    Precision,
    cast_frozen,
    choose_precision,
    load_base,
    load_config,
    load_tokenizer,
    meta_classifier,
)
from hf_lora.models.reconcile import NO_LIMIT, usable_length
from hf_lora.models.tokenizer_files import load_tokenizer_files
from hf_lora.serving.texts import Text, in_columns, is_pair, several, shown

# Texts of a stream that are held, and sorted by length, at a time.
WINDOW = 2048
# Tokens of a batch, padding included. With more, activations grow and leave a CPU's caches.
CPU_TOKENS, TOKENS = 2048, 16_384


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
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is not usable; got {batch_size}; expected at least 1")
        texts, device = several(texts), self.model.device
        budget = CPU_TOKENS if device.type == "cpu" else TOKENS
        result = torch.empty(len(texts), len(self.info.labels))
        for first in range(0, len(texts), WINDOW):
            encoded = self._encode(texts[first : first + WINDOW])
            lengths = [len(ids) for ids in encoded["input_ids"]]
            for rows in _batches(lengths, batch_size, budget):
                chosen = {name: [values[row] for row in rows] for name, values in encoded.items()}
                inputs = {name: tensor.to(device) for name, tensor in self._padded(chosen).items()}
                result[[first + row for row in rows]] = self.model(**inputs).logits.float().cpu()
        return result

    def _encode(self, texts: Sequence[Text]) -> dict[str, list[list[int]]]:
        columns = in_columns(texts, self.info.text_columns)
        encoded = dict(self.tokenizer(*columns, truncation=True, max_length=self.longest))
        fill_empty(self.tokenizer, encoded)
        return encoded

    @property
    def longest(self) -> int:
        """The tokens to which texts are cut."""
        # Tokenizers without a limit report a number that they cannot take themselves.
        limit = int(min(self.tokenizer.model_max_length, NO_LIMIT))
        positions = getattr(self.model.config, "max_position_embeddings", None) or limit
        return self.info.max_length or min(limit, positions if positions > 0 else limit)

    def _padded(self, batch: Mapping[str, list[list[int]]]) -> Mapping[str, Tensor]:
        """What `tokenizer.pad` gives, in a tenth of its time: each `(rows, longest)`, the longest rounded up."""
        tokenizer, pad = self.tokenizer, self.tokenizer.pad_token_id
        fillers = {"input_ids": pad, "token_type_ids": tokenizer.pad_token_type_id, "attention_mask": 0}
        if pad is None or not batch.keys() <= fillers.keys():
            return tokenizer.pad(dict(batch), return_tensors="pt")
        lengths = np.array([len(ids) for ids in batch["input_ids"]])
        width = int(lengths.max())
        # Only where the model is told what is padding; others may read it in a batch of one text too.
        if "attention_mask" in batch and self.model.config.pad_token_id == pad:
            width = max(width, min(_rounded(width), self.longest))
        filled = filled_places(lengths, width, tokenizer.padding_side)
        return {name: padded(rows, filled, fillers[name]) for name, rows in batch.items()}


def _batches(lengths: Sequence[int], batch_size: int | None, budget: int) -> Iterator[list[int]]:
    """Indices of the texts in each batch, the longest first: `batch_size`, or at most `budget` tokens, or one text."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    while order:
        size = batch_size or max(1, budget // max(1, _rounded(lengths[order[0]])))
        yield order[:size]
        del order[:size]


def _rounded(length: int) -> int:
    """A length rounded up to one of eight in each doubling: 16, 18, 20, ... 32, 36, 40, ... 64, 72, ...

    oneDNN makes and keeps kernels of a few megabytes for every shape. The padding costs less: 4 % on average.
    """
    step = max(1, 1 << length.bit_length() >> 4)
    return -(-length // step) * step


def load_trained(
    directory: str | Path,
    *,
    base: str | None = None,
    check_base: bool = True,
    dtype: torch.dtype | None = None,
    **hub: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, AdapterInfo]:
    """The classifier of an adapter directory, its tokenizer and what the sidecar says.

    base: another place of the base model than the one the adapter names.
    Raises ValueError if the directory names no base model, or for anything that does not fit exactly.
    """
    files = read_adapter(directory)
    check_task(files, "SEQ_CLS")
    given, base = base, base or files.base_name
    if not base:
        raise ValueError(
            f"the adapter in {str(directory)!r} names no base model; pass base='<Hub id or directory>'"
        )
    # An adapter must not make its base's code run, nor ask on the terminal.
    hub.setdefault("trust_remote_code", False)
    own = files.info.base_model if files.info else BaseModel(base, files.peft_config.get("revision"))
    hub["revision"] = own.revision if base == own.name_or_path else None
    with nullcontext() if given else _hint_at_base(files):
        info = files.info or AdapterInfo(_labels_of(files, base, **hub), base_model=own)
        model, missing = load_base(
            base, info.labels, problem_type=info.problem_type, pooling=info.pooling, dtype=dtype, **hub
        )
    load_files(model, files, check_base=check_base)
    random = sorted(name for name in missing if not files.brings(name))
    if random:
        raise ValueError(
            f"neither the adapter in {str(directory)!r} nor its base {base!r} has weights for {len(random)} tensors, "
            f"first {random[0]!r}; they would be random"
        )
    info = replace(info, max_length=usable_length(info.max_length, model))
    injection(model).info = info
    kept = load_tokenizer_files(files.tokenizer, str(directory))
    return model.eval(), load_tokenizer(base, model=model, kept=kept, **hub), info


@contextmanager
def _hint_at_base(files: AdapterFiles) -> Iterator[None]:
    """Say of an error in here that the base may be named otherwise than the adapter names it."""
    try:
        yield
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"the base model {files.base_name!r} of the adapter in {str(files.directory)!r} cannot be loaded: "
            f"{' '.join(str(error).split())}; if it is at another place, pass base='<Hub id or directory>' (--base)"
        ) from error


def _labels_of(files: AdapterFiles, base: str, **hub: Any) -> tuple[str, ...]:
    """The labels for somebody else's PEFT adapter: LABEL_0 and so on, as many as its head has outputs.

    Of an adapter without the head's last layer they are those of the base's own head.
    """
    count = 7919  # that nothing else in the model has
    blank = meta_classifier(base, num_labels=count, **hub)
    outputs = [name for name, parameter in blank.named_parameters() if count in parameter.shape[:1]]
    sizes = [len(files.tensors[key]) for key in (PREFIX + name for name in outputs) if key in files.tensors]
    if sizes:
        return tuple(f"LABEL_{index}" for index in range(sizes[0]))
    names = load_config(base, **hub).id2label
    return tuple(names[index] for index in sorted(names))
