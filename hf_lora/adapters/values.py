"""Adapters as values: from an adapter directory to its factors and whole tensors, and back."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, nextafter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lora.adapters.directory import AdapterFiles, writing_adapter
from hf_lora.adapters.info import AdapterInfo
from hf_lora.adapters.peft_format import (
    PEFT_VERSION,
    PREFIX,
    as_saved,
    bias_key,
    by_pattern,
    from_peft,
    int_if_whole,
    without_duplicates,
)
from hf_lora.version import __version__

# PEFT's names of A and B after the module's name, for layers and for embeddings.
_FACTOR_KEYS = {
    False: (".lora_A.weight", ".lora_B.weight"),
    True: (".lora_embedding_A", ".lora_embedding_B"),
}


@dataclass(frozen=True)
class Factors:
    """One update, ΔW = scaling * B A, in PEFT's shapes.

    A `(rank, in)` and B `(out, rank)`; of a convolution A `(rank, in, *kernel)` and B `(out, rank, 1, ...)`;
    of an embedding A `(rank, num_embeddings)` and B `(dim, rank)`.
    """

    A: Tensor
    B: Tensor
    scaling: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        """The inner dimension of B A."""
        return self.A.shape[0]

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """A `(rank, in)` and B `(out, rank)` in double precision, kernels flattened."""
        return self.A.double().flatten(1), self.B.double().flatten(1)

    def with_matrices(self, A: Tensor, B: Tensor, scaling: float) -> Factors:
        """Other factors, A `(rank, in)` and B `(out, rank)`, for the same module and in the same dtype."""
        rank = A.shape[0]
        return replace(
            self,
            A=A.to(self.A.dtype).reshape(rank, *self.A.shape[1:]).contiguous(),
            B=B.to(self.B.dtype).reshape(self.B.shape[0], rank, *self.B.shape[2:]).contiguous(),
            scaling=scaling,
        )


@dataclass(frozen=True)
class Adapter:
    """An adapter: `factors` by module, `whole` tensors by their name in the model.

    The whole tensors are the head, trained biases, and the rest of PEFT's `modules_to_save`.
    """

    factors: Mapping[str, Factors]
    whole: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_files(cls, files: AdapterFiles) -> Adapter:
        """The adapter in a directory that was read.

        Raises ValueError for NaN, and for tensors such as DoRA's, whose update is no low-rank product.
        """
        source = str(files.directory)
        sides: dict[tuple[str, bool], dict[int, Tensor]] = {}
        whole: dict[str, Tensor] = {}
        # safetensors gives the tensors in any order.
        for key in sorted(without_duplicates(files.tensors)):
            name, tensor = key.removeprefix(PREFIX), files.tensors[key]
            if not torch.isfinite(tensor).all():
                raise ValueError(f"the adapter in {source!r} is damaged; got NaN or infinity in {key!r}")
            place = _factor_place(name)
            if place is not None:
                module, embedding, side = place
                sides.setdefault((module, embedding), {})[side] = tensor
            elif ".lora_" in name:
                raise ValueError(_not_low_rank(source, key))
            else:
                whole[name.replace(".base_layer.", ".")] = tensor
        # PEFT's ranks and alphas are those of the tensors; the sidecar's may differ, for parts of fused weights.
        config = from_peft(files.peft_config, files.tensors)
        factors = {}
        for (module, embedding), pair in sides.items():
            rank = config.rank_of(module)
            if len(pair) != 2 or not pair[0].shape[0] == pair[1].shape[1] == rank:
                raise ValueError(
                    f"A and B of {module!r} in {source!r} are no low-rank product; got shapes "
                    f"{[tuple(tensor.shape) for tensor in pair.values()]}; expected rank {rank}; a grouped "
                    "convolution has no such product"
                )
            factors[module] = Factors(pair[0], pair[1], config.scaling_of(module), embedding)
        return cls(factors, whole)

    @property
    def lora_parameters(self) -> int:
        """The number of values in all factors."""
        return sum(entry.A.numel() + entry.B.numel() for entry in self.factors.values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of `adapter_model.safetensors`, by PEFT's keys: fp32 on the CPU, contiguous."""
        saved = {
            PREFIX + module + key: tensor
            for module, entry in self.factors.items()
            for key, tensor in zip(_FACTOR_KEYS[entry.embedding], (entry.A, entry.B), strict=True)
        }
        for name, tensor in self.whole.items():
            key = bias_key(name, self.factors) if name.endswith(".bias") else PREFIX + name
            saved[key] = tensor
        return {key: as_saved(tensor) for key, tensor in saved.items()}

    def ranks_and_alphas(self) -> dict[str, Any]:
        """`r`, `lora_alpha`, `rank_pattern` and `alpha_pattern`: the commonest values, and the exceptions.

        alpha / r is the scaling of each module to the last bit wherever a double can be found for alpha.
        """
        ranks = {module: entry.rank for module, entry in self.factors.items()}
        alphas = {module: _alpha(entry.scaling, entry.rank) for module, entry in self.factors.items()}
        return by_pattern(ranks, alphas, anchor="^")


