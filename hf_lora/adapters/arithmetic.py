"""Arithmetic on adapters: lower the rank, add, average. No base model is needed.

ΔW = scaling * B A `(out, in)` is never computed, only its factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt

import torch
from torch import Tensor

from hf_lora.adapters.directory import AdapterFiles
from hf_lora.adapters.values import Adapter, Factors

# The rounding error of a few operations in double precision, for shares and for sums that cancel.
_ROUNDING = 8 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Truncation:
    """The loss by a lower rank of one update.

    kept_energy: the share of the squared singular values of ΔW that is kept.
    relative_error: the Frobenius norm of the difference over that of ΔW, the root of 1 - kept_energy.
    """

    old_rank: int
    new_rank: int
    kept_energy: float
    relative_error: float


def resize(
    adapter: Adapter, rank: int | None = None, energy: float | None = None
) -> tuple[Adapter, dict[str, Truncation]]:
    """The best approximation of every update at a lower rank, and its loss by module.

    The leading singular triplets of ΔW are the best in the Frobenius norm (Eckart and Young 1936). They come from
    an SVD of `(rank, rank)` between the QR factors of B and A'; B = U sqrt(S), A = sqrt(S) V', scaling 1.
    rank: the new rank of every module; a module of a lower rank keeps its own.
    energy: in place of `rank`, the share in (0, 1] of the squared singular values that each module keeps by the
        smallest rank that is enough; an update of zero gets rank 1.
    Raises ValueError unless exactly one of the two is given and usable.
    """
    check_budget(rank, energy)
    factors, report = {}, {}
    for module, old in adapter.factors.items():
        A, B = old.matrices
        Q_B, R_B = torch.linalg.qr(B)
        Q_A, R_A = torch.linalg.qr(A.T)
        U, S, Vh = torch.linalg.svd(old.scaling * R_B @ R_A.T)
        # Updates that cancel leave rounding errors, which are not zero.
        size = abs(old.scaling) * A.norm() * B.norm()
        total = 0.0 if S[0] <= _ROUNDING * size else S.square().cumsum(0)[-1].item()
        A, B, loss = balanced(Q_B @ U, S, Vh @ Q_A.T, total=total, rank=rank, energy=energy)
        factors[module] = old.with_matrices(A, B)
        report[module] = replace(loss, old_rank=old.rank)
    return Adapter(factors, adapter.whole), report


def combine(adapters: Sequence[Adapter], weights: Sequence[float], *, average: bool = False) -> Adapter:
    """The exact weighted sum of the updates: factors are concatenated, so that ranks add up; scaling 1.

    average: divide the weights by their sum first, as it is always done for whole tensors (the head, biases).
    A module that an adapter does not have counts as an update of zero.
    Raises ValueError if shapes or whole tensors do not fit, or if the weights sum to 0 where they are divided.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"expected one weight for each adapter; got {len(weights)} for {len(adapters)}")
    if not all(isfinite(weight) for weight in weights):
        raise ValueError(f"weights are not usable; got {list(weights)}; expected finite numbers")
    _check_whole(adapters, [f"adapter {number}" for number in range(1, 1 + len(adapters))])
    has_whole = any(adapter.whole for adapter in adapters)
    shares = head_shares(weights) if average or has_whole else ()
    updates = shares if average else weights
    modules = dict.fromkeys(module for adapter in adapters for module in adapter.factors)
    whole = {}
    for name, tensor in adapters[0].whole.items():
        terms = [s * adapter.whole[name].double() for s, adapter in zip(shares, adapters, strict=True)]
        whole[name] = torch.stack(terms).sum(0).to(tensor.dtype)
    return Adapter({module: _concatenated(module, adapters, updates) for module in modules}, whole)


