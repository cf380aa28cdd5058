"""Load adapters for a bank: as strictly as a classifier loads them, onto the encoder that they share."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lora.adapters.directory import TENSORS
from hf_lora.adapters.info import AdapterInfo
from hf_lora.adapters.loading import load_tensors
from hf_lora.lora.inject import base_parameters
from hf_lora.lora.quantized import is_quantized
from hf_lora.models.fingerprint import fingerprint
from hf_lora.models.loading import cast_frozen, check_labels, choose_precision, load_base, load_tokenizer
from hf_lora.models.pooling import NATIVE
from hf_lora.models.reconcile import reconcile, usable_length
from hf_lora.models.tokenizer_files import load_tokenizer_files
from hf_lora.models.verify import probe_batch, relative_difference
from hf_lora.prefix.shared import SharedPrefix
from hf_lora.serving.loading import Described, describe, fill
from hf_lora.stacks.contents import Contents, contents_of, not_sharable
from hf_lora.stacks.model import NONE, StackedModel

# Rows of the batch that modules are looked at with: no size of a model is a multiple of it.
_ROWS = 7
# How far the difference of two roundings may be from that of two others.
_ROUNDING = 10
# Models with an adapter in them that are kept, for the next one with the same configuration.
_KEPT = 32


@dataclass(frozen=True)
class Loaded:
    """An adapter that fits a bank, not yet in a slot.

    depth: how many blocks of the encoder run before the first that it changes; 0: they cannot be shared.
    model: what it was taken from, where it is of a new kind. digest: of the files that it was read from.
    """

    info: AdapterInfo
    contents: Contents
    depth: int
    model: PreTrainedModel | None = None
    digest: str = ""


class BankLoader:
    """Loads adapters of one base with one tokenizer. The base is in memory once.

    first: the adapter whose base and tokenizer they are. precision, device: as of `TextClassifier.from_pretrained`.
    Raises ValueError or OSError if the base cannot be loaded.
    """

    # What is kept is written again, by callers in inference mode and by others.
    @torch.inference_mode(False)
    def __init__(self, first: Described, device: torch.device, precision: str | None) -> None:
        self.base, self.hub = first.base, dict(first.hub)
        self.place = str(first.files.directory)
        model, missing = self._load(NATIVE, 2)
        self.quantized = any(is_quantized(module) for module in model.modules())
        if self.quantized and precision not in (None, "auto"):
            raise ValueError(
                f"the base {self.base!r} is quantized and runs in the types it is stored in; got "
                f"precision={precision!r}; expected 'auto'"
            )
        self.precision = None if precision is None or self.quantized else choose_precision(precision, device)
        self.tokenizer = self._tokenizer_of(first, model)
        self._tokenizers = {_digest(first.files.tokenizer)}
        self._meaning = _meaning(self.tokenizer)
        self._finish(model.to(device))
        self._inputs = _probe(model, self.tokenizer)
        self._encoder = model.base_model
        own = copy.deepcopy(model, _same(model))
        self._plain = {(NATIVE, 2): (own, frozenset(missing))}
        self._filled: dict[str, PreTrainedModel] = {}
        self.config, self.device = model.config, device
        self.prefix: SharedPrefix | None = None
        with suppress(ValueError):
            self.prefix = SharedPrefix(self._encoder, lambda: model(**self._inputs), _ROWS)
        self.model = StackedModel(model, self._inputs)

    def load(
        self,
        directory: str | Path,
        *,
        labels: Sequence[str] | None = None,
        check_base: bool = True,
        token: str | None = None,
    ) -> Loaded:
        """The adapter of a directory. Raises ValueError for anything that does not fit."""
        adapter = describe(directory, base=self.base, labels=labels, token=token)
        return replace(self.fit(adapter, check_base=check_base), digest=_digest_of(adapter))

    @torch.inference_mode(False)
    def fit(self, adapter: Described, *, check_base: bool = True) -> Loaded:
        """The same for an adapter that was read."""
        check_labels(adapter.info.labels)
        self._check_base_name(adapter, check_base)
        self._check_tokenizer(adapter)
        files, key = adapter.files, _key(adapter, check_base)
        if key in self._filled:
            # Everything that the last one wrote is written again.
            model = self._filled[key] = self._filled.pop(key)
            load_tensors(model, files.tensors, source=str(files.directory / TENSORS))
            info = replace(adapter.info, max_length=usable_length(adapter.info.max_length, model))
            return self._taken(model, info)
        plain, missing = self._plain_of(adapter.info.pooling, len(adapter.info.labels))
        # It shares all weights but those that the adapter brings.
        brought = [name for name, _ in plain.named_parameters() if files.brings(name)]
        model = copy.deepcopy(plain, _same(plain, brought))
        info = fill(adapter, model, missing, check_base=check_base)
        loaded = replace(self._taken(model.eval(), info), model=model)
        if files.info is not None:
            self._filled[key] = model
            if len(self._filled) > _KEPT:
                del self._filled[next(iter(self._filled))]
        return loaded

    @torch.inference_mode(False)
    def take(self, model: PreTrainedModel, info: AdapterInfo, tokenizer: Any = None) -> Loaded:
        """The adapter of an injected model in memory, which stays as it is. tokenizer: compared where it is given."""
        own = {f"{self.model.prefix}.{name}": p for name, p in self._encoder.named_parameters()}
        tensors = base_parameters(model)
        if not tensors.keys() <= own.keys() or fingerprint(tensors) != fingerprint(
            {n: own[n] for n in tensors}
        ):
            raise ValueError(
                f"the adapter in memory is of another base model than the bank; expected {self.base!r} with the same "
                "weights"
            )
        if tokenizer is not None and _meaning(tokenizer) != self._meaning:
            raise self._other_tokenizer("in memory")
        return replace(self._taken(model, info), model=model)

    @torch.inference_mode()
    def verify(self, loaded: Loaded, slot: int) -> None:
        """Raise ValueError unless an adapter in a slot gives the logits of the model that it was taken from."""
        if loaded.model is None:
            return
        slots = [NONE] * (_ROWS // 2) + [slot] * (_ROWS - _ROWS // 2)
        [(rows, logits)] = self.model(self._inputs, slots)
        inputs = {name: value.to(loaded.model.device) for name, value in self._inputs.items()}
        expected = loaded.model(**inputs).logits[rows].float()
        difference = relative_difference(logits[:, : expected.shape[1]].float(), expected)
        kind = next(self._encoder.parameters()).dtype
        # bitsandbytes rounds the inputs of its layers of 8 bits, too.
        rounded = self.quantized or not kind.is_floating_point
        # Two thirds of the digits of the type computed in.
        allowed = torch.finfo(torch.float16 if rounded else kind).eps ** (2 / 3)
        if difference > allowed:
            # Of large outputs that nearly cancel fewer digits are right: how many, single sequences tell.
            parts = ({n: value[row : row + 1] for n, value in inputs.items()} for row in range(_ROWS)[rows])
            single = torch.cat([loaded.model(**part).logits for part in parts]).float()
            allowed = max(allowed, _ROUNDING * relative_difference(single, expected))
        if not difference <= allowed:
            raise not_sharable(
                f"logits that differ by {difference:.2g} of those that it gives alone", "the same"
            )

    def _taken(self, model: PreTrainedModel, info: AdapterInfo) -> Loaded:
        contents = contents_of(model)
        if info.pooling not in self.model.heads:
            plain, _ = self._plain_of(info.pooling, len(info.labels))
            self.model.add_kind(info.pooling, plain, self._inputs)
        self.model.check(contents)
        names, start = [*contents.updates, *contents.modules], f"{self.model.prefix}."
        inside = [name.removeprefix(start) for name in names if name.startswith(start)]
        return Loaded(info, contents, 0 if self.prefix is None else self.prefix.depth(inside))

    def _plain_of(self, pooling: str, labels: int) -> tuple[PreTrainedModel, frozenset[str]]:
        """The base's classifier with so many labels, on the one encoder, and what its checkpoint lacks."""
        key = pooling, labels
        if key not in self._plain:
            model, missing = self._load(pooling, labels)
            reconcile(model, self.tokenizer)
            _share(model.base_model, self._encoder)
            self._finish(model.to(self.device))
            self._plain[key] = model, frozenset(missing)
        return self._plain[key]

    def _load(self, pooling: str, labels: int) -> tuple[PreTrainedModel, set[str]]:
        return load_base(self.base, [str(number) for number in range(labels)], pooling=pooling, **self.hub)

    def _finish(self, model: PreTrainedModel) -> None:
        if self.precision is not None:
            cast_frozen(model, self.precision.dtype)
        model.requires_grad_(False).eval()

    def _tokenizer_of(self, adapter: Described, model: PreTrainedModel) -> PreTrainedTokenizerBase:
        kept = load_tokenizer_files(adapter.files.tokenizer, str(adapter.files.directory))
        return load_tokenizer(self.base, model=model, kept=kept, **self.hub)

    def _check_tokenizer(self, adapter: Described) -> None:
        """Refuse another tokenizer: by its files, which takes no time, or by what they mean."""
        digest = _digest(adapter.files.tokenizer)
        if digest in self._tokenizers:
            return
        plain, _ = self._plain[NATIVE, 2]
        if _meaning(self._tokenizer_of(adapter, plain)) != self._meaning:
            raise self._other_tokenizer(f"in {str(adapter.files.directory)!r}")
        self._tokenizers.add(digest)

    def _other_tokenizer(self, where: str) -> ValueError:
        return ValueError(
            f"the adapter {where} has another tokenizer than the bank, which has that of {self.place!r}; expected the "
            "same, since all texts are tokenized once; load it into a bank of its own"
        )

    def _check_base_name(self, adapter: Described, check_base: bool) -> None:
        """Refuse another base by its name, where the adapter has no fingerprint of it."""
        own = adapter.files.base_name
        known = adapter.files.info is not None and adapter.files.info.base_model.fingerprint is not None
        if check_base and not known and own not in (None, self.base):
            raise ValueError(
                f"the adapter in {str(adapter.files.directory)!r} is of another base model than the bank; got {own!r}; "
                f"expected {self.base!r}; pass check_base=False if they are the same"
            )


