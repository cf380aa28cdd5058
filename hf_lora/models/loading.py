"""In which precision the frozen network runs: chosen from what the hardware is good at, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_lora.adapters.directory import AdapterFiles, load_files, read_adapter
from hf_lora.adapters.info import AdapterInfo, BaseModel
from hf_lora.lora.config import LoRAConfig
from hf_lora.lora.head import base_prefix, belongs_to, cast_inputs, find_head, fresh_modules
from hf_lora.lora.inject import base_parameters, inject_lora, injection, lora_parameters
from hf_lora.models.bundled import resolve_base
from hf_lora.models.fingerprint import fingerprint
from hf_lora.models.pooling import HEAD, NATIVE, PooledClassifier, check_pooling

PRECISIONS = ("auto", "fp32", "bf16")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """`name` is "fp32" or "bf16"; `reason` says in a few words why."""

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The type of the frozen weights; LoRA and head are fp32 in either."""
        return _DTYPES[self.name]

    def __str__(self) -> str:
        return f"precision: {self.name} ({self.reason})"


def choose_precision(
    requested: str = "auto",
    device: str | torch.device | None = None,
    *,
    autocast: bool = False,
    sharded: bool = False,
) -> Precision:
    """The precision of the frozen weights on `device` (None: the GPU where there is one).

    "auto" is bf16 where the hardware multiplies it natively, else fp32. LoRA and head need no lower
    precision: they are small, and their updates are too fine for bf16.
    autocast: whether every product is cast anyway, as `--bf16` and `--fp16` ask for.
    sharded: whether parameters are sharded over processes (FSDP, ZeRO-3), which wants one type for all.
    Raises ValueError for another word than those in `PRECISIONS`.
    """
    if requested not in PRECISIONS:
        raise ValueError(
            f"precision is not usable; got {requested!r}; expected one of {', '.join(PRECISIONS)}"
        )
    if requested != "auto":
        return Precision(requested, "as asked for")
    if autocast:
        return Precision("fp32", "cast at every step, as --bf16 or --fp16 asks for")
    if sharded:
        return Precision("fp32", "sharded parameters must be of one type")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.device(device).type
    instruction = _NATIVE[kind]() if kind in _NATIVE else None
    if instruction is None:
        return Precision("fp32", f"this {kind.upper()} does not multiply bf16 natively")
    return Precision("bf16", f"this {kind.upper()} multiplies bf16 natively: {instruction}")


def _cpu_instruction() -> str | None:
    capabilities = torch.cpu.get_capabilities()
    return next((name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)), None)


def _cuda_instruction() -> str | None:
    return "tensor cores" if torch.cuda.is_bf16_supported(including_emulation=False) else None


_NATIVE: dict[str, Callable[[], str | None]] = {"cpu": _cpu_instruction, "cuda": _cuda_instruction}


