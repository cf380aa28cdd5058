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
from hf_lora.insight.spectra import Amplification, Spectrum
from hf_lora.lora.architectures import ARCHITECTURES, ROLE_NAMES, ROLES, ROW_LAYOUTS, Projection
from hf_lora.lora.inject import lora_layers
from hf_lora.lora.layer import MAGNITUDE
from hf_lora.lora.quantized import dequantized, is_quantized
from hf_lora.lora.targets import block_of, has_suffix

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


@dataclass(eq=False)
class Update:
    """The update of one weight, or of one role's rows of a fused weight.

    module: the dotted name. role: a letter of "qkvo", several for a whole fused weight, None if unknown.
    rows: the role's rows of a fused weight; None: all rows. A `(rank, in)`, B `(out, rank)`.
    amplification: set by `amplify`; None until then, and for an update of zero.
    """

    module: str
    role: str | None
    A: Tensor
    B: Tensor
    scaling: float
    rows: tuple[int, ...] | None = None
    amplification: Amplification | None = None

    def __post_init__(self) -> None:
        """`layer`: the number of the block, None outside the blocks. stack, tail: the names before and after it."""
        self.layer = block_of(self.module)
        parts = _BLOCK.split(self.module, maxsplit=1)
        self.stack, self.tail = parts[0], parts[-1] or self.module
        # In words, or else the module's name inside its block.
        self.role_name = "+".join(ROLE_NAMES[letter] for letter in self.role) if self.role else self.tail

    @cached_property
    def spectrum(self) -> Spectrum:
        """The singular triplets of the update."""
        return Spectrum.of(self.A, self.B, self.scaling)

    def directions(self, side: str, of: str = "factors") -> Tensor:
        """The leading directions `(in or out, k)` of a side, "A" (right) or "B" (left).

        of: "factors": of A and of B, as in the paper; they depend on how ΔW is divided between the two.
            "update": of ΔW.
        """
        if of == "update":
            return self.spectrum.Vh.T if side == "A" else self.spectrum.U
        return spectra.right_directions(self.A if side == "A" else self.B.T)


def updates_of(files: AdapterFiles, config: Any = None) -> tuple[list[Update], list[str]]:
    """The updates of an adapter, by block and role, and a note on everything that they leave out.

    config: of the base model; it tells the rows of q, k and v in a fused weight apart. None: unknown.
    Raises ValueError for tensors that are no low-rank product.
    """
    notes = []
    tensors = {key: tensor for key, tensor in files.tensors.items() if not key.endswith(MAGNITUDE)}
    if len(tensors) < len(files.tensors):
        notes.append(DORA)
    adapter = Adapter.from_files(replace(files, tensors=tensors))
    updates = [part for module, entry in adapter.factors.items() for part in _split(module, entry, config)]
    if any(update.rows is None and len(update.role or "") > 1 for update in updates):
        notes.append(FUSED)
    return sorted(updates, key=_order), notes


def role_of(module: str) -> str | None:
    """The letters of the roles that a module's name has in any known architecture; None without one."""
    return "".join(dict.fromkeys(role for role, _ in _places(module, ARCHITECTURES))) or None


def amplify(updates: Iterable[Update], model: nn.Module, directions: int | None = None) -> None:
    """Give updates their amplification of the pretrained weights `(out, in)` under an injected model's adapter."""
    layers = lora_layers(model)
    for update in updates:
        layer = layers[update.module]
        plain = None if is_quantized(layer) else layer.layout.to_matrix(layer.base_weight.detach())
        weight = dequantized(layer) if plain is None else plain
        rows = slice(None) if update.rows is None else list(update.rows)
        update.amplification = spectra.amplification(update.spectrum, weight.cpu()[rows], directions)


