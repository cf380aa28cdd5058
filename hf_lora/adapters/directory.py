"""The adapter directory: a PEFT adapter plus `hf_lora.json`, written whole and read strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from hf_lora._files import (
    MAX_JSON_BYTES,
    MAX_TENSORS_BYTES,
    parse_object,
    parse_tensors,
    read_bytes,
    replacing,
)
from hf_lora._text import shortened
from hf_lora.adapters import peft_format
from hf_lora.adapters.info import FILE, AdapterInfo, BaseModel, read_info
from hf_lora.adapters.loading import load_tensors
from hf_lora.adapters.peft_format import PREFIX, adapted_modules, brought_whole
from hf_lora.adapters.pooled_format import of_classifier, of_encoder
from hf_lora.lora.config import LoRAConfig
from hf_lora.lora.head import base_prefix, belongs_to, find_head, parts_without, unwrapped
from hf_lora.lora.inject import base_parameters, inject_lora, injection, remove_lora
from hf_lora.lora.targets import find_targets
from hf_lora.models.fingerprint import fingerprint
from hf_lora.models.pooling import NATIVE, pooling_of
from hf_lora.models.tokenizer_files import read_tokenizer
from hf_lora.tasks import task_of
from hf_lora.version import __version__

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# The files that every adapter has, and the most bytes that they may have.
_REQUIRED = {TENSORS: MAX_TENSORS_BYTES, CONFIG: MAX_JSON_BYTES}
# Up to this rank tensors may be made before the file's shapes are compared.
_SMALL_RANK = 1024


@dataclass(frozen=True)
class AdapterFiles:
    """The contents of an adapter directory, not yet compared with a model. tokenizer: its files by name."""

    directory: Path
    config: LoRAConfig
    peft_config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    info: AdapterInfo | None
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def base_name(self) -> str | None:
        """The Hub id or path of the base model, from `hf_lora.json` or else from PEFT's file."""
        own = self.info.base_model.name_or_path if self.info else None
        return own or self.peft_config.get("base_model_name_or_path")

    @property
    def task(self) -> str | None:
        """peft's task type, from the adapter itself or from the class of the model that it was made on."""
        if self.info is not None and self.info.pooling != NATIVE:
            return None  # peft has none for it
        made_on = (self.peft_config.get("auto_mapping") or {}).get("base_model_class")
        return self.peft_config.get("task_type") or peft_format.task_of_class(made_on)

    def brings(self, parameter: str) -> bool:
        """Whether the file has a parameter of the model itself, not only an update of it."""
        module, _, name = f"{PREFIX}{parameter}".rpartition(".")
        return not self.tensors.keys().isdisjoint((f"{module}.{name}", f"{module}.base_layer.{name}"))


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
    model = unwrapped(model)
    tensors = peft_format.adapter_tensors(model)
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(
            f"the adapter is not saved, since training diverged; got NaN or infinity in {len(broken)} tensors, "
            f"first {broken[0]!r}; try a lower learning rate"
        )
    info = adapter_info(model)
    info = replace(info, metrics={**info.metrics, **(metrics or {})})
    base = info.base_model
    config = peft_format.to_peft(model, base_name=base.name_or_path, revision=base.revision)
    return write_files(directory, tensors, config, info, tokenizer=tokenizer, files=files or {})


