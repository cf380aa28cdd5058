"""Load the classifier of an adapter: the base model with the right head, and the adapter in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lora._text import shortened
from hf_lora.adapters.directory import AdapterFiles, check_task, load_files, read_adapter
from hf_lora.adapters.info import AdapterInfo, BaseModel
from hf_lora.adapters.peft_format import PREFIX
from hf_lora.lora.inject import injection
from hf_lora.models.loading import check_labels, load_base, load_config, load_tokenizer, meta_classifier
from hf_lora.models.reconcile import usable_length
from hf_lora.models.tokenizer_files import load_tokenizer_files


@dataclass(frozen=True)
class Described:
    """What is known of an adapter before a weight of its base is loaded.

    base: the Hub id or directory of its base. hub: options of `from_pretrained` for it, such as the revision.
    """

    files: AdapterFiles
    base: str
    info: AdapterInfo
    hub: Mapping[str, Any]


def describe(
    directory: str | Path, *, base: str | None = None, labels: Sequence[str] | None = None, **hub: Any
) -> Described:
    """Read an adapter directory, and find its base and labels.

    base: another place of the base model than the one the adapter names. labels: names for those of an adapter of peft,
    in the order of the outputs.
    Raises ValueError if it is no adapter of a text classifier, or names no base model.
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
    info = files.info
    if info is None:
        with nullcontext() if given else hint_at_base(files):
            found = _labels_of(files, base, **hub)
        if labels is not None:
            check_labels(labels)
            if len(labels) != len(found):
                raise ValueError(
                    f"the adapter in {str(directory)!r} has {len(found)} outputs; got {len(labels)} labels, "
                    f"{shortened(list(labels))}; expected one for each, in their order"
                )
        info = AdapterInfo(tuple(labels or found), base_model=own)
    elif labels is not None and tuple(labels) != info.labels:
        raise ValueError(
            f"the adapter in {str(directory)!r} has names for its labels; got labels={list(labels)}; expected none, or "
            f"{list(info.labels)}"
        )
    return Described(files, base, info, hub)


def fill(
    adapter: Described, model: PreTrainedModel, missing: Iterable[str], *, check_base: bool = True
) -> AdapterInfo:
    """Put an adapter into the plain classifier of its base; returns what is known of it now.

    missing: the parameters that the base's checkpoint does not have.
    Raises ValueError for anything that does not fit exactly, and where a tensor would be random.
    """
    files = adapter.files
    load_files(model, files, check_base=check_base)
    random = sorted(name for name in missing if not files.brings(name))
    if random:
        raise ValueError(
            f"neither the adapter in {str(files.directory)!r} nor its base {adapter.base!r} has weights for "
            f"{len(random)} tensors, first {random[0]!r}; they would be random"
        )
    info = replace(adapter.info, max_length=usable_length(adapter.info.max_length, model))
    injection(model).info = info
    return info


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
    adapter = describe(directory, base=base, **hub)
    with nullcontext() if base else hint_at_base(adapter.files):
        model, missing = load_plain(adapter, dtype=dtype)
    info = fill(adapter, model, missing, check_base=check_base)
    kept = load_tokenizer_files(adapter.files.tokenizer, str(directory))
    return model.eval(), load_tokenizer(adapter.base, model=model, kept=kept, **adapter.hub), info


def load_plain(adapter: Described, *, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, set[str]]:
    """`load_base` of an adapter: the classifier that it is for, and the names of what its checkpoint lacks."""
    info = adapter.info
    return load_base(
        adapter.base,
        info.labels,
        problem_type=info.problem_type,
        pooling=info.pooling,
        dtype=dtype,
        **adapter.hub,
    )


@contextmanager
def hint_at_base(files: AdapterFiles) -> Iterator[None]:
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