def _split(module: str, entry: Factors, config: Any) -> list[Update]:
    """One update; for a fused weight whose rows of each role are known, one of each role."""
    A, B = entry.matrices
    model_type = getattr(config, "model_type", None)
    places = _places(module, [str(model_type)] if model_type in ARCHITECTURES else [])
    parts = []
    for role, layout in {role: place.rows for role, place in places if place.rows is not None}.items():
        rows = tuple(row for block in ROW_LAYOUTS.get(layout)(config, B.shape[0])[role] for row in block)
        part = B[list(rows)]
        # Each role uses columns of B of its own; they are zero in the rows of the others.
        used = part.abs().sum(0) > 0
        if used.any():
            parts.append(Update(module, role, A[used], part[:, used], entry.scaling, rows))
    return parts or [Update(module, role_of(module), A, B, entry.scaling)]


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
    block = ("", 0) if update.layer is None else (update.stack, update.layer)
    return *block, f"{ROLES}?".index((update.role or "?")[0]), update.module


def summarize(updates: Iterable[Update], names: Iterable[str]) -> list[dict[str, Any]]:
    """For each of the names, in their order: name, count, norm of all its updates together, and means over them.

    names: an entry for each update. Updates without an amplification have no part in its means.
    """
    groups: dict[str, list[Update]] = {}
    for update, name in zip(updates, names, strict=True):
        groups.setdefault(name, []).append(update)
    found = []
    for name, members in groups.items():
        amplified = [update.amplification for update in members if update.amplification]
        means = {
            "effective_rank": [update.spectrum.effective_rank for update in members],
            "factor": [entry.factor for entry in amplified if entry.factor is not None],
            "relative": [entry.relative for entry in amplified if entry.relative is not None],
        }
        found.append(
            {
                "name": name,
                "count": len(members),
                "norm": hypot(*(update.spectrum.norm for update in members)),
                **{key: fmean(values) if values else None for key, values in means.items()},
            }
        )
    return found


def layer_names(updates: Sequence[Update]) -> list[str]:
    """The layer of each update: its number, after the name of the stack if there are several; or else the module."""
    several = len({update.stack for update in updates if update.layer is not None}) > 1
    layers = [f"{update.stack if several else ''} {update.layer}".strip() for update in updates]
    return [u.module if u.layer is None else layer for u, layer in zip(updates, layers, strict=True)]


# By layer, then by role.
Grid = dict[str, dict[str, Update | None]]


def grid_of(updates: Sequence[Update]) -> Grid:
    """The updates by layer and role; where a role occurs twice in a block, by the names inside the block.

    Every layer has all columns; None where it has no update.
    """
    names = layer_names(updates)
    roles = [update.role_name for update in updates]
    if len(set(zip(names, roles, strict=True))) < len(updates):
        roles = [f"{update.tail} {update.role}" if update.rows else update.tail for update in updates]
    places = dict(zip(zip(names, roles, strict=True), updates, strict=True))
    columns = dict.fromkeys(roles)
    return {row: {column: places.get((row, column)) for column in columns} for row in names}


@dataclass(eq=False)
class Comparison:
    """The similarity phi(i, j) `(n, m)` of the subspaces of two updates of one weight, by side.

    "A": in the space of the inputs. "B": in the space of the outputs.
    """

    update: Update
    phi: Mapping[str, Tensor]

    @property
    def sides(self) -> dict[str, dict[str, Any]]:
        """By side: `first`, phi(1, 1); `all`, phi for all directions; `all_random`, its mean for random ones; `phi`."""
        found = {}
        for side, dimension in (("A", self.update.A.shape[1]), ("B", len(self.update.B))):
            phi, k = self.phi[side], min(self.phi[side].shape)
            # The mean of phi(i, j) for independent uniform subspaces is max(i, j) / dimension.
            values = (phi[0, 0].item(), phi[k - 1, k - 1].item(), k / dimension) if k else (None,) * 3
            found[side] = dict(zip(("first", "all", "all_random"), values, strict=True), phi=phi.tolist())
        return found


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
        both = {side: [entry.directions(side, of) for entry in (update, other)] for side in "AB"}
        phi = {side: spectra.subspace_similarity(*pair) for side, pair in both.items()}
        found.append(Comparison(update, phi))
    return found
