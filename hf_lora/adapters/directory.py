"""The adapter directory: a PEFT adapter plus `hf_lora.json`, written whole and read strictly."""

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
from hf_lora.adapters.info import FILE, AdapterInfo, BaseModel
from hf_lora.adapters.peft_format import PREFIX, adapter_tensors, from_peft, load_tensors, to_peft
from hf_lora.lora.config import LoRAConfig
from hf_lora.lora.head import base_prefix, belongs_to, find_head
from hf_lora.lora.inject import base_parameters, inject_lora, injection, remove_lora
from hf_lora.lora.targets import find_targets
from hf_lora.models.fingerprint import fingerprint
from hf_lora.models.pooling import pooling_of
from hf_lora.tasks import task_of
from hf_lora.version import __version__

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_DIGESTED = (TENSORS, CONFIG)
# Up to this rank tensors may be made before the file's shapes are compared.
_SMALL_RANK = 1024
# The time for matching all patterns of an adapter; usual ones take milliseconds.
_PATTERNS_SECONDS = 10.0


@dataclass(frozen=True)
class AdapterFiles:
    """The contents of an adapter directory, not yet compared with a model."""

    directory: Path
    config: LoRAConfig
    peft_config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    info: AdapterInfo | None

    @property
    def base_name(self) -> str | None:
        """The Hub id or path of the base model, from `hf_lora.json` or else from PEFT's file."""
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

    tokenizer: saved too, so that the directory needs nothing else but the base model.
    metrics: results for `hf_lora.json`, added to those that it has.
    files: more files by name, such as the model card under "README.md".
    All files appear or none. Raises ValueError for NaN or infinity, before writing.
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
    config = to_peft(model, injection(model), base_name=base.name_or_path, revision=base.revision)
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
    """Write all files of an adapter or none; yields their temporary folder, for more files.

    info: the contents of `hf_lora.json`; the digests are added here. None: no such file.
    """
    with replacing(directory, last=(FILE,)) as folder:
        safetensors.torch.save_file(dict(tensors), folder / TENSORS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        yield folder
        if info is not None:
            info = replace(info, sha256={name: _sha256((folder / name).read_bytes()) for name in _DIGESTED})
            (folder / FILE).write_text(info.to_json(), encoding="utf-8")


def load_adapter(model: nn.Module, directory: str | Path, *, check_base: bool = True) -> LoRAConfig:
    """Put the adapter and head of a directory, ours or peft's, into a plain model; returns the config.

    check_base: refuse a base model with other weights than the adapter was trained on.
    Raises ValueError for anything that does not fit; the model is then unchanged.
    """
    return load_files(model, read_adapter(directory), check_base=check_base)


def load_files(model: nn.Module, files: AdapterFiles, *, check_base: bool = True) -> LoRAConfig:
    """Put an adapter that was read into a plain model; `load_adapter` after `read_adapter`."""
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
    """Read a directory and compare its files with each other. Raises ValueError naming what is wrong."""
    directory = Path(directory)
    for name in _DIGESTED:
        if not (directory / name).is_file():
            found = (
                sorted(path.name for path in directory.iterdir()) if directory.is_dir() else "no directory"
            )
            raise ValueError(
                f"not an adapter directory; {name} is missing in {str(directory)!r}; got {found}"
            )
    # Each file is read once, so that the bytes that are checked are those that are used.
    contents = {
        TENSORS: read_bytes(directory, TENSORS),
        CONFIG: read_bytes(directory, CONFIG, limit=MAX_JSON_BYTES),
    }
    info = None
    if (directory / FILE).is_file():
        text = read_bytes(directory, FILE, limit=MAX_JSON_BYTES).decode("utf-8", "replace")
        info = AdapterInfo.from_json(text, str(directory / FILE))
        _check_digests(info, contents, directory)
    peft_config = parse_object(contents[CONFIG], str(directory / CONFIG))
    tensors = parse_tensors(contents[TENSORS], str(directory / TENSORS))
    if info is not None:
        _check_label_count(info, tensors, directory)
    lora = info.lora if info else None
    config = from_peft(peft_config, tensors) if lora is None else LoRAConfig.from_dict(lora)
    return AdapterFiles(directory, config, peft_config, tensors, info)


def adapter_info(model: nn.Module) -> AdapterInfo:
    """The contents of `hf_lora.json` for an injected model: as loaded or declared, else from `model.config`."""
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


def _check_digests(info: AdapterInfo, contents: Mapping[str, bytes], directory: Path) -> None:
    for name, expected in info.sha256.items():
        if name in _DIGESTED and _sha256(contents[name]) != expected:
            raise ValueError(
                f"{name} in {str(directory)!r} was changed after it was written; its sha256 is not the one in "
                f"{FILE}; restore it, or delete {FILE} to load the files as a bare PEFT adapter"
            )


def _check_label_count(info: AdapterInfo, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Refuse more labels than any tensor has rows, before a head of that size is made."""
    rows = max((tensor.shape[0] for tensor in tensors.values() if tensor.ndim), default=0)
    if len(info.labels) > rows:
        raise ValueError(
            f"{FILE} in {str(directory)!r} lists {len(info.labels)} labels; got no head of that size in "
            f"{TENSORS}; expected at most {rows}"
        )


def _check_pooling(model: nn.Module, files: AdapterFiles) -> None:
    if files.info is not None and files.info.pooling != pooling_of(model):
        raise ValueError(
            f"the adapter in {str(files.directory)!r} has a head with pooling={files.info.pooling!r}; got a model with "
            f"{pooling_of(model)!r}; load it with TextClassifier.from_pretrained, or into load_base(..., pooling=...)"
        )


def _check_ranks(model: nn.Module, files: AdapterFiles, head: list[str]) -> None:
    """Refuse ranks that the file's tensors do not have, before tensors of that size are made."""
    rows = {
        key.removeprefix(PREFIX).removesuffix(end): tensor.shape[0]
        for key, tensor in files.tensors.items()
        for end in (".lora_A.weight", ".lora_embedding_A")
        if key.endswith(end) and tensor.ndim
    }
    deadline = time.monotonic() + _PATTERNS_SECONDS
    for target in find_targets(model, files.config, head):
        rank = files.config.rank_of(target.name)
        files.config.alpha_of(target.name)  # so that its patterns count too
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

    Adapters of hf_lora bring the whole head. Those of peft may leave out an untrained part, such as DeBERTa's pooler.
    """
    # As peft matches modules_to_save.
    wanted = tuple(files.peft_config.get("modules_to_save") or ())
    head = [name for name in find_head(model) if files.info is not None or name.endswith(wanted)]
    prefix = base_prefix(model)
    whole = [key for key in files.tensors if ".lora_" not in key]
    # A module without a tensor in the file has a name that matches by accident.
    saved = [
        name
        for name, _ in model.named_modules()
        if name
        and name.endswith(wanted)
        and (not prefix or belongs_to(name, [prefix]))
        and any(belongs_to(key, [PREFIX + name]) for key in whole)
    ]
    return head + [name for name in saved if not belongs_to(name.rpartition(".")[0], saved)]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
