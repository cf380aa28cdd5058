"""Adapted layers: each is a subclass of the layer it adapts and holds the same frozen weight.

A layer is adapted where it stands: its class changes to the LoRA subclass and A and B are added. So
`state_dict` keys, hooks, `weight`, `in_features`, references from elsewhere and `isinstance` all go on as
before, and `detach` gives back exactly the layer that was.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from hf_lora import functional
from hf_lora.initializers import Initializer
from hf_lora.registry import Registry


class LoRALayer(nn.Module):
    """What every adapted layer has, whatever its type.

    lora_A `(rank, in_features)` and lora_B `(out_features, rank)`, trainable, fp32 (or fp64 for an fp64
    base) whatever the precision of the frozen weight; `scaling` multiplies B A.
    """

    base_type: type[nn.Module]
    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    rank: int
    scaling: float
    lora_dropout: float
    enabled: bool
    _unmerged_weight: Tensor | None

    @classmethod
    def attach(
        cls, module: nn.Module, *, rank: int, scaling: float, dropout: float, initializer: Initializer
    ) -> LoRALayer:
        """Turn `module`, of type `cls.base_type`, into an adapted layer in place; returns it."""
        weight = cast(Tensor, module.weight)
        lora_A, lora_B = initializer(
            cls.features(module),
            rank,
            dtype=torch.promote_types(weight.dtype, torch.float32)
            if weight.is_floating_point()
            else torch.float32,
            device=weight.device,
        )
        module.__class__ = cls
        layer = cast(LoRALayer, module)
        layer.lora_A, layer.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        layer.rank, layer.scaling, layer.lora_dropout = rank, scaling, dropout
        layer.enabled = True
        layer._unmerged_weight = None
        return layer

    def detach(self) -> None:
        """Give the layer its old class back and drop A and B; the weight stays as it is now."""
        for name in ("lora_A", "lora_B", "rank", "scaling", "lora_dropout", "enabled", "_unmerged_weight"):
            delattr(self, name)
        self.__class__ = self.base_type  # type: ignore[assignment]

    @staticmethod
    def features(module: nn.Module) -> tuple[int, int]:
        """(out_features, in_features) of a layer of `base_type`."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """What the adapter adds to the weight, in the weight's own shape, in fp32."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether the update is in the weight now."""
        return self._unmerged_weight is not None

    @property
    def base_weight(self) -> Tensor:
        """The pretrained weight, whether or not the update is merged."""
        return self.weight if self._unmerged_weight is None else self._unmerged_weight.to(self.weight.device)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the weight; a copy of the original is kept, since adding does not undo exactly."""
        assert not self.merged
        original = self.weight.detach().clone()
        self.weight.copy_(functional.merged_weight(original, self.delta_weight()))
        self._unmerged_weight = original

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        assert self._unmerged_weight is not None
        self.weight.copy_(self._unmerged_weight)
        self._unmerged_weight = None


class LoRALinear(LoRALayer, nn.Linear):
    """`nn.Linear` with a low-rank update: y = W x + b + scaling * B A x, x `(..., in)`, y `(..., out)`."""

    base_type = nn.Linear

    @staticmethod
    def features(module: nn.Module) -> tuple[int, int]:
        return cast(nn.Linear, module).out_features, cast(nn.Linear, module).in_features

    def delta_weight(self) -> Tensor:
        return functional.delta_weight(self.lora_A, self.lora_B, self.scaling)

    def forward(self, input: Tensor) -> Tensor:
        if not self.enabled:
            return nn.functional.linear(input, self.base_weight, self.bias)
        if self.merged:
            return nn.functional.linear(input, self.weight, self.bias)
        dropout = self.lora_dropout if self.training else 0.0
        return functional.lora_linear(
            input, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling, dropout
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}"


LAYER_TYPES: Registry[type[nn.Module], type[LoRALayer]] = Registry("layer type")
LAYER_TYPES.register(nn.Linear, LoRALinear)
