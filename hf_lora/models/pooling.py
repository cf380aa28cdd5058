"""Classifiers that pool the states of an encoder's tokens: their mean, in one layer or in three, or the first token.

An encoder that was trained with mean pooling, as sentence encoders are, says more in the mean than in the first token.
What its last layer was trained to leave out, such as the tone of a text, is still there in the layers below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_lora._choices import Registry, unknown
from hf_lora._files import MAX_JSON_BYTES, parse_object, read_bytes
from hf_lora.models._transformers_private import AnyAttention, optional_file
from hf_lora.models.bundled import is_known_absent, readable, resolve_base, warn_once

NATIVE = "native"
HEAD = "pooled_head"


@dataclass(frozen=True)
class Pooling:
    """How states become one vector; `words` says it for people.

    of_tokens: from states `(batch, length, width)` and mask `(batch, length)` to `(batch, width)`, in fp32. depths: the
    layers that are read, as shares of the encoder's layers. of_last: the same pooling of the last layer alone.
    """

    words: str
    of_tokens: Callable[[Tensor, Tensor], Tensor]
    depths: tuple[float, ...] = (1.0,)
    of_last: str | None = None


POOLINGS: Registry[str, Pooling] = Registry("pooling")


def mean_of_tokens(states: Tensor, mask: Tensor) -> Tensor:
    """The mean of the states of the tokens that are no padding (Reimers and Gurevych 2019, arXiv:1908.10084)."""
    weights = mask.unsqueeze(-1).float()
    return (states.float() * weights).sum(1) / weights.sum(1).clamp(min=1.0)


def first_token(states: Tensor, mask: Tensor) -> Tensor:
    """The state of the first token that is no padding: [CLS], wherever the padding is."""
    first = mask.ne(0).int().argmax(1)
    return states[torch.arange(len(states), device=states.device), first].float()


MEAN, CLS, MEAN_LAYERS = "mean", "cls", "mean_layers"
POOLINGS.register(MEAN, Pooling("the mean of the tokens", mean_of_tokens))
POOLINGS.register(CLS, Pooling("the first token", first_token))
_MEANS = Pooling("the means of the tokens in three layers", mean_of_tokens, (1 / 3, 2 / 3, 1.0), of_last=MEAN)
POOLINGS.register(MEAN_LAYERS, _MEANS)


class PooledHead(nn.Linear):
    """Dropout and a linear layer: `(batch, width)` to `(batch, labels)`."""

    def __init__(self, width: int, labels: int, dropout: float) -> None:
        super().__init__(width, labels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, pooled: Tensor) -> Tensor:
        """The logits."""
        return super().forward(self.dropout(pooled))


class PooledClassifier(AnyAttention):
    """The encoder of a transformers classifier, under its own name, with a pooling and a linear head.

    model: its encoder is taken over; its head and the encoder's pooler are left behind. pooling: a name of `POOLINGS`.
    Raises ValueError for a model whose encoder gives no states of tokens.
    """

    supports_gradient_checkpointing = True

    def __init__(self, model: PreTrainedModel, pooling: str) -> None:
        super().__init__(model.config)
        self.pool, self.pooling, self.native_class = POOLINGS.get(pooling), pooling, type(model)
        config, prefix = model.config, model.base_model_prefix
        encoder: Any = getattr(model, prefix, None)
        # The last states of a decoder behind an encoder, or of an image, are not those of the input's tokens.
        other = getattr(config, "is_encoder_decoder", False) or model.main_input_name != "input_ids"
        if encoder is not model.base_model or other:
            raise ValueError(
                f"a {type(model).__name__} has no encoder whose tokens could be pooled; got pooling={pooling!r}; "
                f"expected {NATIVE!r} for this model"
            )
        # The layers whose states are read, ascending, counted from 1.
        self.layers = tuple(math.ceil(depth * config.num_hidden_layers) for depth in self.pool.depths)
        if isinstance(getattr(encoder, "pooler", None), nn.Module):
            encoder.pooler = None  # read by nothing any more
        self.base_model_prefix = prefix
        setattr(self, prefix, encoder)
        given = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout_prob"))
        dropout = next((value for value in given if value is not None), 0.1)
        head = PooledHead(config.hidden_size * len(self.layers), config.num_labels, dropout)
        nn.init.normal_(head.weight, std=getattr(config, "initializer_range", 0.02))
        nn.init.zeros_(head.bias)
        setattr(self, HEAD, head)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """As transformers' classifiers: tokens `(batch, length)` to logits `(batch, labels)`, and the loss."""
        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
        values = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        given = {name: value for name, value in zip(names, values, strict=True) if value is not None}
        kwargs.pop("return_dict", None)
        asked = kwargs.get("output_hidden_states")
        asked = self.config.output_hidden_states if asked is None else asked
        if len(self.layers) > 1:
            kwargs["output_hidden_states"] = True
        outputs = self.base_model(**given, **kwargs)
        states = outputs.last_hidden_state
        mask = states.new_ones(states.shape[:2]) if attention_mask is None else attention_mask
        if mask.shape != states.shape[:2]:
            raise ValueError(
                f"the encoder returns other tokens than it is given; got states {tuple(states.shape[:2])} for a mask "
                f"{tuple(mask.shape)}; use pooling={NATIVE!r}"
            )
        pooled = [self.pool.of_tokens(layer, mask) for layer in (*self._below(outputs), states)]
        logits = getattr(self, HEAD)(torch.cat(pooled, -1))
        loss = None if labels is None else ForSequenceClassificationLoss(labels, logits, self.config)
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            # Only to who asked: a Trainer collects what there is over the whole data set.
            hidden_states=outputs.get("hidden_states") if asked else None,
            attentions=outputs.get("attentions"),
        )

    def read_last_layer(self) -> None:
        """Pool only the last of several layers from now on; the head gets a new parameter, with the weights for it.

        Raises ValueError for a pooling of one layer.
        """
        if self.pool.of_last is None:
            raise ValueError(
                f"pooling={self.pooling!r} has no form that reads the last layer alone; got one of {len(self.layers)} "
                f"layers; expected such as {MEAN_LAYERS!r}"
            )
        self.pooling = self.pool.of_last
        self.pool, self.layers = POOLINGS.get(self.pooling), self.layers[-1:]
        head = getattr(self, HEAD)
        head.in_features = self.config.hidden_size
        kept = head.weight.detach()[:, -head.in_features :].clone()
        head.weight = nn.Parameter(kept, requires_grad=head.weight.requires_grad)

    def _below(self, outputs: Any) -> list[Tensor]:
        """The states `(batch, length, width)` of the layers that are read besides the last one."""
        below = self.layers[:-1]
        if not below:
            return []
        # The first are the embeddings. The last may lack the encoder's final norm, and is not used.
        states, last = outputs.hidden_states, outputs.last_hidden_state
        expected = self.layers[-1] + 1
        if len(states) != expected or any(layer.shape != last.shape for layer in states):
            raise ValueError(
                f"the encoder's layers cannot be pooled; got states {[tuple(layer.shape) for layer in states]}; "
                f"expected {expected} of {tuple(last.shape)}; use pooling={MEAN!r}"
            )
        return [states[layer] for layer in below]


