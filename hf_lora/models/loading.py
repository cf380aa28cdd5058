"""Load a pretrained classifier and its tokenizer, and choose the precision of its frozen weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_lora._choices import unknown
from hf_lora.lora.head import base_prefix, belongs_to, cast_inputs, find_head
from hf_lora.lora.inject import injection, is_injected, lora_parameters
from hf_lora.models._transformers_private import record_origin
from hf_lora.models.bundled import readable, resolve_base
from hf_lora.models.pooling import HEAD, NATIVE, PooledClassifier, check_pooling
from hf_lora.models.reconcile import check_finite, reconcile

PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class Precision:
    """`name` is "fp32" or "bf16"; `reason` says in a few words why."""

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The type of the frozen weights; LoRA and head are fp32 in either."""
        return torch.bfloat16 if self.name == "bf16" else torch.float32

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

    "auto" is bf16 where the hardware has units for it, which multiply it faster than fp32, else fp32.
    autocast: every product is cast anyway, by `--bf16` or `--fp16`. sharded: over processes, by FSDP or ZeRO-3.
    Raises ValueError for another word than those in `PRECISIONS`.
    """
    if requested not in PRECISIONS:
        raise unknown("precision", requested, PRECISIONS)
    if requested != "auto":
        return Precision(requested, "as asked for")
    if autocast:
        return Precision("fp32", "cast at every step, as --bf16 or --fp16 asks for")
    if sharded:
        return Precision("fp32", "sharded parameters must be of one type")
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    capabilities = dict(torch.cpu.get_capabilities()) if kind == "cpu" else {}
    if kind == "cuda":
        capabilities["tensor cores"] = torch.cuda.is_bf16_supported(including_emulation=False)
    # AVX-512 multiplies bf16 too, but takes 1.9 times as long for it as for fp32: measured on an Intel CPU without AMX.
    for instruction in ("tensor cores", "amx_bf16"):
        if capabilities.get(instruction):
            return Precision("bf16", f"this {kind.upper()} multiplies bf16 natively: {instruction}")
    return Precision("fp32", f"this {kind.upper()} does not multiply bf16 faster")


def load_tokenizer(
    base: str,
    *,
    model: PreTrainedModel | None = None,
    kept: PreTrainedTokenizerBase | None = None,
    **hub: Any,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, or the one kept with an adapter, made to agree with the model by `reconcile`.

    base: a Hub id, a local directory or a bundled name. model: the loaded one; None: one without weights, from its
    configuration. kept: the adapter's own; None: the base's. hub: as in `from_pretrained`.
    Raises ValueError or OSError, in one line, where there is none or it is not the model's.
    """
    tokenizer = kept
    if tokenizer is None:
        source = resolve_base(base, **hub)
        with readable(f"the tokenizer of {base!r}", source, **hub):
            tokenizer = AutoTokenizer.from_pretrained(source, **hub)
    reconcile(meta_classifier(base, **hub) if model is None else model, tokenizer)
    return tokenizer


def labels_of(base: str, **hub: Any) -> tuple[str, ...]:
    """The names of the outputs of a checkpoint's own head, in order; LABEL_0 and so on where it has no names."""
    labels = AutoConfig.from_pretrained(resolve_base(base, **hub), **hub).id2label
    return tuple(str(labels[index]) for index in sorted(labels))


def check_labels(labels: Sequence[str]) -> None:
    """Raise ValueError for names of labels that are no list of different strings."""
    names = [] if isinstance(labels, str) else list(labels)
    if not names or len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"labels are not usable; got {labels!r}; expected at least one name, each once")


def load_base(
    base: str,
    labels: Sequence[str],
    *,
    problem_type: str = "single_label_classification",
    pooling: str = NATIVE,
    dtype: torch.dtype | None = None,
    **hub: Any,
) -> tuple[PreTrainedModel, set[str]]:
    """The pretrained classifier without LoRA, and the names of the parameters that the checkpoint does not have.

    Those and the head are fp32 whatever `dtype` is. A checkpoint's own head is kept if it has the same shape.
    hub: options of `from_pretrained`, such as revision.
    """
    labels = [str(label) for label in labels]
    check_labels(labels)
    check_pooling(pooling)
    source = resolve_base(base, **hub)
    model_config = _config(
        base,
        source,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        problem_type=problem_type,
        **hub,
    )
    # Without transformers' report of fresh weights: what is fresh is checked here, strictly.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with readable(f"the base model {base!r}", source, **hub):
            model, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
                source,
                config=model_config,
                dtype=dtype or "auto",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **hub,
            )
    finally:
        transformers.logging.set_verbosity(verbosity)
    head = find_head(model)
    mismatched = {key for key, *_ in loading["mismatched_keys"]}
    misfits = sorted(key for key in mismatched if not belongs_to(key, head))
    if misfits:
        kind = type(model).__name__
        raise ValueError(f"the checkpoint {base!r} does not fit {kind}; other shape of {misfits[0]!r}")
    check_finite(model, base)
    if pooling != NATIVE:
        model = PooledClassifier(model, pooling)
        head = find_head(model)
        mismatched = {f"{HEAD}.weight", f"{HEAD}.bias"}  # no checkpoint of the base has them
    parameters = dict(model.named_parameters())
    missing = (set(loading["missing_keys"]) | mismatched) & parameters.keys()
    trained = {name: p for name, p in parameters.items() if name in missing or belongs_to(name, head)}
    if any(parameter.dtype != torch.float32 for parameter in trained.values()):
        cast_inputs(model, {name.rpartition(".")[0] for name in trained} - {""})
    for parameter in trained.values():
        parameter.data = parameter.data.float()
    record_origin(model, base, source, **hub)
    return model, missing


@torch.no_grad()
def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the encoder of a model to `dtype`, with LoRA, merged or not, or without; LoRA and head outside it are fp32.

    As in `from_pretrained(dtype=...)`, tables of angles keep their precision: buffers that no checkpoint holds, of
    modules without parameters.
    """
    prefix = base_prefix(model)
    injected = is_injected(model)
    head = injection(model).head if injected else find_head(model)
    head = tuple(name for name in head if not belongs_to(name, [prefix]))
    lora = {id(parameter) for parameter in (lora_parameters(model) if injected else {}).values()}
    tensors = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if any(True for _ in model.get_submodule(name.rpartition(".")[0]).parameters()):
            tensors[name] = buffer
    layers = set()
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or id(tensor) in lora:
            continue
        in_head = belongs_to(name, head)
        tensor.data = tensor.data.to(torch.float32 if in_head else dtype)
        if in_head and isinstance(tensor, nn.Parameter):
            layers.add(name.rpartition(".")[0])
    if dtype != torch.float32:
        cast_inputs(model, layers - {""})


def meta_classifier(base: str, *, num_labels: int = 2, **hub: Any) -> PreTrainedModel:
    """The classifier of a base model without weights, on the meta device: for names, shapes and counts."""
    source, trust = resolve_base(base, **hub), hub.get("trust_remote_code")
    config = _config(base, source, num_labels=num_labels, **hub)
    with readable(f"the base model {base!r}"), torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust)
    record_origin(model, base, source, **hub)
    return model


def load_config(base: str, **hub: Any) -> Any:
    """The configuration of a base model. Raises ValueError or OSError, in one line."""
    return _config(base, resolve_base(base, **hub), **hub)


def _config(base: str, source: str, **options: Any) -> Any:
    with readable(f"the base model {base!r}", source, **options):
        return AutoConfig.from_pretrained(source, **options)
