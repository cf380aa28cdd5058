"""A pretrained classifier with LoRA injected, which knows its labels and its base model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lora.adapters.info import AdapterInfo, BaseModel
from hf_lora.lora.config import LoRAConfig
from hf_lora.lora.head import find_head, fresh_modules
from hf_lora.lora.inject import base_parameters, inject_lora, injection
from hf_lora.models._transformers_private import commit_of
from hf_lora.models.fingerprint import fingerprint
from hf_lora.models.loading import load_base, load_tokenizer
from hf_lora.models.pooling import NATIVE


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
    injection(model).fresh = frozenset(missing)
    injection(model).info = AdapterInfo(
        labels=tuple(labels),
        problem_type=problem_type,
        pooling=pooling,
        max_length=max_length,
        text_columns=tuple(text_columns),
        base_model=BaseModel(base, revision or commit_of(model.config), fingerprint(base_parameters(model))),
    )
    return model, load_tokenizer(base, revision=revision, **hub)
