"""Adapted layers: each is a subclass of the layer it adapts and holds the same frozen weight.

A layer is adapted where it stands: its class changes to the LoRA subclass and A and B are added. So
`state_dict` keys, hooks, `weight`, `in_features`, references from elsewhere and `isinstance` all go on as
before, and `detach` gives back exactly the layer that was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from hf_lora import functional
from hf_lora.initializers import Initializer
from hf_lora.registry import Registry


@dataclass(frozen=True)
class UpdateSpec:
    """What one update is made from: its rank, its scaling, the dropout on its input, how A and B start."""

    rank: int
    scaling: float
    dropout: float
    initializer: Initializer


class LoRALayer(nn.Module):
    """What every adapted layer has, whatever its type and form.

    lora_A `(rank, in_features)` and lora_B `(out_features, rank)`, trainable, fp32 (or fp64 for an fp64
    base) whatever the precision of the frozen weight; `scaling` multiplies B A.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    rank: int
    scaling: float
    lora_dropout: float
    enabled: bool
    _unmerged_weight: Tensor | None

    def add_update(self, features: tuple[int, int], weight: Tensor, spec: UpdateSpec) -> None:
        """Add A and B for a frozen `weight` of (out_features, in_features), on its device."""
        half = not weight.is_floating_point() or weight.dtype.itemsize < 4
        dtype = torch.float32 if half else weight.dtype
        lora_A, lora_B = spec.initializer(features, spec.rank, dtype=dtype, device=weight.device)
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.rank, self.scaling, self.lora_dropout = spec.rank, spec.scaling, spec.dropout
        self.enabled = True
        self._unmerged_weight = None

    def detach(self) -> None:
        """Make the layer what it was before it was adapted; the weight stays as it is now."""
        raise NotImplementedError

    @property
    def frozen_weight(self) -> Tensor:
        """The parameter that holds the pretrained weight, or the merged one while merged."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """What the adapter adds to the weight, in the weight's own shape, in fp32 at least."""
        raise NotImplementedError

    @property
    def peft_shapes(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """For lora_A and lora_B: PEFT's name for it under the module's, and its shape there."""
        return {
            which: (f"{which}.weight", tuple(getattr(self, which).shape)) for which in ("lora_A", "lora_B")
        }

    @property
    def merged(self) -> bool:
        """Whether the update is in the weight now."""
        return self._unmerged_weight is not None

    @property
    def base_weight(self) -> Tensor:
        """The pretrained weight, whether or not the update is merged."""
        frozen = self.frozen_weight
        return frozen if self._unmerged_weight is None else self._unmerged_weight.to(frozen.device)

    def effective_weight(self) -> Tensor:
        """W + scaling * B A, in the type of W."""
        return functional.merged_weight(self.base_weight, self.delta_weight())

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the weight; a copy of the original is kept, since adding does not undo exactly."""
        assert not self.merged
        original = self.frozen_weight.detach().clone()
        self.frozen_weight.copy_(self.effective_weight())
        self._unmerged_weight = original

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        assert self._unmerged_weight is not None
        self.frozen_weight.copy_(self._unmerged_weight)
        self._unmerged_weight = None


class ModuleLoRA(LoRALayer):
    """The module form: the adapted layer itself, with a forward of its own. Subclass it with the layer."""

    base_type: type[nn.Module]
    weight: Tensor

    @classmethod
    def attach(cls, module: nn.Module, spec: UpdateSpec) -> LoRALayer:
        """Turn `module`, of type `cls.base_type`, into an adapted layer in place; returns it."""
        features, weight = cls.features(module), cast(Tensor, module.weight)
        module.__class__ = cls
        layer = cast(LoRALayer, module)
        layer.add_update(features, weight, spec)
        return layer

    def detach(self) -> None:
        for name in LoRALayer.__annotations__:
            delattr(self, name)
        self.__class__ = self.base_type  # type: ignore[assignment]

    @staticmethod
    def features(module: nn.Module) -> tuple[int, int]:
        """(out_features, in_features) of a layer of `base_type`."""
        raise NotImplementedError

    @property
    def frozen_weight(self) -> Tensor:
        return self.weight


class LoRALinear(ModuleLoRA, nn.Linear):
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


LAYER_TYPES: Registry[type[nn.Module], type[ModuleLoRA]] = Registry("layer type")
LAYER_TYPES.register(nn.Linear, LoRALinear)
