"""The adapter directory: write it whole, read it strictly. A genuine PEFT adapter plus `hf_lora.json`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from hf_lora._files import MAX_JSON_BYTES, parse_object, parse_tensors, read_bytes, replacing
from hf_lora.adapters import info as sidecar
from hf_lora.adapters import peft_format
from hf_lora.adapters.info import AdapterInfo, BaseModel
from hf_lora.adapters.peft_format import adapter_tensors, load_tensors
from hf_lora.lora.config import LoRAConfig
from hf_lora.lora.head import base_prefix, belongs_to, find_head
from hf_lora.lora.inject import (
    base_parameters,
    inject_lora,
    injection,
    remove_lora,
)
from hf_lora.lora.targets import find_targets
from hf_lora.models.fingerprint import fingerprint
from hf_lora.models.pooling import pooling_of
from hf_lora.tasks import task_of
from hf_lora.version import __version__

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_DIGESTED = (TENSORS, CONFIG)
# Tensors of this rank may be made before their shapes are compared.
_SMALL_RANK = 1024
# For all patterns and modules of an adapter; honest ones take milliseconds.
_PATTERNS_SECONDS = 10.0


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter directory, read and checked against itself but not yet against a model."""

    directory: Path
    config: LoRAConfig
    peft_config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    info: AdapterInfo | None

    @property
    def base_name(self) -> str | None:
        """The Hub id or path of the base model, from the sidecar or else from PEFT's file."""
        own = self.info.base_model.name_or_path if self.info else None
        return own or self.peft_config.get("base_model_name_or_path")


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    metrics: Mapping[str, Any] | None = None,
    files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write the adapter and head of an injected model as a PEFT adapter directory; returns its path.

    tokenizer: saved beside, so that the directory is self-contained.
    metrics: measured results for the sidecar; those already known are kept.
    files: more files by name, such as the model card under "README.md".
    The files appear whole or not at all. Raises ValueError for NaN or infinity, before writing.
    """
    directory = Path(directory)
    tensors = adapter_tensors(model)
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(
            f"the adapter is not saved, since training diverged; got NaN or infinity in {len(broken)} tensors, "
            f"first {broken[0]!r}; try a lower learning rate"
        )
    info = adapter_info(model)
    info = replace(info, metrics={**info.metrics, **(metrics or {})})
    base = info.base_model
    config = peft_format.to_peft(model, injection(model), base_name=base.name_or_path, revision=base.revision)
    with writing_adapter(directory, tensors, config, info) as folder:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for name, content in (files or {}).items():
            (folder / name).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return directory


@contextmanager
def writing_adapter(
    directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], info: AdapterInfo | None
) -> Iterator[Path]:
    """Write the files of an adapter, whole or not at all; yields their temporary folder, for more to be added.

    info: the sidecar's contents without the digests, which are added; None: no sidecar.
    """
    with replacing(directory, last=(sidecar.FILE,)) as folder:
        safetensors.torch.save_file(dict(tensors), folder / TENSORS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        yield folder
        if info is not None:
            digests = {name: _sha256((folder / name).read_bytes()) for name in _DIGESTED}
            info = replace(info, sha256=digests)
            (folder / sidecar.FILE).write_text(info.to_json(), encoding="utf-8")


def load_adapter(model: nn.Module, directory: str | Path, *, check_base: bool = True) -> LoRAConfig:
    """Put the adapter and head of a directory, ours or peft's, into a plain model; returns its config.

    check_base: refuse a base model whose weights are not those the adapter was trained on.
    Raises ValueError for anything that does not fit exactly; the model is then as it was.
    """
    return load_files(model, read_adapter(directory), check_base=check_base)


def load_files(model: nn.Module, files: AdapterFiles, *, check_base: bool = True) -> LoRAConfig:
    """Put an adapter that was read into a plain model, as `load_adapter` does."""
    _check_pooling(model, files)
    head = _head_in(files, model)
    _check_ranks(model, files, head)
    inject_lora(model, files.config, head=head, blank=True)
    try:
        if check_base and files.info is not None:
            _check_fingerprint(model, files)
        load_tensors(model, files.tensors, source=str(files.directory / TENSORS))
    except BaseException:
        remove_lora(model)
        raise
    injection(model).info = files.info
    return files.config


def read_adapter(directory: str | Path) -> AdapterFiles:
    """Read a directory and check that its files belong together. Raises ValueError naming what is wrong."""
    directory = Path(directory)
    for name in _DIGESTED:
        if not (directory / name).is_file():
            present = (
                sorted(path.name for path in directory.iterdir()) if directory.is_dir() else "no directory"
            )
            raise ValueError(
                f"not an adapter directory; {name} is missing in {str(directory)!r}; got {present}"
            )
    # Each file is read once, so that what is checked is what is used.
    contents = {
        name: read_bytes(directory, name, limit=limit)
        for name, limit in ((TENSORS, None), (CONFIG, MAX_JSON_BYTES))
    }
    info = None
    if (directory / sidecar.FILE).is_file():
        text = read_bytes(directory, sidecar.FILE, limit=MAX_JSON_BYTES).decode("utf-8", "replace")
        info = AdapterInfo.from_json(text, str(directory / sidecar.FILE))
        for name, expected in info.sha256.items():
            if name in _DIGESTED and _sha256(contents[name]) != expected:
                raise ValueError(
                    f"{name} in {str(directory)!r} was changed after it was written; its sha256 is not the one in "
                    f"{sidecar.FILE}; restore it, or delete {sidecar.FILE} to load the files as a bare PEFT adapter"
                )
    peft_config = parse_object(contents[CONFIG], str(directory / CONFIG))
    tensors = parse_tensors(contents[TENSORS], str(directory / TENSORS))
    lora = info.lora if info else None
    if info is not None:
        _check_label_count(info, tensors, directory)
    config = peft_format.from_peft(peft_config, tensors) if lora is None else LoRAConfig.from_dict(lora)
    return AdapterFiles(directory, config, peft_config, tensors, info)


def adapter_info(model: nn.Module) -> AdapterInfo:
    """What the sidecar says of an injected model: as loaded or declared, else from `model.config`."""
    state = injection(model)
    info = state.info or _info_from_config(model)
    base = info.base_model
    if base.fingerprint is None:
        base = replace(base, fingerprint=fingerprint(base_parameters(model)))
    roles = None if any(target.role is None for target in state.targets) else state.config.projections
    return replace(
        info,
        base_model=base,
        projections=roles or info.projections,
        lora=state.config.to_dict(),
        hf_lora_version=__version__,
        transformers_version=transformers.__version__,
    )


def _info_from_config(model: nn.Module) -> AdapterInfo:
    config = getattr(model, "config", None)
    labels = getattr(config, "id2label", None) or {}
    return AdapterInfo(
        labels=tuple(str(labels[index]) for index in sorted(labels)),
        problem_type=task_of(getattr(config, "problem_type", None)).name,
        pooling=pooling_of(model),
        base_model=BaseModel(
            getattr(config, "_name_or_path", None) or None, getattr(config, "_commit_hash", None)
        ),
    )


def _check_label_count(info: AdapterInfo, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """More labels than any tensor has rows have no head: none is made for them."""
    rows = max((tensor.shape[0] for tensor in tensors.values() if tensor.ndim), default=0)
    if len(info.labels) > rows:
        raise ValueError(
            f"{sidecar.FILE} in {str(directory)!r} lists {len(info.labels)} labels; got no head of that size in "
            f"{TENSORS}; expected at most {rows}"
        )


def _check_pooling(model: nn.Module, files: AdapterFiles) -> None:
    """A pooled head has no place in transformers' classifier, nor another pooling's."""
    if files.info is not None and files.info.pooling != pooling_of(model):
        raise ValueError(
            f"the adapter in {str(files.directory)!r} has a head with pooling={files.info.pooling!r}; got a model with "
            f"{pooling_of(model)!r}; load it with TextClassifier.from_pretrained, or into load_base(..., pooling=...)"
        )


def _check_ranks(model: nn.Module, files: AdapterFiles, head: list[str]) -> None:
    """Refuse ranks that the file's tensors do not have before anything of that size is made."""
    rows: dict[str, int] = {}
    for key, tensor in files.tensors.items():
        for end in (".lora_A.weight", ".lora_embedding_A"):
            if key.endswith(end) and tensor.ndim:
                rows[key.removeprefix(peft_format.PREFIX).removesuffix(end)] = tensor.shape[0]
    deadline = time.monotonic() + _PATTERNS_SECONDS
    for target in find_targets(model, files.config, head):
        rank = files.config.rank_of(target.name)
        files.config.alpha_of(target.name)
        if rank > max(rows.get(target.name, 0), _SMALL_RANK):
            raise ValueError(
                f"the adapter in {str(files.directory)!r} has another rank in its configuration than in its tensors "
                f"at {target.name!r}; got {rank}; expected {rows.get(target.name, 'no tensors')}"
            )
        if time.monotonic() > deadline:
            raise ValueError(
                f"the patterns of the adapter in {str(files.directory)!r} take too long to match; expected less than "
                f"{_PATTERNS_SECONDS:g} s; use module names"
            )


