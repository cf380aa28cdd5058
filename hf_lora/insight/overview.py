"""The updates of an adapter taken together: by layer and role, and beside those of another adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from torch import Tensor

from hf_lora.insight import spectra
from hf_lora.insight.inspection import Update
from hf_lora.insight.spectra import Amplification


@dataclass(frozen=True)
class Summary:
    """Several updates together: the norm of all, and means over them."""

    name: str
    count: int
    norm: float
    effective_rank: float
    factor: float | None
    relative: float | None


def summarize(
    updates: Sequence[Update],
    amplified: Sequence[Amplification | None],
    key: Callable[[Update], str],
) -> list[Summary]:
    """The updates that have the same `key` taken together, in the order in which the keys first appear.

    amplified: one for each update; None where it is not known. Updates of zero have no part in its means.
    """
    groups: dict[str, list[int]] = {}
    for index, update in enumerate(updates):
        groups.setdefault(key(update), []).append(index)
    return [
        Summary(
            name=name,
            count=len(members),
            norm=sqrt(sum(updates[index].spectrum.norm ** 2 for index in members)),
            effective_rank=sum(updates[index].spectrum.effective_rank for index in members) / len(members),
            factor=_mean([amplified[index] for index in members], "factor"),
            relative=_mean([amplified[index] for index in members], "relative"),
        )
        for name, members in groups.items()
    ]


@dataclass(frozen=True)
class Grid:
    """Layers by roles: `cells[row][column]` is the index of an update, or None where there is none."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[int | None, ...], ...]


def layer_name(update: Update, several: bool = False) -> str:
    """What the row of an update is called; `several`: there are blocks of the same number in several stacks."""
    if update.layer is None:
        return update.module
    return f"{update.stack} {update.layer}" if several else str(update.layer)


def several_stacks(updates: Iterable[Update]) -> bool:
    """Whether the blocks stand in more than one stack, as an encoder's and a decoder's do."""
    return len({update.stack for update in updates if update.layer is not None}) > 1


def grid_of(updates: Sequence[Update]) -> Grid:
    """The updates by layer and role; where a role occurs twice in a block, by the names inside the block."""
    several = several_stacks(updates)
    names = [layer_name(update, several) for update in updates]
    roles = [update.role_name for update in updates]
    if len(set(zip(names, roles, strict=True))) < len(updates):
        roles = [f"{update.tail} {update.role}" if update.rows else update.tail for update in updates]
    places = {place: index for index, place in enumerate(zip(names, roles, strict=True))}
    rows, columns = tuple(dict.fromkeys(names)), tuple(dict.fromkeys(roles))
    return Grid(rows, columns, tuple(tuple(places.get((row, column)) for column in columns) for row in rows))


@dataclass(frozen=True)
class Comparison:
    """How similar the subspaces of two updates of the same weight are: phi(i, j) `(n, m)` of each side.

    right: of A, in the space of the inputs `(in,)`. left: of B, in the space of the outputs `(out,)`.
    """

    update: Update
    right: Tensor
    left: Tensor

    @property
    def sides(self) -> dict[str, dict[str, Any]]:
        """By side: phi of the first directions, of as many as both have, its mean for random ones, and all of it."""
        sizes = {"A": (self.right, self.update.A.shape[1]), "B": (self.left, len(self.update.B))}
        sides = {}
        for side, (phi, dimension) in sizes.items():
            k = min(phi.shape)
            sides[side] = {
                "first": phi[0, 0].item() if k else None,
                "all": phi[k - 1, k - 1].item() if k else None,
                "all_random": spectra.random_similarity(k, k, dimension) if k else None,
                "phi": phi.tolist(),
            }
        return sides


def compare(first: Iterable[Update], second: Iterable[Update], of: str = "factors") -> list[Comparison]:
    """The similarity of the updates that two adapters have in common. of: as in `Update.directions`.

    Raises ValueError if they have none in common, or of different sizes.
    """
    others = {(update.module, update.rows): update for update in second}
    found = []
    for update in first:
        other = others.get((update.module, update.rows))
        if other is None:
            continue
        shapes = [(len(entry.B), entry.A.shape[1]) for entry in (update, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the updates of {update.module!r} have different sizes; got {shapes[1]} in the other adapter; "
                f"expected {shapes[0]}"
            )
        sides = [(update.directions(side, of), other.directions(side, of)) for side in "AB"]
        found.append(Comparison(update, *(spectra.subspace_similarity(*pair) for pair in sides)))
    if not found:
        raise ValueError(
            f"the two adapters adapt no module in common; got {sorted({name for name, _ in others})[:3]} in the other"
        )
    return found


def _mean(amplified: Iterable[Amplification | None], what: str) -> float | None:
    values = [getattr(entry, what) for entry in amplified if entry is not None]
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None