def load_tokenizer(base: str, *, revision: str | None = None, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model: a Hub id, a local directory or a bundled name."""
    source = resolve_base(base, revision=revision, cache_dir=hub.get("cache_dir"))
    return AutoTokenizer.from_pretrained(source, revision=revision, **hub)


def load_classifier(
    base: str,
    labels: Sequence[str],
    config: LoRAConfig | None = None,
    *,
    problem_type: str = "single_label_classification",
    pooling: str = NATIVE,
    max_length: int | None = None,
    text_columns: Sequence[str] = (),
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    **hub: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained classifier with a head for `labels` and LoRA injected, and its tokenizer.

    base: a Hub id, a local directory, or a Hub id that an installed package ships.
    labels: names in the order of the outputs; for regression the name of each target.
    config: None means `LoRAConfig()`.
    pooling: "native", the architecture's own head, or "mean", "mean_layers" or "cls": a linear layer on the mean of the
        tokens, on their means in three layers, or on the first one, of which peft and transformers load the LoRA part
        only. `choose_pooling` knows what suits.
    dtype: precision of the frozen weights; None: that of the checkpoint. LoRA and head are fp32.
    hub: passed to transformers: `token`, `cache_dir`, `trust_remote_code`.
    Raises ValueError if the checkpoint does not fit the architecture; OSError if there is none.
    """
    model, missing = load_base(
        base, labels, problem_type=problem_type, pooling=pooling, revision=revision, dtype=dtype, **hub
    )
    head = (*find_head(model), *fresh_modules(model, missing))
    inject_lora(model, config or LoRAConfig(), head=head)
    base_model = BaseModel(
        name_or_path=base,
        revision=revision or getattr(model.config, "_commit_hash", None),
        fingerprint=fingerprint(base_parameters(model)),
    )
    injection(model).fresh = frozenset(missing)
    injection(model).info = AdapterInfo(
        labels=tuple(labels),
        problem_type=problem_type,
        pooling=pooling,
        max_length=max_length,
        text_columns=tuple(text_columns),
        base_model=base_model,
    )
    return model, load_tokenizer(base, revision=revision, **hub)


def load_base(
    base: str,
    labels: Sequence[str],
    *,
    problem_type: str = "single_label_classification",
    pooling: str = NATIVE,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    **hub: Any,
) -> tuple[PreTrainedModel, set[str]]:
    """The pretrained classifier without LoRA, and the names of the parameters the checkpoint did not have.

    Those and the head are fp32 whatever `dtype` is. A checkpoint's own head is kept if it has the same shape.
    """
    labels = [str(label) for label in labels]
    if not labels or len(set(labels)) != len(labels):
        raise ValueError(f"labels are not usable; got {labels!r}; expected at least one name, each once")
    check_pooling(pooling)
    source = resolve_base(base, revision=revision, cache_dir=hub.get("cache_dir"))
    model_config = AutoConfig.from_pretrained(
        source,
        revision=revision,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        problem_type=problem_type,
        **hub,
    )
    if model_config.pad_token_id is None and model_config.eos_token_id is not None:
        model_config.pad_token_id = model_config.eos_token_id
    with _quiet_loading():
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            source,
            config=model_config,
            revision=revision,
            dtype=dtype or "auto",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **hub,
        )
    head = find_head(model)
    mismatched = {key for key, *_ in loading["mismatched_keys"]}
    misfits = sorted(key for key in mismatched if not belongs_to(key, head))
    if misfits:
        raise ValueError(
            f"the checkpoint {base!r} does not fit {type(model).__name__}; other shape of {misfits[0]!r}"
        )
    if pooling != NATIVE:
        model = PooledClassifier(model, pooling)
        head = find_head(model)
        mismatched = {f"{HEAD}.weight", f"{HEAD}.bias"}  # no checkpoint of the base has them
    parameters = dict(model.named_parameters())
    missing = (set(loading["missing_keys"]) | mismatched) & set(parameters)
    trained = [name for name in parameters if name in missing or belongs_to(name, head)]
    mixed = any(parameters[name].dtype != torch.float32 for name in trained)
    for name in trained:
        parameters[name].data = parameters[name].data.float()
    if mixed:
        cast_inputs(model, {name.rpartition(".")[0] for name in trained} - {""})
    # transformers records where it read from; users and adapters are to see the name that was asked for.
    model.config._name_or_path = model.name_or_path = base
    return model, missing


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without transformers' report of fresh weights: what is fresh is checked here, strictly."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def load_trained(
    directory: str | Path,
    *,
    base: str | None = None,
    check_base: bool = True,
    dtype: torch.dtype | None = None,
    **hub: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, AdapterInfo]:
    """The classifier of an adapter directory, its tokenizer and what the sidecar says. Needs no other argument.

    base: another place of the base model than the one the adapter names.
    Raises ValueError if the directory names no base model, or for anything that does not fit exactly.
    """
    files = read_adapter(directory)
    base = base or files.base_name
    if not base:
        raise ValueError(
            f"the adapter in {str(directory)!r} names no base model; pass base='<Hub id or directory>'"
        )
    info = files.info or _info_of_foreign(files, base)
    # Never by what the adapter names, nor by a question on the terminal.
    hub.setdefault("trust_remote_code", False)
    revision = info.base_model.revision if base == info.base_model.name_or_path else None
    model, missing = load_base(
        base,
        info.labels,
        problem_type=info.problem_type,
        pooling=info.pooling,
        revision=revision,
        dtype=dtype,
        **hub,
    )
    load_files(model, files, check_base=check_base)
    random = sorted(name for name in missing if not belongs_to(name, injection(model).head))
    if random:
        raise ValueError(
            f"neither the adapter in {str(directory)!r} nor its base {base!r} has weights for {len(random)} tensors, "
            f"first {random[0]!r}; they would be random"
        )
    injection(model).info = info
    has_tokenizer = (Path(directory) / "tokenizer_config.json").is_file()
    tokenizer = (
        AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        if has_tokenizer
        else load_tokenizer(base, revision=revision, **hub)
    )
    return model.eval(), tokenizer, info


@torch.no_grad()
def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the encoder of an injected model to `dtype`, merged or not; LoRA and the head outside it are fp32.

    Tables of angles, which need their precision, keep their type: buffers that no checkpoint holds, of modules
    without parameters. So it is with `from_pretrained(dtype=...)` too.
    """
    prefix = base_prefix(model)
    head = [name for name in injection(model).head if not belongs_to(name, [prefix])]
    lora = {id(parameter) for parameter in lora_parameters(model).values()}
    layers = set()
    tensors = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        owner = model.get_submodule(name.rpartition(".")[0])
        if any(True for _ in owner.parameters()):
            tensors[name] = buffer
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or id(tensor) in lora:
            continue
        in_head = belongs_to(name, head)
        tensor.data = tensor.data.to(torch.float32 if in_head else dtype)
        if in_head and isinstance(tensor, nn.Parameter):
            layers.add(name.rpartition(".")[0])
    if dtype != torch.float32:
        cast_inputs(model, layers - {""})


def _info_of_foreign(files: AdapterFiles, base: str) -> AdapterInfo:
    """What can be told of somebody else's PEFT adapter: the head's size gives the number of labels."""
    head = [tensor for key, tensor in files.tensors.items() if ".lora_" not in key and tensor.ndim == 2]
    if not head:
        raise ValueError(
            f"the adapter in {str(files.directory)!r} has no classification head; load it with "
            "hf_lora.load_adapter onto a model whose head is trained"
        )
    count = head[-1].shape[0]
    info = AdapterInfo(labels=tuple(f"LABEL_{index}" for index in range(count)))
    return replace(info, base_model=BaseModel(base, files.peft_config.get("revision")))


def meta_classifier(
    base: str, *, revision: str | None = None, num_labels: int = 2, **hub: Any
) -> PreTrainedModel:
    """The classifier of a base model without weights, on the meta device: for names, shapes and counts."""
    source = resolve_base(base, revision=revision, cache_dir=hub.get("cache_dir"))
    config = AutoConfig.from_pretrained(source, revision=revision, num_labels=num_labels, **hub)
    trusted = {"trust_remote_code": hub["trust_remote_code"]} if "trust_remote_code" in hub else {}
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config, **trusted)
