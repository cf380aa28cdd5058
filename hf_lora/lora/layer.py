"""The low-rank update of one weight: its layout as a matrix, its factors A and B, and the same under PEFT's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lora.lora import functional
from hf_lora.lora.config import FACTORS, Variant
from hf_lora.lora.initializers import Initialization

# What peft's own files leave `.weight` out of, which transformers' `load_adapter` does not find there.
MAGNITUDE = "lora_magnitude_vector.weight"


@dataclass(frozen=True)
class Layout:
    """How a module type's weight is read as a matrix `(out, in)`, and what PEFT calls its factors.

    transposed: the weight's first dimension is the input. rows_first: the first dimension counts the rows whose norms
    DoRA learns (of an embedding and a Conv1D they are the columns, as in PEFT).
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
    nn.Embedding: Layout(
        transposed=True, rows_first=False, peft_names=("lora_embedding_A", "lora_embedding_B")
    ),
    Conv1D: Layout(transposed=True, rows_first=False),
    nn.Module: Layout(),
}


def layout_of(module: nn.Module) -> Layout:
    """The layout of a module's weight."""
    return next(LAYOUTS[base] for base in type(module).__mro__ if base in LAYOUTS)


@dataclass(frozen=True)
class UpdateSpec:
    """What one update is made from; parts, input_first: as in `targets.Target`."""

    rank: int
    scaling: float
    dropout: float
    initialization: Initialization
    variant: Variant
    parts: tuple[tuple[int, ...], ...] | None = None
    input_first: bool = False


