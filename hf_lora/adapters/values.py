"""Adapters as values: the low-rank updates and whole tensors of an adapter directory, and back to one."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, nextafter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lora.adapters import peft_format
from hf_lora.adapters.directory import AdapterFiles, writing_adapter
from hf_lora.adapters.info import AdapterInfo
from hf_lora.adapters.peft_format import as_saved
from hf_lora.version import __version__

# PEFT's names of A and B, under the module's: those of layers, and those of embeddings.
_LAYER_KEYS = ("lora_A.weight", "lora_B.weight")
_EMBEDDING_KEYS = ("lora_embedding_A", "lora_embedding_B")
_BASE_LAYER = ".base_layer."


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
    """What an adapter does to a model: `factors` by module, `whole` tensors by their name in the model.

    The whole tensors are the head, trained biases, and everything else of PEFT's `modules_to_save`.
    """

    factors: Mapping[str, Factors]
    whole: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_files(cls, files: AdapterFiles) -> Adapter:
        """The adapter in a directory that was read.

        Raises ValueError for DoRA and for biases of B, which are no low-rank sum, and for broken tensors.
        """
        source = str(files.directory)
        sides: dict[tuple[str, bool], dict[int, Tensor]] = {}
        whole: dict[str, Tensor] = {}
        for key in peft_format.without_duplicates(files.tensors):
            name, tensor = key.removeprefix(peft_format.PREFIX), files.tensors[key]
            if not torch.isfinite(tensor).all():
                raise ValueError(f"the adapter in {source!r} is damaged; got NaN or infinity in {key!r}")
            place = _factor_place(name)
            if place is not None:
                module, embedding, side = place
                sides.setdefault((module, embedding), {})[side] = tensor
            elif ".lora_" in name:
                raise ValueError(_not_low_rank(source, key))
            else:
                whole[name.replace(_BASE_LAYER, ".")] = tensor
        # The ranks and alphas of PEFT's file, which are those of its tensors; our own may count otherwise.
        config = peft_format.from_peft(files.peft_config, files.tensors)
        factors = {}
        for (module, embedding), pair in sides.items():
            shapes = [tuple(tensor.shape) for tensor in pair.values()]
            if len(pair) != 2 or not pair[0].shape[0] == pair[1].shape[1] == config.rank_of(module):
                raise ValueError(
                    f"A and B of {module!r} in {source!r} are no low-rank product; got shapes {shapes}; expected "
                    f"rank {config.rank_of(module)}; a grouped convolution has no such product"
                )
            factors[module] = Factors(pair[0], pair[1], config.scaling_of(module), embedding)
        return cls(factors, whole)

    @property
    def lora_parameters(self) -> int:
        """The number of values in all factors."""
        return sum(entry.A.numel() + entry.B.numel() for entry in self.factors.values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of `adapter_model.safetensors`, under PEFT's keys: fp32 on the CPU, contiguous."""
        saved = {}
        for module, entry in self.factors.items():
            keys = _EMBEDDING_KEYS if entry.embedding else _LAYER_KEYS
            for key, tensor in zip(keys, (entry.A, entry.B), strict=True):
                saved[f"{peft_format.PREFIX}{module}.{key}"] = as_saved(tensor)
        for name, tensor in self.whole.items():
            is_bias = name.endswith(".bias")
            key = peft_format.bias_key(name, self.factors) if is_bias else peft_format.PREFIX + name
            saved[key] = as_saved(tensor)
        return saved

    def ranks_and_alphas(self) -> dict[str, Any]:
        """`r`, `lora_alpha`, `rank_pattern` and `alpha_pattern`: the commonest values, and the exceptions.

        alpha / r is the scaling of each module to the last bit wherever a double can be found for alpha.
        """
        ranks = {module: entry.rank for module, entry in self.factors.items()}
        alphas = {module: _alpha(entry.scaling, entry.rank) for module, entry in self.factors.items()}
        rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
        return {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {_exactly(module): value for module, value in ranks.items() if value != rank},
            "alpha_pattern": {_exactly(module): value for module, value in alphas.items() if value != alpha},
        }


class Contents(NamedTuple):
    """The contents of an adapter directory: tensors, `adapter_config.json`, sidecar (None: without one)."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    info: AdapterInfo | None


def contents(adapter: Adapter, sources: Sequence[AdapterFiles]) -> Contents:
    """What to write for an adapter that was computed from those in `sources`, which fit each other.

    Labels, task and base model are theirs; metrics are not, since they were measured on another adapter.
    """
    first = sources[0]
    config = {
        **first.peft_config,
        **adapter.ranks_and_alphas(),
        "peft_version": peft_format.PEFT_VERSION,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "modules_to_save": _modules_to_save(sources),
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
    """Write an adapter directory, whole or not at all; returns its path.

    copies: files to put beside, such as those of the tokenizer.
    """
    directory = Path(directory)
    with writing_adapter(directory, new.tensors, new.config, new.info) as folder:
        for path in copies:
            shutil.copyfile(path, folder / path.name)
    return directory


def _factor_place(name: str) -> tuple[str, bool, int] | None:
    """(module, whether it is an embedding, 0 for A or 1 for B) of a tensor's name; None for other tensors."""
    for embedding, keys in ((False, _LAYER_KEYS), (True, _EMBEDDING_KEYS)):
        for side, key in enumerate(keys):
            if name.endswith(f".{key}"):
                return name.removesuffix(f".{key}"), embedding, side
    return None


def _not_low_rank(source: str, key: str) -> str:
    kind = (
        "a DoRA adapter" if "lora_magnitude_vector" in key else "an adapter with other tensors than A and B"
    )
    return (
        f"{kind} cannot be resized or combined, since its update is no low-rank sum; got {key!r} in {source!r}; "
        "expected only A and B; merge it into the base model, and extract an adapter from the result"
    )


def _alpha(scaling: float, rank: int) -> float:
    """The alpha for which alpha / rank is `scaling`: rounding may make a neighbour of the product the one."""
    alpha = scaling * rank
    near = (alpha, nextafter(alpha, inf), nextafter(alpha, -inf))
    best = min(near, key=lambda value: abs(value / rank - scaling))
    return int(best) if best.is_integer() else best


def _commonest(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]


def _exactly(module: str) -> str:
    """PEFT's pattern for this module alone: without the anchor it would match any name that ends so."""
    return "^" + re.escape(module)


def _modules_to_save(sources: Sequence[AdapterFiles]) -> list[str] | None:
    names = {name for files in sources for name in files.peft_config.get("modules_to_save") or ()}
    return sorted(names) or None


def _info(infos: Sequence[AdapterInfo]) -> AdapterInfo | None:
    if not infos:
        return None
    first = infos[0]
    lengths = [info.max_length for info in infos]
    return replace(
        first,
        base_model=max((info.base_model for info in infos), key=lambda base: base.fingerprint is not None),
        projections=first.projections if len({info.projections for info in infos}) == 1 else None,
        # PEFT's file tells all of it: parts of fused weights, corrected starts and the like are multiplied out.
        lora=None,
        max_length=None if None in lengths else max(length for length in lengths if length),
        text_columns=first.text_columns if len({info.text_columns for info in infos}) == 1 else (),
        # Of several adapters' sum they would be those of another classifier.
        temperature=first.temperature if len(infos) == 1 else None,
        thresholds=first.thresholds if len(infos) == 1 else None,
        metrics={},
        hf_lora_version=__version__,
    )
