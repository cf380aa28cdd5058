"""How a module's weight is read as a matrix `(out, in)`, for the low-rank product B A."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Layout:
    """How a module type's weight is read as a matrix, and what PEFT calls its factors.

    transposed: the weight's first dimension is the input. rows_first: a row of the weight, whose norm DoRA
    learns, is indexed by its first dimension (an embedding's row is a token, a Conv1D's is a column).
    """

    transposed: bool = False
    rows_first: bool = True
    peft_names: tuple[str, str] = ("lora_A.weight", "lora_B.weight")

    def features(self, shape: torch.Size) -> tuple[int, int]:
        """(out_features, in_features) of a weight of this shape."""
        first, rest = shape[0], shape[1:].numel()
        return (rest, first) if self.transposed else (first, rest)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The weight as `(out, in)`."""
        matrix = weight.reshape(weight.shape[0], -1)
        return matrix.T if self.transposed else matrix

    def to_weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The matrix `(out, in)` in the shape of the weight."""
        return (matrix.T if self.transposed else matrix).reshape(shape)

    def row_norms(self, weight: Tensor) -> Tensor:
        """The norms of the weight's rows, `(rows,)` (DoRA, equation 2)."""
        rows = weight.reshape(weight.shape[0], -1)
        return torch.linalg.vector_norm(rows, dim=1 if self.rows_first else 0)

    def scale_rows(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The weight with each row multiplied by its entry of `scale` `(rows,)`."""
        return weight * (scale.reshape(-1, *(1,) * (weight.ndim - 1)) if self.rows_first else scale)


# By the type of the module or the first of its bases that is here.
LAYOUTS: dict[type[nn.Module], Layout] = {
    nn.Embedding: Layout(transposed=True, peft_names=("lora_embedding_A", "lora_embedding_B")),
    Conv1D: Layout(transposed=True, rows_first=False),
    nn.Module: Layout(),
}


def layout_of(module: nn.Module) -> Layout:
    """The layout of a module's weight."""
    return next(LAYOUTS[base] for base in type(module).__mro__ if base in LAYOUTS)