class LoRALayer(nn.Module):
    """What every adapted layer has, whatever its type and form.

    lora_A `(rank, in_features)` and lora_B `(out_features, rank)`, fp32 (or fp64 for an fp64 base) whatever
    the precision of the frozen weight; `scaling` multiplies B A. For n parts of a fused weight lora_A is the
    n A's stacked, `(n * rank, in_features)`, and lora_B the rows of the n B's, `(rows, rank)`.
    lora_magnitude `(rows of the weight,)` is DoRA's, and None without it.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None
    rank: int
    scaling: float
    lora_dropout: float
    variant: Variant
    enabled: bool
    layout: Layout
    groups: int
    weight_shape: torch.Size
    parts: tuple[tuple[int, ...], ...] | None
    start: tuple[Tensor, Tensor] | None
    _blocks: tuple[Tensor, Tensor] | None
    _unmerged_weight: Tensor | None

    def add_update(
        self, weight: Tensor, spec: UpdateSpec, layout: Layout, shape: torch.Size, groups: int = 1
    ) -> None:
        """Add the factors for a frozen `weight` of `shape`, on its device."""
        covered = None if spec.parts is None else sum(map(len, spec.parts))
        if spec.variant.magnitude and covered not in (None, layout.features(shape)[0]):
            raise ValueError(
                "variant='dora' cannot adapt a part of a fused weight, since it learns the norm of every row; "
                "adapt all of its roles, or use variant='lora'"
            )
        # Under ZeRO-3 the tensor is empty.
        whole = weight.detach() if weight.numel() else weight.new_zeros(shape)
        matrix = layout.to_matrix(whole)
        if not weight.is_floating_point() or weight.dtype.itemsize < 4:
            matrix = matrix.float()
        pieces = [matrix] if spec.parts is None else [matrix[list(rows)] for rows in spec.parts]
        with functional.without_autocast(matrix.device):
            made = [spec.initialization.make(piece, spec.rank, spec.scaling) for piece in pieces]
        lora_A, lora_B = map(torch.cat, zip(*made, strict=True)) if len(made) > 1 else made[0]
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.rank, self.scaling, self.lora_dropout = spec.rank, spec.scaling, spec.dropout
        self.variant, self.parts = spec.variant, spec.parts
        self._blocks = None if spec.parts is None else functional.block_indices(spec.parts, spec.rank)
        self.layout, self.weight_shape, self.groups = layout, shape, groups
        self.start = None
        if spec.initialization.corrected:
            self.start = (lora_A.detach().clone(), lora_B.detach().clone())
        self.enabled, self._unmerged_weight, self.lora_magnitude = True, None, None
        if spec.variant.magnitude:
            moved = layout.to_weight(matrix, shape) + self.delta_weight()
            self.lora_magnitude = nn.Parameter(layout.row_norms(moved))

    def detach(self) -> None:
        """Make the layer what it was before it was adapted; the weight stays as it is now."""
        raise NotImplementedError

    @property
    def frozen_weight(self) -> Tensor:
        """The parameter that holds the pretrained weight, or the merged one while merged."""
        raise NotImplementedError

    def trained_factors(self) -> dict[str, nn.Parameter]:
        """The factors that training changes, by name."""
        return {name: getattr(self, name) for name in self.variant.trained}

    def factors(self) -> tuple[Tensor, Tensor]:
        """A `(R, in)` and B `(out, R)` of the whole weight: parts in their blocks, the start subtracted."""
        return self._whole(self.lora_A, self.lora_B)

    def delta_weight(self) -> Tensor:
        """scaling * B A in the weight's own shape, in fp32 at least, inside autocast too."""
        with functional.without_autocast(self.lora_A.device):
            delta = functional.delta_weight(*self.factors(), self.scaling)
        return self.layout.to_weight(delta, self.weight_shape)

    def adapted(self, weight: Tensor, delta: Tensor, magnitude: Tensor | None) -> Tensor:
        """W' for the frozen W and the update: W + delta, or with DoRA its rows scaled to the learned norms."""
        delta = self.layout.to_weight(delta, self.weight_shape)
        if magnitude is None:
            return functional.merged_weight(weight, delta)
        moved = weight.to(delta.dtype) + delta
        scale = magnitude / self.layout.row_norms(moved).detach()
        return self.layout.scale_rows(moved, scale).to(weight.dtype)

    def effective_weight(self, state: Mapping[str, Any] | None = None) -> Tensor:
        """W' in the type of W, in fp32 at least until then; state: other values of W, as "weight", and the factors."""
        if state is None:
            state = {"weight": self.base_weight, **{name: getattr(self, name) for name in FACTORS}}
        lora_A, lora_B = self._whole(state["lora_A"], state["lora_B"])
        with functional.without_autocast(lora_A.device):
            delta = functional.delta_weight(lora_A, lora_B, self.scaling)
        return self.adapted(state["weight"], delta, state.get("lora_magnitude"))

    @property
    def merged(self) -> bool:
        """Whether the update is in the weight now."""
        return self._unmerged_weight is not None

    @property
    def base_weight(self) -> Tensor:
        """The pretrained weight, whether or not the update is merged, in the type the layer has now."""
        frozen = self.frozen_weight
        return frozen if self._unmerged_weight is None else self._unmerged_weight.to(frozen)

    @torch.no_grad()
    def merge(self) -> None:
        """Put W' in the place of W; a copy of the original is kept, since adding does not undo exactly."""
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

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged and prefix[:-1] in (metadata := getattr(destination, "_metadata", {})):
            metadata[prefix[:-1]]["lora_merged"] = True

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, metadata: Any, *rest: Any) -> None:
        merged = self.merged or metadata.get("lora_merged", False)
        if merged and any(prefix + name in state for name in (*FACTORS, "weight")):
            raise ValueError(
                f"cannot load weights {'into' if self.merged else 'of'} a merged model; got {prefix[:-1]!r}; expected "
                "unmerged ones; call unmerge_lora before state_dict and before load_state_dict"
            )
        super()._load_from_state_dict(state, prefix, metadata, *rest)

    def _whole(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        lora_B = self._in_blocks(lora_B)
        if self.start is None:
            return lora_A, lora_B
        start_A, start_B = (tensor.to(lora_A.device) for tensor in self.start)
        return torch.cat([lora_A, start_A]), torch.cat([lora_B, -self._in_blocks(start_B)], dim=1)

    def _in_blocks(self, lora_B: Tensor) -> Tensor:
        """B `(out, parts * rank)`: each part's B in its rows and its own columns, zeros elsewhere."""
        if self.parts is None or self._blocks is None:
            return lora_B
        rows, columns = (index.to(lora_B.device) for index in self._blocks)
        whole = lora_B.new_zeros(self.layout.features(self.weight_shape)[0], len(self.parts) * self.rank)
        return whole.index_put((rows, columns), lora_B)

    @property
    def peft_rank(self) -> int:
        """The rank of the update in PEFT: parts, the subtracted start and groups multiply it."""
        return self.rank * len(self.parts or (0,)) * (1 if self.start is None else 2) * self.groups

    def to_peft(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's tensors, by their names under the module's, for our factors `own` by their names."""
        lora_A, lora_B = self._whole(own["lora_A"], own["lora_B"])
        kernel = () if self.layout.transposed else self.weight_shape[2:]
        if kernel:
            lora_A = lora_A.reshape(lora_A.shape[0], self.weight_shape[1], *kernel)
            lora_B = lora_B.reshape(*lora_B.shape, *(1 for _ in kernel))
        if self.groups > 1:
            lora_A = functional.block_diagonal(lora_A, self.groups)
        tensors = dict(zip(self.layout.peft_names, (lora_A, lora_B), strict=True))
        if self.lora_magnitude is not None:
            shape = (1, -1, *(1 for _ in kernel)) if kernel else (-1,)
            tensors[MAGNITUDE] = own["lora_magnitude"].reshape(shape)
        return tensors

    @torch.no_grad()
    def load_peft(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy PEFT's tensors into the factors. Raises ValueError if it is merged or cannot represent them."""
        if self.merged:
            raise ValueError("the update in the weight is another one; call unmerge_lora first")
        A, B = (tensors[name].to(self.lora_A).flatten(1) for name in self.layout.peft_names)
        # Of a grouped convolution the first group's: A is block-diagonal.
        A, B = A[: B.shape[1], : self.lora_A.shape[1]], B[:, : self.peft_rank // self.groups]
        count = len(self.lora_A)
        lora_A, lora_B = A[:count], self._from_blocks(B[:, :count])
        if self.start is not None:
            self.start = (A[count:].clone(), -self._from_blocks(B[:, count:]))
        self.lora_A.copy_(lora_A)
        self.lora_B.copy_(lora_B)
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(tensors[MAGNITUDE].reshape(-1))
        if self.parts is None and self.groups == 1:
            return
        # The file has room for more than the blocks that are read: the rest must be zero.
        written = self.to_peft({name: getattr(self, name) for name in FACTORS})
        for name, tensor in written.items():
            if not torch.equal(tensor, tensors[name].to(tensor)):
                raise ValueError(
                    f"{name} is not the update of the adapted part alone; got values outside its block"
                )

    def _from_blocks(self, whole: Tensor) -> Tensor:
        if self.parts is None:
            return whole[:, : self.rank]
        return torch.cat(
            [whole[list(rows), i * self.rank : (i + 1) * self.rank] for i, rows in enumerate(self.parts)]
        )