def write_files(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    info: AdapterInfo | None,
    *,
    tokenizer: Any = None,
    files: Mapping[str, str | bytes],
) -> Path:
    """Write all files of an adapter directory or none; returns its path.

    tensors, config: with the names of the whole classifier; those of a pooled one are written as of its encoder.
    info: the contents of `hf_lora.json`; the digests are added here. None: no such file.
    """
    directory = Path(directory)
    if info is not None and info.pooling != NATIVE:
        tensors, config, encoder = of_encoder(tensors, config)
        info = replace(info, base_model=replace(info.base_model, encoder=encoder))
    with replacing(directory, last=(FILE,)) as folder:
        safetensors.torch.save_file(dict(tensors), folder / TENSORS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for name, content in files.items():
            (folder / name).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        if info is not None:
            written = {name: (folder / name).read_bytes() for name in _REQUIRED} | read_tokenizer(folder)
            digests = {name: sha256(content).hexdigest() for name, content in written.items()}
            (folder / FILE).write_text(replace(info, sha256=digests).to_json(), encoding="utf-8")
    return directory


def load_adapter(model: nn.Module, directory: str | Path, *, check_base: bool = True) -> LoRAConfig:
    """Put the adapter and head of a directory, ours or peft's, into a plain model; returns the config.

    check_base: refuse a base model with other weights than the adapter was trained on.
    Raises ValueError for anything that does not fit; the model is then unchanged.
    """
    return load_files(model, read_adapter(directory), check_base=check_base)


def load_files(model: nn.Module, files: AdapterFiles, *, check_base: bool = True) -> LoRAConfig:
    """Put an adapter that was read into a plain model; `load_adapter` after `read_adapter`."""
    model, place, info = unwrapped(model), str(files.directory), files.info
    if info is not None and info.pooling != pooling_of(model):
        raise ValueError(
            f"the adapter in {place!r} has a head with pooling={info.pooling!r}; got a model with "
            f"{pooling_of(model)!r}; load it with TextClassifier.from_pretrained, or into load_base(..., pooling=...)"
        )
    fit = (adapted := adapted_modules(files.tensors)) <= {name for name, _ in model.named_modules()}
    # Updates alone may suit a model with another head.
    if info is not None or not fit or any(".lora_" not in key for key in files.tensors):
        check_task(files, peft_format.task_of_class(type(model).__name__))
    brought = brought_whole(files.peft_config, files.tensors, model)
    head = _head_in(model, adapted, brought)
    _check_ranks(model, files, head)
    tensors = _with_head(files, model, head, brought)
    inject_lora(model, files.config, head=head, blank=True)
    try:
        trained_on = info.base_model.fingerprint if check_base and info is not None else None
        if trained_on is not None and trained_on != (given := fingerprint(base_parameters(model))):
            raise ValueError(
                f"the base model is not the one the adapter in {place!r} was trained on; got weights "
                f"with {given}; expected {files.base_name!r} with {trained_on}; load that base, or pass "
                "check_base=False to use this one all the same"
            )
        load_tensors(model, tensors, source=str(files.directory / TENSORS))
    except BaseException:
        remove_lora(model)
        raise
    injection(model).info = info
    return files.config


def check_task(files: AdapterFiles, expected: str | None) -> None:
    """Raise ValueError for an adapter that says that it is for another of peft's task types than `expected`."""
    if files.task in peft_format.TASKS and expected not in (None, files.task):
        words, ending, _ = peft_format.TASKS[files.task]
        raise ValueError(
            f"the adapter in {str(files.directory)!r} is for {words}; got task_type={files.task!r}; expected "
            f"{expected!r}; load it into an AutoModel{ending.removeprefix('Model')} with hf_lora.load_adapter"
        )


def read_adapter(directory: str | Path) -> AdapterFiles:
    """Read a directory and compare its files with each other. Raises ValueError naming what is wrong."""
    directory = Path(directory)
    place = str(directory)
    for name in _REQUIRED:
        if not (directory / name).is_file():
            found = (
                sorted(path.name for path in directory.iterdir()) if directory.is_dir() else "no directory"
            )
            raise ValueError(f"not an adapter directory; {name} is missing in {place!r}; got {found}")
    # Each file is read once, so that the bytes that are checked are those that are used.
    contents = {name: read_bytes(directory, name, limit=limit) for name, limit in _REQUIRED.items()}
    contents |= (tokenizer := read_tokenizer(directory))
    info = read_info(directory)
    for name, digest in info.sha256.items() if info else ():
        if name in contents and sha256(contents[name]).hexdigest() != digest:
            raise ValueError(
                f"{name} in {place!r} was changed after it was written; its sha256 is not the one in "
                f"{FILE}; restore it, or delete {FILE} to load the files as a bare PEFT adapter"
            )
    if info and tokenizer.keys() & info.sha256.keys():
        # What was added later is left out: it would change the tokens.
        tokenizer = {name: content for name, content in tokenizer.items() if name in info.sha256}
    peft_config = parse_object(contents[CONFIG], str(directory / CONFIG))
    peft_format.check_values(peft_config)
    tensors = peft_format.as_today(parse_tensors(contents[TENSORS], str(directory / TENSORS)))
    if info and info.base_model.encoder:
        tensors, peft_config = of_classifier(tensors, peft_config, info.base_model.encoder)
    # Before a head of that size is made.
    rows = max((tensor.shape[0] for tensor in tensors.values() if tensor.ndim), default=0)
    if info and len(info.labels) > rows:
        raise ValueError(
            f"{FILE} in {place!r} lists {len(info.labels)} labels; got no head of that size in "
            f"{TENSORS}; expected at most {rows}"
        )
    lora = info.lora if info else None
    config = peft_format.from_peft(peft_config, tensors) if lora is None else LoRAConfig.from_dict(lora)
    return AdapterFiles(directory, config, peft_config, tensors, info, tokenizer)


def adapter_info(model: nn.Module) -> AdapterInfo:
    """The contents of `hf_lora.json` for an injected model: as loaded or declared, else from `model.config`."""
    state, config = injection(model), getattr(unwrapped(model), "config", None)
    labels = getattr(config, "id2label", None) or {}
    info = state.info or AdapterInfo(
        labels=tuple(str(labels[index]) for index in sorted(labels)),
        problem_type=task_of(getattr(config, "problem_type", None)).name,
        pooling=pooling_of(model),
        base_model=BaseModel(
            getattr(config, "_name_or_path", None) or None, getattr(config, "_commit_hash", None)
        ),
    )
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


def _check_ranks(model: nn.Module, files: AdapterFiles, head: list[str]) -> None:
    """Refuse ranks that the file's tensors do not have, before tensors of that size are made."""
    places = ((peft_format.factor_place(key), tensor) for key, tensor in files.tensors.items() if tensor.ndim)
    rows = {place[0]: tensor.shape[0] for place, tensor in places if place and place[1] == "A"}
    for target in find_targets(model, files.config, head):
        rank = files.config.rank_of(target.name)
        if rank > max(rows.get(target.name, 0), _SMALL_RANK):
            raise ValueError(
                f"the adapter in {str(files.directory)!r} has another rank in its configuration than in its tensors "
                f"at {target.name!r}; got {rank}; expected {rows.get(target.name, 'no tensors')}"
            )


def _head_in(model: nn.Module, adapted: set[str], brought: list[str]) -> list[str]:
    """The modules that are saved whole: the head, but for what is adapted in it, and others of `modules_to_save`."""
    head, prefix = parts_without(model, find_head(model), adapted), base_prefix(model)
    saved = [name for name in brought if not prefix or belongs_to(name, [prefix])]
    return head + [name for name in saved if not belongs_to(name.rpartition(".")[0], saved)]


def _with_head(
    files: AdapterFiles, model: nn.Module, head: list[str], brought: list[str]
) -> Mapping[str, Tensor]:
    """The adapter's tensors, with the model's own for the parts of the head that an adapter of peft leaves out.

    So what is saved from the model is whole. Raises ValueError for a module inside another: peft writes both under the
    same names, and cannot load them itself.
    """
    if files.info is not None:
        return files.tensors
    if twice := [name for name in brought if belongs_to(name.rpartition(".")[0], brought)]:
        raise ValueError(
            f"the adapter in {str(files.directory)!r} has {twice[0]!r} twice, by itself and as a part; got "
            f"modules_to_save={shortened(files.peft_config['modules_to_save'])}; expected none inside another; train "
            "with one of the two"
        )
    own = {name: tensor for name, tensor in model.state_dict().items() if belongs_to(name, head)}
    left_out = {PREFIX + name: own[name] for name in own if not belongs_to(name, brought)}
    return {**left_out, **files.tensors}
