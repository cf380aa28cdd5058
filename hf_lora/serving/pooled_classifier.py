"""A text classifier on pooled states of an encoder, for `from_pretrained(directory, trust_remote_code=True)`.

`hf-lora merge` and `hf-lora export` put this file beside the weights. It needs transformers and torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput


class PooledConfig(PreTrainedConfig):
    """encoder: its configuration. layers: those that are read, from 1, the last one last. pooling: "mean" or "cls"."""

    model_type = "hf_lora_pooled"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        layers: Sequence[int] = (1,),
        pooling: str = "mean",
        hidden_size: int = 0,
        **kwargs: Any,
    ) -> None:
        self.encoder, self.layers, self.pooling = encoder or {}, list(layers), pooling
        self.hidden_size = hidden_size  # of all layers together
        super().__init__(**kwargs)


class _Pooled(PreTrainedModel):
    config_class = PooledConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True


class PooledModel(_Pooled):
    """The encoder; the states of all layers that are read are side by side in `last_hidden_state`."""

    def __init__(self, config: PooledConfig) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(AutoConfig.for_model(**config.encoder))
        if isinstance(getattr(self.encoder, "pooler", None), nn.Module):
            self.encoder.pooler = None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """From tokens `(batch, length)` to states `(batch, length, layers * width)`."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        given = {name: value for name, value in given.items() if value is not None}
        kwargs |= {"output_hidden_states": True, "return_dict": True}
        outputs = self.encoder(**given, **kwargs)
        states = [outputs.hidden_states[layer] for layer in self.config.layers[:-1]]
        return BaseModelOutput(last_hidden_state=torch.cat([*states, outputs.last_hidden_state], -1))


class PooledForSequenceClassification(_Pooled):
    """A linear layer on the mean of the tokens that are no padding, or on the first of them."""

    base_model_prefix = "model"

    def __init__(self, config: PooledConfig) -> None:
        super().__init__(config)
        self.model = PooledModel(config)
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """From tokens `(batch, length)` to logits `(batch, labels)`, and the loss where there are labels."""
        outputs = self.model(input_ids, attention_mask, token_type_ids, **kwargs)
        states = outputs.last_hidden_state.float()
        mask = states.new_ones(states.shape[:2]) if attention_mask is None else attention_mask.float()
        if self.config.pooling == "cls":
            pooled = states[torch.arange(len(states), device=states.device), mask.argmax(1)]
        else:
            pooled = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1.0)
        logits = self.head(pooled.to(self.head.weight.dtype))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)
