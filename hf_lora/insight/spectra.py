"""Singular values and directions of low-rank updates (Hu et al. 2021, arXiv:2106.09685, section 7).

ΔW = scaling * B A `(out, in)` is never formed: QR of the thin factors leaves a small matrix to decompose.
Everything is in double precision, on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

# Singular values below this share of the factors' sizes are rounding errors.
_ROUNDING = 8 * torch.finfo(torch.float64).eps


class Spectrum(NamedTuple):
    """The singular triplets of an update ΔW, the largest first, without rounding errors; k = 0 for one of zero.

    U `(out, k)`, S `(k,)`, Vh `(k, in)`.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor

    @classmethod
    def of(cls, A: Tensor, B: Tensor, scaling: float) -> Spectrum:
        """The spectrum of scaling * B A, for A `(rank, in)` and B `(out, rank)`."""
        A, B = A.double(), B.double()
        Q_B, R_B = torch.linalg.qr(B)
        Q_A, R_A = torch.linalg.qr(A.T)
        U, S, Vh = torch.linalg.svd(scaling * R_B @ R_A.T)
        # Updates that cancel leave rounding errors, which have singular values too.
        rank = _rank(S, abs(scaling) * (A.norm() * B.norm()).item())
        return cls(Q_B @ U[:, :rank], S[:rank], Vh[:rank] @ Q_A.T)

    @property
    def values(self) -> list[float]:
        """The singular values."""
        return self.S.tolist()

    @property
    def norm(self) -> float:
        """The Frobenius norm of ΔW."""
        return sqrt(sum(value**2 for value in self.values))

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values divided by their sum (Roy and Vetterli 2007, definition 1).

        k for k equal singular values, near 1 where one outweighs the others; 0 for an update of zero.
        """
        total = sum(self.values)
        shares = [value / total for value in self.values]
        return exp(-sum(share * log(share) for share in shares)) if shares else 0.0

    @property
    def stable_rank(self) -> float:
        """The squared Frobenius norm over the square of the largest singular value; 0 for an update of zero."""
        return (self.norm / self.values[0]) ** 2 if self.values else 0.0

    def energy(self, rank: int) -> float:
        """The share of the squared singular values that the best approximation of this rank keeps; 1 for zero."""
        kept = sum(value**2 for value in self.values[:rank])
        return kept / self.norm**2 if self.values else 1.0

    def rank_for(self, energy: float) -> int:
        """The lowest rank that keeps this share of the squared singular values; 0 for an update of zero."""
        ranks = range(1, 1 + len(self.values))
        return next((rank for rank in ranks if self.energy(rank) >= energy - _ROUNDING), len(self.values))


@dataclass(frozen=True)
class Amplification:
    """How an update relates to its weight W (table 7 of the LoRA paper). All are Frobenius norms.

    update, weight: of ΔW and of W.
    in_update: of U' W V, where U and V are the leading `directions` singular directions of ΔW.
    in_weight: of U' W V for the leading directions of W itself, which is the largest possible value.
    in_random: of U' W V for random directions, as a root mean square.
    """

    directions: int
    update: float
    weight: float
    in_update: float
    in_weight: float
    in_random: float

    @property
    def factor(self) -> float | None:
        """||ΔW|| / ||U' W V||: what the update adds, over what W has in these directions; None where W has nothing."""
        return self.update / self.in_update if self.in_update else None

    @property
    def relative(self) -> float | None:
        """||ΔW|| / ||W||; None for a weight of zero."""
        return self.update / self.weight if self.weight else None


def amplification(update: Spectrum, weight: Tensor, directions: int | None = None) -> Amplification | None:
    """The amplification of `weight` `(out, in)` in the leading `directions` (default: all); None for a zero update."""
    if not len(update.S):
        return None
    W = weight.double()
    r = min(directions or len(update.S), len(update.S))
    norm = W.norm().item()
    # The squared singular values of W, from the smaller of its two Gram matrices.
    squares = torch.linalg.eigvalsh(W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W)
    return Amplification(
        directions=r,
        update=update.S.norm().item(),
        weight=norm,
        in_update=(update.U[:, :r].T @ W @ update.Vh[:r].T).norm().item(),
        in_weight=squares[-r:].clamp(min=0).sum().sqrt().item(),
        # For independent uniform subspaces E U U' = r / out and E V V' = r / in, times the identity.
        in_random=r * norm / sqrt(W.shape[0] * W.shape[1]),
    )


def right_directions(A: Tensor) -> Tensor:
    """The right singular vectors of A `(rank, in)`, the leading one first, as columns `(in, k)`."""
    _, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    return Vh[: _rank(S, A.double().norm().item())].T


def subspace_similarity(first: Tensor, second: Tensor) -> Tensor:
    """phi(i, j) = ||U_i' V_j||² / min(i, j) for the first i and j columns: section 7.2, equation 4 of the paper.

    first `(d, n)` and second `(d, m)` have orthonormal columns. Returns `(n, m)`, entry [i - 1, j - 1] in [0, 1]:
    1 where one subspace lies in the other, 0 where they are orthogonal.
    """
    overlaps = (first.T @ second).square().cumsum(0).cumsum(1)
    i = torch.arange(1, 1 + overlaps.shape[0], dtype=overlaps.dtype)
    j = torch.arange(1, 1 + overlaps.shape[1], dtype=overlaps.dtype)
    return (overlaps / torch.minimum(i[:, None], j)).clamp(max=1.0)


def _rank(values: Tensor, size: float) -> int:
    return int((values > _ROUNDING * size).sum())
