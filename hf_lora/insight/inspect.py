"""An adapter module by module: each update's place in the network, its spectrum, and its effect on the weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import hypot
from statistics import fmean
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
# The first number in a module's name is that of its block.
_BLOCK = re.compile(r"(?:^|\.)\d+(?:\.|$)")

DORA = (
    "this is a DoRA adapter; only its low-rank part, scaling * B A, is shown; the learned norms of the rows, which "
    "rescale W + scaling * B A, are left out"
)
FUSED = (
    "some weights hold q, k and v together, and only the base model tells their rows apart; each such update is "
    "shown as one"
)


@dataclass(frozen=True)
class Update:
    """The update of one weight, or of one role's rows of a fused weight.

    module: the dotted name. role: a letter of "qkvo", several for a whole fused weight, None if unknown.
    rows: the role's rows of a fused weight; None: all rows. A `(rank, in)`, B `(out, rank)`.
    """

    module: str
    role: str | None
    A: Tensor
    B: Tensor
    scaling: float
    rows: tuple[int, ...] | None = None

    @property
    def layer(self) -> int | None:
        """The number of the module's block; None outside the blocks."""
        return block_of(self.module)

    @property
    def stack(self) -> str:
        """The name before the number of the block; the whole name outside the blocks."""
        return _BLOCK.split(self.module, maxsplit=1)[0]

    @property
    def tail(self) -> str:
        """The name after the number of the block; the whole name outside the blocks."""
        return _BLOCK.split(self.module, maxsplit=1)[-1] or self.module

    @property
    def role_name(self) -> str:
        """The role in words, or else the module's name inside its block."""
        return "+".join(ROLE_NAMES[letter] for letter in self.role) if self.role else self.tail

    @property
    def rank(self) -> int:
        """The rank in the file."""
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
        """The leading directions `(in or out, k)` of a side, "A" (right) or "B" (left).

        of: "factors": of A and of B, as in the paper; they depend on how ΔW is divided between the two.
            "update": of ΔW.
        """
        if of == "update":
            return self.triplets.Vh.T if side == "A" else self.triplets.U
        return spectra.right_directions(self.A) if side == "A" else spectra.left_directions(self.B)


def updates_of(files: AdapterFiles, config: Any = None) -> tuple[list[Update], list[str]]:
    """The updates of an adapter, by block and role, and a note on everything that they leave out.

    config: of the base model; it tells the rows of q, k and v in a fused weight apart. None: unknown.
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
    """The letters of the roles that a module's name has in any known architecture; None without one."""
    return "".join(dict.fromkeys(role for role, _ in _places(module, ARCHITECTURES))) or None


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The pretrained weights `(out, in)` under an injected model's adapter, by module; quantized ones dequantized."""
    return {
        name: dequantized(layer).cpu()
        if is_quantized(layer)
        else layer.layout.to_matrix(layer.base_weight.detach()).cpu()
        for name, layer in lora_layers(model).items()
    }


def amplifications(
    updates: Sequence[Update], weights: Mapping[str, Tensor], directions: int | None = None
) -> list[Amplification | None]:
    """For each update its amplification of the base weight; None for an update of zero."""
    rows = [slice(None) if update.rows is None else list(update.rows) for update in updates]
    return [
        spectra.amplification(update.triplets, weights[update.module][own], directions)
        for update, own in zip(updates, rows, strict=True)
    ]


def _split(module: str, entry: Factors, config: Any) -> list[Update]:
    """One update; for a fused weight with known rows, one of each role."""
    A, B = entry.matrices
    parts = []
    for role, own in _rows_of(module, B.shape[0], config).items():
        part = B[list(own)]
        # Each role uses columns of B of its own; they are zero in the rows of the others.
        used = part.abs().sum(0) > 0
        if used.any():
            parts.append(Update(module, role, A[used], part[:, used], entry.scaling, own))
    return parts or [Update(module, role_of(module), A, B, entry.scaling)]


def _rows_of(module: str, out_features: int, config: Any) -> dict[str, tuple[int, ...]]:
    """The output rows of each role in a fused weight; empty for other weights and unknown architectures."""
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
    """Modules outside the blocks first, then by block; in a block q, k, v, o, then by name."""
    role = f"{ROLES}?".index((update.role or "?")[0])
    if update.layer is None:
        return "", 0, role, update.module
    return update.stack, update.layer, role, update.module