def _check_fingerprint(model: nn.Module, files: AdapterFiles) -> None:
    assert files.info is not None
    trained_on = files.info.base_model.fingerprint
    given = fingerprint(base_parameters(model))
    if trained_on is not None and trained_on != given:
        raise ValueError(
            f"the base model is not the one the adapter in {str(files.directory)!r} was trained on; got weights "
            f"with {given}; expected {files.base_name!r} with {trained_on}; load that base, or pass "
            "check_base=False to use this one all the same"
        )


def _head_in(files: AdapterFiles, model: nn.Module) -> list[str]:
    """The modules that the adapter brings whole: the head, and others of its `modules_to_save`.

    An adapter of ours brings the whole head. peft's may leave out a part of it that was not trained (DeBERTa's
    pooler), which then belongs to the base; `load_trained` sees to it that the base has it.
    """
    wanted = files.peft_config.get("modules_to_save") or []
    head = [
        name
        for name in find_head(model)
        if files.info is not None or any(name.endswith(suffix) for suffix in wanted)
    ]
    prefix = base_prefix(model)
    inside = (
        name for name, _ in model.named_modules() if name and (not prefix or belongs_to(name, [prefix]))
    )
    # As peft matches them; what has no tensor of its own in the file was matched by accident.
    saved = [
        name
        for name in inside
        if any(name.endswith(suffix) for suffix in wanted)
        and any(belongs_to(key, [peft_format.PREFIX + name]) for key in files.tensors if ".lora_" not in key)
    ]
    return head + [name for name in saved if not belongs_to(name.rpartition(".")[0], saved)]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
