"""A pretrained classifier with LoRA injected, and tensors of an adapter put into one."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lora._text import shortened
from hf_lora.adapters.info import AdapterInfo, BaseModel
from hf_lora.adapters.peft_format import PREFIX, own_tensors
from hf_lora.lora.config import LoRAConfig
from hf_lora.lora.head import belongs_to, find_head, fresh_modules, output_layer_in
from hf_lora.lora.inject import base_parameters, inject_lora, injection, lora_layers
from hf_lora.models._transformers_private import commit_of
from hf_lora.models.fingerprint import fingerprint
from hf_lora.models.loading import labels_of, load_base, load_tokenizer
from hf_lora.models.pooling import NATIVE
from hf_lora.models.reconcile import check_max_length

logger = logging.getLogger(__name__)


def load_classifier(
    base: str,
    labels: Sequence[str],
    config: LoRAConfig | None = None,
    *,
    problem_type: str = "single_label_classification",
    pooling: str = NATIVE,
    max_length: int | None = None,
    text_columns: Sequence[str] = (),
    label_columns: Sequence[str] = (),
    label_layout: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    **hub: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained classifier with a head for `labels` and LoRA injected, and its tokenizer.

    base: a Hub id, a local directory, or a Hub id that an installed package ships.
    labels: names in the order of the outputs; for regression the name of each target.
    config: None means `LoRAConfig()`.
    pooling: "native", the architecture's own head, or "mean", "mean_layers" or "cls": a linear layer on the mean of the
        tokens, on their means in three layers, or on the first one, which peft and transformers have no class for: they
        load the adapter into the encoder alone. `choose_pooling` knows what suits.
    dtype: precision of the frozen weights; None: that of the checkpoint. LoRA and head are fp32.
    hub: passed to transformers: `token`, `cache_dir`, `trust_remote_code`.
    A checkpoint's own head is kept where it is for the same names: in any order, in capitals or not. Else its last
    layer starts anew.
    Raises ValueError if the checkpoint does not fit the architecture; OSError if there is none.
    """
    model, missing = load_base(
        base, labels, problem_type=problem_type, pooling=pooling, revision=revision, dtype=dtype, **hub
    )
    check_max_length(max_length, model)
    if pooling == NATIVE:
        missing = missing | _align_head(model, labels_of(base, revision=revision, **hub), labels, missing)
    head = (*find_head(model), *fresh_modules(model, missing))
    inject_lora(model, config or LoRAConfig(), head=head)
    injection(model).fresh = frozenset(missing)
    injection(model).info = AdapterInfo(
        labels=tuple(labels),
        problem_type=problem_type,
        pooling=pooling,
        max_length=max_length,
        text_columns=tuple(text_columns),
        label_columns=tuple(label_columns),
        label_layout=label_layout,
        base_model=BaseModel(base, revision or commit_of(model.config), fingerprint(base_parameters(model))),
    )
    return model, load_tokenizer(base, model=model, revision=revision, **hub)


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Copy the tensors of an adapter file into an injected model.

    Raises ValueError, before any change, for a tensor that is missing, unexpected, not finite or of another shape.
    """
    factors, whole = own_tensors(model)
    layers = lora_layers(model)
    expected = {key: tensor.shape for part in (*factors.values(), whole) for key, tensor in part.items()}
    given = dict(tensors)
    for name, layer in layers.items():
        # peft may save base weights too.
        weight = given.pop(key := f"{PREFIX}{name}.base_layer.weight", None)
        if weight is not None and not torch.equal(weight, layer.base_weight.to(weight)):
            raise ValueError(f"{source} brings another base weight than the model's; got {key!r}")
    differences = {"missing": sorted(expected.keys() - given), "unexpected": sorted(given.keys() - expected)}
    found = [f"{len(keys)} {what}, first {keys[0]!r}" for what, keys in differences.items() if keys]
    if found:
        raise ValueError(f"{source} does not fit {type(model).__name__}; got {' and '.join(found)}")
    for key, tensor in given.items():
        want, got = tuple(expected[key]), tuple(tensor.shape)
        if want != got:
            in_head = belongs_to(key.removeprefix(PREFIX), injection(model).head)
            raise ValueError(
                f"{source} does not fit the model; {key!r} has shape {got}, expected {want}"
                + (f"; load the base with num_labels={got[0]}" if in_head and got else "")
            )
        # NaN and infinity survive in a sum, and summing is quicker than looking at every value.
        if not math.isfinite(tensor.sum().item()) and not torch.isfinite(tensor).all():
            raise ValueError(f"{source} is damaged; {key!r} holds something else than finite numbers")
    for name, layer in layers.items():
        try:
            layer.load_peft({key.removeprefix(f"{PREFIX}{name}."): given[key] for key in factors[name]})
        except ValueError as error:
            raise ValueError(f"{source} does not fit {name!r}: {error}") from None
    for key, tensor in whole.items():
        tensor.copy_(given[key])


@torch.no_grad()
def _align_head(
    model: PreTrainedModel, own: Sequence[str], labels: Sequence[str], missing: set[str]
) -> set[str]:
    """Put the rows of a checkpoint's trained output layer into the order of `labels`, by name.

    own: the names that the checkpoint has for its rows. Where they are others the layer starts anew: its parameters are
    returned, as those that the checkpoint does not have.
    """
    found = output_layer_in(model, find_head(model), len(labels))
    if found is None or f"{found[0]}.weight" in missing:
        return set()
    name, layer = found
    ours, theirs = ([label.strip().casefold() for label in names] for names in (labels, own))
    if ours == theirs:
        return set()
    parameters = {f"{name}.{which}": parameter for which, parameter in layer.named_parameters()}
    if sorted(ours) == sorted(theirs) and len(set(ours)) == len(ours):
        logger.warning(
            "the checkpoint's head has these labels in another order, %s: its rows are put into ours",
            shortened(list(own)),
        )
        for parameter in parameters.values():
            parameter.copy_(parameter[[theirs.index(label) for label in ours]])
        return set()
    logger.warning(
        "the checkpoint's head is for other labels, %s: its last layer starts anew", shortened(list(own))
    )
    nn.init.normal_(layer.weight, std=getattr(model.config, "initializer_range", 0.02))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return set(parameters)