def _key(adapter: Described, check_base: bool) -> str:
    """What decides whether two adapters fit in the same way, but for the values and shapes of their tensors."""
    files, info = adapter.files, adapter.info
    base = info.base_model
    values = [info.pooling, len(info.labels), files.task, base.fingerprint, base.encoder, check_base]
    whole = sorted(name for name in files.tensors if ".lora_" not in name)
    saved = files.peft_config.get("modules_to_save")
    return json.dumps([*values, whole, saved, files.config.to_dict()], sort_keys=True)


def _same(model: nn.Module, copied: Collection[str] = ()) -> dict[int, Any]:
    """For `copy.deepcopy`: the parameters and buffers of a model but for some, as their own copies."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {id(tensor): tensor for name, tensor in tensors if name not in copied}


def _share(model: nn.Module, source: nn.Module) -> None:
    """Let a model have the parameters and buffers of another by the same names, in the place of its own."""
    theirs = dict(source.named_parameters(remove_duplicate=False)) | dict(
        source.named_buffers(remove_duplicate=False)
    )
    for prefix, module in model.named_modules(remove_duplicate=False):
        for places in (module._parameters, module._buffers):
            for name in places:
                places[name] = theirs.get(f"{prefix}.{name}".lstrip("."), places[name])


def _probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """A few sequences of different tokens for a model."""
    batch = probe_batch(model, tokenizer)
    rows = torch.arange(_ROWS) % len(batch["input_ids"])
    return {name: batch[name][rows.to(model.device)] for name in ("input_ids", "attention_mask")}


def _digest_of(adapter: Described) -> str:
    """A digest of all that an adapter's files say."""
    digest = sha256(f"{adapter.info}{adapter.files.config}".encode())
    for name, tensor in sorted(adapter.files.tensors.items()):
        digest.update(f"{name}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(files: Mapping[str, bytes]) -> str:
    digest = sha256()
    for name in sorted(files):
        digest.update(f"{name}:{len(files[name])};".encode() + files[name])
    return digest.hexdigest()


def _meaning(tokenizer: Any) -> str:
    """A digest of what a tokenizer makes of texts, but for their length in a call."""
    backend: Any = getattr(tokenizer, "_tokenizer", None)
    if hasattr(backend, "to_str"):
        state = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    else:
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    names = ("model_max_length", "model_input_names", "pad_token_id", "padding_side", "all_special_ids")
    state |= {name: getattr(tokenizer, name) for name in names}
    return sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()