def summarize(
    updates: Sequence[Update], amplified: Sequence[Amplification | None], names: Iterable[str]
) -> list[dict[str, Any]]:
    """For each of the names, in their order: name, count, norm of all its updates together, and means over them.

    amplified, names: an entry for each update. Updates without an amplification have no part in its means.
    """
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(name, []).append(index)
    return [
        {
            "name": name,
            "count": len(members),
            "norm": hypot(*(updates[index].spectrum.norm for index in members)),
            "effective_rank": fmean(updates[index].spectrum.effective_rank for index in members),
            "factor": _mean(getattr(amplified[index], "factor", None) for index in members),
            "relative": _mean(getattr(amplified[index], "relative", None) for index in members),
        }
        for name, members in groups.items()
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


@dataclass(frozen=True)
class Grid:
    """Layers by roles: `cells[row][column]` is the index of an update, or None where there is none."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[int | None, ...], ...]


def layer_names(updates: Sequence[Update]) -> list[str]:
    """The layer of each update: its number, after the name of the stack if there are several; or else the module."""
    several = len({update.stack for update in updates if update.layer is not None}) > 1
    layers = [f"{update.stack if several else ''} {update.layer}".strip() for update in updates]
    return [u.module if u.layer is None else layer for u, layer in zip(updates, layers, strict=True)]


def grid_of(updates: Sequence[Update]) -> Grid:
    """The updates by layer and role; where a role occurs twice in a block, by the names inside the block."""
    names = layer_names(updates)
    roles = [update.role_name for update in updates]
    if len(set(zip(names, roles, strict=True))) < len(updates):
        roles = [f"{update.tail} {update.role}" if update.rows else update.tail for update in updates]
    places = {place: index for index, place in enumerate(zip(names, roles, strict=True))}
    rows, columns = tuple(dict.fromkeys(names)), tuple(dict.fromkeys(roles))
    return Grid(rows, columns, tuple(tuple(places.get((row, column)) for column in columns) for row in rows))


@dataclass(frozen=True)
class Comparison:
    """The similarity phi(i, j) `(n, m)` of the subspaces of two updates of one weight.

    right: of A, in the space of the inputs. left: of B, in the space of the outputs.
    """

    update: Update
    right: Tensor
    left: Tensor

    @property
    def sides(self) -> dict[str, dict[str, Any]]:
        """By side: `first`, phi(1, 1); `all`, phi for all directions; `all_random`, its mean for random ones; `phi`."""
        sizes = {"A": (self.right, self.update.A.shape[1]), "B": (self.left, len(self.update.B))}
        return {
            side: {
                "first": phi[0, 0].item() if phi.numel() else None,
                "all": phi[k - 1, k - 1].item() if phi.numel() else None,
                "all_random": spectra.random_similarity(k, k, dimension) if phi.numel() else None,
                "phi": phi.tolist(),
            }
            for side, (phi, dimension) in sizes.items()
            for k in [min(phi.shape)]
        }


def compare(first: Iterable[Update], second: Iterable[Update], of: str = "factors") -> list[Comparison]:
    """The similarity of the updates that two adapters have in common. of: as in `Update.directions`.

    Raises ValueError if they have none in common, or of different sizes.
    """
    others = {(update.module, update.rows): update for update in second}
    pairs = [(update, others[key]) for update in first if (key := (update.module, update.rows)) in others]
    if not pairs:
        raise ValueError(
            f"the two adapters adapt no module in common; got {sorted({name for name, _ in others})[:3]} in the other"
        )
    found = []
    for update, other in pairs:
        expected, got = ((len(entry.B), entry.A.shape[1]) for entry in (update, other))
        if got != expected:
            raise ValueError(
                f"the updates of {update.module!r} have different sizes; got {got} in the other adapter; "
                f"expected {expected}"
            )
        sides = [(update.directions(side, of), other.directions(side, of)) for side in "AB"]
        found.append(Comparison(update, *(spectra.subspace_similarity(*pair) for pair in sides)))
    return found
