"""LoRA in weight space, through `torch.nn.utils.parametrize`: W' = W + (alpha / rank) B A, for any weight tensor.

The layer's own forward runs on W', whatever it does with it. So this form fits where a forward of ours does
not: convolutions, bare parameters, layers whose forward is bypassed. It costs a product of the size of the
weight at every step, and gives the outputs and gradients of the module form.

A weight that is no matrix is read as one, `(out, in)`: a convolution's as (out, in / groups * kernel), an
embedding's transposed as in PEFT, with A `(rank, num_embeddings)` and B `(dim, rank)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_lora import functional
from hf_lora.layers import LoRALayer, UpdateSpec


@dataclass(frozen=True)
class Layout:
    """How a module type's weight is read as a matrix, and what PEFT calls its factors."""

    transposed: bool = False
    peft_names: tuple[str, str] = ("lora_A.weight", "lora_B.weight")

    def features(self, shape: torch.Size) -> tuple[int, int]:
        """(out_features, in_features) of a weight of this shape."""
        first, rest = shape[0], shape[1:].numel()
        return (rest, first) if self.transposed else (first, rest)

    def to_weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The matrix `(out, in)` in the shape of the weight."""
        return (matrix.T if self.transposed else matrix).reshape(shape)


# By the type of the module or the first of its bases that is here.
LAYOUTS: dict[type[nn.Module], Layout] = {
    nn.Embedding: Layout(transposed=True, peft_names=("lora_embedding_A", "lora_embedding_B")),
    nn.Module: Layout(),
}


def layout_of(module: nn.Module) -> Layout:
    """The layout of a module's weight."""
    return next(LAYOUTS[base] for base in type(module).__mro__ if base in LAYOUTS)


class LoRAParametrization(LoRALayer):
    """W' = W + scaling * B A for the tensor called `tensor` of a module, registered with `parametrize`.

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
        self.layout = layout_of(module)
        self.shape: torch.Size = weight.shape
        self.add_update(self.layout.features(self.shape), weight, spec)

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

    @property
    def peft_shapes(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        A, B = tuple(self.lora_A.shape), tuple(self.lora_B.shape)
        kernel = tuple(self.shape[2:])
        if kernel:
            # A convolution's A has its kernel and its B is a convolution of size 1.
            A, B = (self.rank, self.shape[1], *kernel), (*B, *(1 for _ in kernel))
        return {"lora_A": (self.layout.peft_names[0], A), "lora_B": (self.layout.peft_names[1], B)}

    def delta_weight(self) -> Tensor:
        delta = functional.delta_weight(self.lora_A, self.lora_B, self.scaling)
        return self.layout.to_weight(delta, self.shape)

    def forward(self, weight: Tensor) -> Tensor:
        """W' for the frozen W."""
        if not self.enabled:
            return self.base_weight
        if self.merged:
            return weight
        lora_A: Tensor = self.lora_A
        if self.training and self.lora_dropout > 0.0:
            lora_A = lora_A * F.dropout(torch.ones_like(lora_A[0]), self.lora_dropout)
        delta = functional.delta_weight(lora_A, self.lora_B, self.scaling)
        return functional.merged_weight(weight, self.layout.to_weight(delta, self.shape))

    def extra_repr(self) -> str:
        return f"{self.tensor}, rank={self.rank}, scaling={self.scaling:g}"


def is_adaptable(weight: object) -> TypeGuard[nn.Parameter]:
    """Whether a low-rank update fits a tensor: a floating-point parameter of at least two dimensions."""
    return isinstance(weight, nn.Parameter) and weight.ndim >= 2 and weight.is_floating_point()


def _describe(weight: object) -> str:
    return f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
