"""An adapter module by module: where each update lies in the network, its spectrum, and what it does to W."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt
from typing import Any

from torch import Tensor, nn

from hf_lora.adapters.directory import AdapterFiles
from hf_lora.adapters.values import Adapter, Factors
from hf_lora.insight import spectra
from hf_lora.insight.spectra import Amplification, Spectrum, Triplets
from hf_lora.lora.architectures import ARCHITECTURES, ROLE_NAMES, ROLES, ROW_LAYOUTS, Projection
from hf_lora.lora.inject import lora_layers
from hf_lora.lora.quantized import dequantized, is_quantized
from hf_lora.lora.targets import block_of, has_suffix

_MAGNITUDE = ".lora_magnitude_vector"

DORA = (
    "this is a DoRA adapter: what is shown is its low-rank part, scaling * B A; the learned norms of the rows, which "
    "rescale W + scaling * B A, are left out"
)
FUSED = (
    "some weights hold q, k and v together, and which rows are whose is known only with the base model: each such "
    "update is shown as one"
)


@dataclass(frozen=True)
class Update:
    """The update of one weight, or of one role's rows of a fused weight.

    module: the dotted name. role: a letter of "qkvo", several for a fused weight taken whole, None if unknown.
    rows: of the fused weight, those of the role; None: all.
    A `(rank, in)`, B `(out, rank)`.
    """

    module: str
    role: str | None
    A: Tensor
    B: Tensor
    scaling: float
    rows: tuple[int, ...] | None = None

    @property
    def layer(self) -> int | None:
        """The number of the block the module lies in, if it lies in one."""
        return block_of(self.module)

    @property
    def stack(self) -> str:
        """What stands in the name before the number of the block; the whole name without one."""
        return ".".join(self._parts[0])

    @property
    def tail(self) -> str:
        """What stands in the name after the number of the block; the whole name without one."""
        return ".".join(self._parts[1]) or self.module

    @property
    def role_name(self) -> str:
        """The role in words, or else the module's name inside its block."""
        return "+".join(ROLE_NAMES[letter] for letter in self.role) if self.role else self.tail

    @property
    def rank(self) -> int:
        """The rank it has in the file."""
        return self.A.shape[0]

    @cached_property
    def triplets(self) -> Triplets:
        """The singular triplets of the update."""
        return spectra.triplets(self.A, self.B, self.scaling)

    @cached_property
    def spectrum(self) -> Spectrum:
        """The singular values of the update."""
        return Spectrum(tuple(self.triplets.S.tolist()))

    def directions(self, side: str, of: str = "factors") -> Tensor:
        """The leading directions `(in or out, k)` on a side, "A" (right) or "B" (left).

        of: "factors": those of A and of B, as in the paper, which depend on how ΔW is divided between the two;
            "update": those of ΔW.
        """
        if of == "update":
            return self.triplets.Vh.T if side == "A" else self.triplets.U
        return spectra.right_directions(self.A) if side == "A" else spectra.left_directions(self.B)

    @property
    def _parts(self) -> tuple[list[str], list[str]]:
        parts = self.module.split(".")
        at = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
        return parts[:at], parts[at + 1 :]


def updates_of(files: AdapterFiles, config: Any = None) -> tuple[list[Update], list[str]]:
    """The updates of an adapter that was read, by block and role, and sentences about what is not shown.

    config: the base model's configuration, which tells the rows of q, k and v in a fused weight; None: unknown.
    Raises ValueError for tensors that are no low-rank product.
    """
    notes = []
    tensors = {key: tensor for key, tensor in files.tensors.items() if not key.endswith(_MAGNITUDE)}
    if len(tensors) < len(files.tensors):
        notes.append(DORA)
    adapter = Adapter.from_files(replace(files, tensors=tensors))
    updates = [
        update for module, entry in adapter.factors.items() for update in _split(module, entry, config)
    ]
    if any(update.rows is None and len(update.role or "") > 1 for update in updates):
        notes.append(FUSED)
    return sorted(updates, key=_order), notes


def role_of(module: str) -> str | None:
    """The letters of the roles that a module's name means in the architectures that are known; None if in none."""
    return "".join(dict.fromkeys(role for role, _ in _places(module, ARCHITECTURES))) or None


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The pretrained weights `(out, in)` under an injected model's adapter, by module; merged or not.

    Of quantized ones, the numbers that they stand for.
    """
    return {
        name: dequantized(layer).cpu()
        if is_quantized(layer)
        else layer.layout.to_matrix(layer.base_weight.detach()).cpu()
        for name, layer in lora_layers(model).items()
    }


def amplifications(
    updates: Iterable[Update], weights: Mapping[str, Tensor], directions: int | None = None
) -> list[Amplification | None]:
    """For each update its amplification of the base weight; None for an update of zero."""
    found = []
    for update in updates:
        weight = weights[update.module]
        part = weight if update.rows is None else weight[list(update.rows)]
        found.append(spectra.amplification(update.triplets, part, directions))
    return found


def _split(module: str, entry: Factors, config: Any) -> list[Update]:
    """One update, or for a fused weight whose rows are known one for each of its roles."""
    A, B = entry.matrices
    rows = _rows_of(module, B.shape[0], config)
    if not rows:
        return [Update(module, role_of(module), A, B, entry.scaling)]
    parts = []
    for role, own in rows.items():
        part = B[list(own)]
        # Each role has columns of B for itself, beside zeros for the others.
        used = part.abs().sum(0) > 0
        if used.any():
            parts.append(Update(module, role, A[used], part[:, used], entry.scaling, own))
    return parts or [Update(module, role_of(module), A, B, entry.scaling)]


def _rows_of(module: str, out_features: int, config: Any) -> dict[str, tuple[int, ...]]:
    """The output rows of each role in a fused weight; nothing for other weights, or where it is not known."""
    model_type = getattr(config, "model_type", None)
    places = _places(module, [str(model_type)] if model_type in ARCHITECTURES else [])
    layouts = {role: place.rows for role, place in places if place.rows is not None}
    return {
        role: tuple(row for block in ROW_LAYOUTS.get(layout)(config, out_features)[role] for row in block)
        for role, layout in layouts.items()
    }


def _places(module: str, model_types: Iterable[str]) -> list[tuple[str, Projection]]:
    return [
        (role, place)
        for role in ROLES
        for model_type in model_types
        for place in ARCHITECTURES.get(model_type).projections(role)
        if has_suffix(module, place.suffix if place.tensor == "weight" else f"{place.suffix}.{place.tensor}")
    ]


def _order(update: Update) -> tuple[Any, ...]:
    """By block, then q, k, v, o, then by name; what lies in no block comes first."""
    role = f"{ROLES}?".index((update.role or "?")[0])
    if update.layer is None:
        return "", 0, role, update.module
    return update.stack, update.layer, role, update.module


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