def head_shares(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum. Raises ValueError if that is 0."""
    total = sum(weights)
    if abs(total) <= 1e-9 * sum(abs(weight) for weight in weights):
        which = f"got {list(weights)}; expected such as 1 0.5"
        raise ValueError(f"weights that sum to 0 have no average, which the heads need; {which}")
    return [weight / total for weight in weights]


def check_combinable(sources: Sequence[AdapterFiles]) -> None:
    """Raises ValueError, naming both, if two adapters differ in labels, task, whole tensors or base model."""
    first, *others = sources
    for other in others:
        infos, places = (first.info, other.info), [str(files.directory) for files in (first, other)]
        for what in ("labels", "problem_type", "pooling") if all(infos) else ():
            wanted, got = (getattr(info, what) for info in infos)
            if wanted != got:
                raise ValueError(
                    f"adapters with different {what.replace('_', ' ')} cannot be combined; got {got} in "
                    f"{places[1]!r} and {wanted} in {places[0]!r}"
                )
        # Before the bases: a base's fingerprint leaves out the tensors that the adapter brings whole.
        _check_whole([Adapter.from_files(files) for files in (first, other)], places)
        digests = [info.base_model.fingerprint if info else None for info in infos]
        names = [files.base_name for files in (first, other)]
        # The same weights may have several names: these are compared only where a fingerprint is missing.
        pair = names if None in digests else digests
        if None not in pair and pair[0] != pair[1]:
            raise ValueError(
                f"adapters of different base models cannot be combined; got {names[1]!r} ({digests[1]}) in "
                f"{places[1]!r} and {names[0]!r} ({digests[0]}) in {places[0]!r}"
            )


def check_budget(rank: int | None, energy: float | None) -> None:
    """Raises ValueError unless exactly one of a rank of at least 1 and an energy in (0, 1] is given."""
    if (rank is None) == (energy is None):
        raise ValueError(f"expected either a rank or an energy; got rank={rank} and energy={energy}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank is not usable; got {rank}; expected a whole number of at least 1, such as 8")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ValueError(f"energy is not a share; got {energy}; expected 0 < energy <= 1, such as 0.9")


def balanced(
    U: Tensor, S: Tensor, Vh: Tensor, *, total: float, rank: int | None, energy: float | None
) -> tuple[Tensor, Tensor, Truncation]:
    """A `(k, in)` and B `(out, k)`: B A is the sum of the first k triplets of U `(out, n)`, S `(n,)`, Vh `(n, in)`.

    total: the squared Frobenius norm of the whole matrix, since S may be only a part of its singular values;
        0 for a matrix that is zero but for rounding.
    """
    if total == 0.0:
        zeros = torch.zeros_like(Vh[:1]), torch.zeros_like(U[:, :1])
        return *zeros, Truncation(len(S), 1, kept_energy=1.0, relative_error=0.0)
    shares = S.double().square().cumsum(0) / total
    enough = 1 + int((shares < (energy or 0.0) - _ROUNDING).sum())
    k = min(rank or enough, len(S))
    root = S[:k].sqrt()
    lost = max(0.0, 1.0 - shares[k - 1].item())
    truncation = Truncation(len(S), k, kept_energy=1.0 - lost, relative_error=sqrt(lost))
    return root[:, None] * Vh[:k], U[:, :k] * root, truncation


def _concatenated(module: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> Factors:
    """[w1 s1 B1, w2 s2 B2, ...] [A1; A2; ...], over the adapters that have the module."""
    present = [
        (adapter.factors[module], weight)
        for adapter, weight in zip(adapters, weights, strict=True)
        if module in adapter.factors
    ]
    first = present[0][0]
    for other, _ in present[1:]:
        if (other.A.shape[1:], other.B.shape[0]) != (first.A.shape[1:], first.B.shape[0]):
            raise ValueError(
                f"the updates of {module!r} have different sizes; got A and B of {tuple(other.A.shape)} and "
                f"{tuple(other.B.shape)}; expected {tuple(first.A.shape)} and {tuple(first.B.shape)} but for the rank"
            )
    A = torch.cat([entry.matrices[0] for entry, _ in present])
    B = torch.cat([weight * entry.scaling * entry.matrices[1] for entry, weight in present], dim=1)
    return first.with_matrices(A, B)


def _check_whole(adapters: Sequence[Adapter], names: Sequence[str]) -> None:
    first, *others = ({n: tuple(t.shape) for n, t in adapter.whole.items()} for adapter in adapters)
    for shapes, name in zip(others, names[1:], strict=True):
        for tensor in sorted({*first, *shapes}):
            if first.get(tensor) != shapes.get(tensor):
                raise ValueError(
                    f"adapters cannot be combined unless they bring the same whole tensors; {tensor!r} has shape "
                    f"{shapes.get(tensor, 'none')} in {name!r} and {first.get(tensor, 'none')} in {names[0]!r}"
                )
