"""LoRA in weight space, through `torch.nn.utils.parametrize`: W' = W + (alpha / rank) B A, for any weight tensor.

The layer's own forward runs on W', whatever it does with it. So this form fits where a forward of ours does
not: convolutions, bare parameters, layers whose forward is bypassed. It costs a product of the size of the
weight at every step, and gives the outputs and gradients of the module form.

A weight that is no matrix is read as one, `(out, in)`: a convolution's as (out, in / groups * kernel), an
embedding's transposed as in PEFT, with A `(rank, num_embeddings)` and B `(dim, rank)`.
"""

from __future__ import annotations

from typing import TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_lora.lora import functional
from hf_lora.lora.layouts import Layout, layout_of
from hf_lora.lora.update import LoRALayer, UpdateSpec


class LoRAParametrization(LoRALayer):
    """W' for the tensor called `tensor` of a module, registered with `parametrize`.

    Dropout acts on the inputs of A as in the module form, but the same inputs are dropped for the whole
    batch: in weight space there are no tokens. Raises ValueError if the tensor is not a floating-point
    parameter of at least two dimensions.
    """

    def __init__(self, module: nn.Module, tensor: str, spec: UpdateSpec) -> None:
        super().__init__()
        weight = getattr(module, tensor, None)
        if not is_adaptable(weight):
            raise ValueError(
                f"cannot adapt {tensor!r} of a {type(module).__name__}; got {_describe(weight)}; "
                "expected a floating-point parameter of at least two dimensions"
            )
        # In a tuple, since a module must not be registered inside its own part.
        self._owner = (module,)
        self.tensor = tensor
        layout = layout_of(module) if tensor == "weight" else Layout(transposed=spec.input_first)
        self.add_update(weight, spec, layout, weight.shape, groups=getattr(module, "groups", 1))

    @classmethod
    def attach(cls, module: nn.Module, tensor: str, spec: UpdateSpec) -> LoRAParametrization:
        """Adapt one tensor of a module in place; returns the parametrization."""
        parametrization = cls(module, tensor, spec)
        required_grad = getattr(module, tensor).requires_grad
        parametrize.register_parametrization(module, tensor, parametrization)
        parametrization.frozen_weight.requires_grad_(required_grad)
        return parametrization

    def detach(self) -> None:
        parametrize.remove_parametrizations(self._owner[0], self.tensor, leave_parametrized=False)

    @property
    def frozen_weight(self) -> Tensor:
        parametrizations = cast(nn.ModuleDict, self._owner[0].parametrizations)
        return cast(Tensor, parametrizations[self.tensor].original)

    def forward(self, weight: Tensor) -> Tensor:
        """W' for the frozen W."""
        if not self.enabled:
            return self.base_weight
        if self.merged:
            return weight
        lora_A, lora_B = self.factors()
        if self.training and self.lora_dropout > 0.0:
            lora_A = lora_A * F.dropout(torch.ones_like(lora_A[0]), self.lora_dropout)
        delta = functional.delta_weight(lora_A, lora_B, self.scaling)
        return self.adapted(weight, self.layout.to_weight(delta, self.weight_shape))

    def extra_repr(self) -> str:
        return f"{self.tensor}, rank={self.rank}, scaling={self.scaling:g}"


def is_adaptable(weight: object) -> TypeGuard[nn.Parameter]:
    """Whether a low-rank update fits a tensor: a floating-point parameter of at least two dimensions."""
    if not isinstance(weight, nn.Parameter) or type(weight).__module__.startswith("torchao"):
        return False  # torchao's quantized tensors call themselves floating-point and cannot be added to
    return weight.ndim >= 2 and weight.is_floating_point()


def _describe(weight: object) -> str:
    return f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