def pooling_of(model: nn.Module) -> str:
    """The name of a classifier's pooling in `POOLINGS`, or "native"."""
    return model.pooling if isinstance(model, PooledClassifier) else NATIVE


def native_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of transformers that a classifier is of, or that its encoder is from."""
    return model.native_class if isinstance(model, PooledClassifier) else type(model)


def blank_like(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    """A random classifier of the same kind with another configuration."""
    plain: Any = native_class(model)(config)
    return PooledClassifier(plain, model.pooling) if isinstance(model, PooledClassifier) else plain


def check_pooling(pooling: str) -> None:
    """Raise ValueError for a name that is neither "native" nor registered."""
    if pooling != NATIVE and pooling not in POOLINGS:
        raise unknown("pooling", pooling, [NATIVE, *POOLINGS])


AUTO = "auto"
# With more, the fit on three layers is long and the head large.
MOST_LABELS = 64
# Where sentence-transformers writes how a model was pooled in training.
_FILE = "1_Pooling/config.json"
# What in it means a pooling of ours: older files have a flag for each, newer ones a name.
_DECLARED = {"pooling_mode_mean_tokens": MEAN, "pooling_mode_cls_token": CLS, "mean": MEAN, "cls": CLS}


@dataclass(frozen=True)
class PoolingChoice:
    """A pooling, `native` or a name of `POOLINGS`, and why it was taken."""

    pooling: str
    reason: str

    def __str__(self) -> str:
        return f"pooling: {self.pooling} ({self.reason})"


def choose_pooling(
    requested: str,
    base: str,
    *,
    labels: int | None = None,
    last_only: str | None = None,
    **hub: Any,
) -> PoolingChoice:
    """The pooling for a base model, a Hub id or a directory; `requested`: a pooling, or "auto".

    Auto keeps a checkpoint's trained head for as many `labels`. Otherwise it takes the pooling that the files of a
    sentence encoder name, a mean in three layers, and for other models their own head.
    last_only: why auto may not read several layers, in words. hub: options of `from_pretrained`, such as revision.
    Raises ValueError for an unknown name.
    """
    if requested != AUTO:
        check_pooling(requested)
        return PoolingChoice(requested, "as asked for")
    # Once: it may ask whether the Hub answers.
    source = resolve_base(base, **hub)
    if labels is not None:
        with readable(f"the base model {base!r}", source, **hub):
            config = AutoConfig.from_pretrained(source, **hub)
        classifies = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
        if classifies and config.num_labels == labels:
            return PoolingChoice(NATIVE, f"the checkpoint has a trained head for {labels} labels")
    declared = declared_pooling(source, **hub)
    if declared is None and not is_known_absent(source, _FILE, **hub):
        warn_once(
            f"whether {base!r} is a sentence encoder is not known, since the Hub cannot be reached and its cache has "
            f"no {_FILE}; taken for none; --pooling mean is right if it is one"
        )
    if declared is None:
        return PoolingChoice(NATIVE, "the model's own head; its files name no pooling")
    named = f"by the {_FILE} of this sentence encoder"
    if declared != MEAN:
        return PoolingChoice(declared, named)
    if labels is not None and labels > MOST_LABELS:
        last_only = f"a head of {labels} labels is large"
    if last_only is not None:
        return PoolingChoice(MEAN, f"{named}; in the last layer alone, since {last_only}")
    return PoolingChoice(MEAN_LAYERS, f"{named}, in three layers")


def declared_pooling(source: str, **hub: Any) -> str | None:
    """The pooling that a sentence encoder's files at `source` name; None without such files, or for another."""
    found = optional_file(source, _FILE, **hub)
    if found is None:
        return None
    values = parse_object(read_bytes(found.parent, found.name, limit=MAX_JSON_BYTES), str(found))
    mode = values.get("pooling_mode")
    flags = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
    chosen = [mode] if isinstance(mode, str) else flags
    # Several at once are concatenated, which no head of ours is for.
    return _DECLARED.get(chosen[0]) if len(chosen) == 1 else None