class Contents(NamedTuple):
    """The contents of an adapter directory: tensors, `adapter_config.json`, `hf_lora.json` (None: no such file)."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    info: AdapterInfo | None


def contents(adapter: Adapter, sources: Sequence[AdapterFiles]) -> Contents:
    """The contents for an adapter that was computed from those in `sources`, which fit each other.

    Labels, task and base model are taken over. Metrics are not: they were measured with another adapter.
    """
    first = sources[0]
    saved = {name for files in sources for name in files.peft_config.get("modules_to_save") or ()}
    config = {
        **first.peft_config,
        **adapter.ranks_and_alphas(),
        "peft_version": PEFT_VERSION,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "modules_to_save": sorted(saved) or None,
        "bias": max((files.config.bias for files in sources), key=("none", "lora_only", "all").index),
    }
    if set(Adapter.from_files(first).factors) != set(adapter.factors):
        config |= {
            "target_modules": sorted(adapter.factors),
            "layers_to_transform": None,
            "layers_pattern": None,
            "exclude_modules": None,
        }
    return Contents(adapter.tensors(), config, _info([files.info for files in sources if files.info]))


def write_adapter(directory: str | Path, new: Contents, *, copies: Iterable[Path] = ()) -> Path:
    """Write all files of an adapter directory or none; returns its path. copies: more files, as of the tokenizer."""
    directory = Path(directory)
    with writing_adapter(directory, new.tensors, new.config, new.info) as folder:
        for path in copies:
            shutil.copyfile(path, folder / path.name)
    return directory


def _factor_place(name: str) -> tuple[str, bool, int] | None:
    """(module, whether it is an embedding, 0 for A or 1 for B) of a tensor's name; None for other tensors."""
    places = (
        (name.removesuffix(key), embedding, side)
        for embedding, keys in _FACTOR_KEYS.items()
        for side, key in enumerate(keys)
        if name.endswith(key)
    )
    return next(places, None)


def _not_low_rank(source: str, key: str) -> str:
    kind = (
        "a DoRA adapter" if "lora_magnitude_vector" in key else "an adapter with other tensors than A and B"
    )
    return (
        f"{kind} cannot be resized or combined, since its update is no low-rank sum; got {key!r} in {source!r}; "
        "expected only A and B; merge it into the base model, and extract an adapter from the result"
    )


def _alpha(scaling: float, rank: int) -> float:
    """The alpha for which alpha / rank is `scaling`: the product or, after rounding, one of its neighbours."""
    alpha = scaling * rank
    near = (alpha, nextafter(alpha, inf), nextafter(alpha, -inf))
    return int_if_whole(min(near, key=lambda value: abs(value / rank - scaling)))


def _info(infos: Sequence[AdapterInfo]) -> AdapterInfo | None:
    if not infos:
        return None
    first = infos[0]
    lengths = [info.max_length for info in infos]
    return replace(
        first,
        base_model=max((info.base_model for info in infos), key=lambda base: base.fingerprint is not None),
        projections=first.projections if len({info.projections for info in infos}) == 1 else None,
        # PEFT's file has all of it: parts of fused weights and subtracted starts are multiplied out.
        lora=None,
        max_length=None if None in lengths else max(length for length in lengths if length),
        text_columns=first.text_columns if len({info.text_columns for info in infos}) == 1 else (),
        # The sum of several adapters is another classifier: it has to be calibrated anew.
        temperature=first.temperature if len(infos) == 1 else None,
        thresholds=first.thresholds if len(infos) == 1 else None,
        metrics={},
        hf_lora_version=__version__,
    )
