"""Adapters as values: from an adapter directory to its factors and whole tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, nextafter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_lora._text import shortened
from hf_lora.adapters import peft_format
from hf_lora.adapters.directory import AdapterFiles, write_files
from hf_lora.adapters.info import AdapterInfo
from hf_lora.adapters.peft_format import PREFIX
from hf_lora.lora.config import BIAS_MODES
from hf_lora.tasks.calibration import Calibration
from hf_lora.version import __version__


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

    def with_matrices(self, A: Tensor, B: Tensor) -> Factors:
        """Other factors with scaling 1, A `(rank, in)` and B `(out, rank)`, for the same module and in its dtype."""
        A = A.to(self.A.dtype).reshape(-1, *self.A.shape[1:]).contiguous()
        B = B.to(self.B.dtype).reshape(self.B.shape[0], -1, *self.B.shape[2:]).contiguous()
        return replace(self, A=A, B=B, scaling=1.0)


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
        sides: dict[tuple[str, bool], dict[str, Tensor]] = {}
        whole: dict[str, Tensor] = {}
        # safetensors gives the tensors in any order.
        for key in sorted(files.tensors):
            tensor, place = files.tensors[key], peft_format.factor_place(key)
            if not torch.isfinite(tensor).all():
                raise ValueError(f"the adapter in {source!r} is damaged; got NaN or infinity in {key!r}")
            if place is not None:
                module, side, embedding = place
                sides.setdefault((module, embedding), {})[side] = tensor
            elif ".lora_" in key:
                kind = "a DoRA adapter" if "lora_magnitude_vector" in key else "such an adapter"
                raise ValueError(
                    f"{kind} cannot be resized or combined, since its update is no low-rank sum; got {key!r} in "
                    f"{source!r}; expected only A and B; merge it into the base model, and extract an adapter from the "
                    "result"
                )
            else:
                whole[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = tensor
        # PEFT's ranks and alphas are those of the tensors; the sidecar's may differ, for parts of fused weights.
        config = peft_format.from_peft(files.peft_config, files.tensors)
        factors = {}
        for (module, embedding), pair in sides.items():
            rank = config.rank_of(module)
            check_pair(pair, module, source)
            if not pair["A"].shape[0] == pair["B"].shape[1] == rank:
                raise ValueError(
                    f"A and B of {module!r} in {source!r} are no low-rank product; got shapes "
                    f"{[tuple(tensor.shape) for tensor in pair.values()]}; expected rank {rank}; a grouped "
                    "convolution has no such product"
                )
            factors[module] = Factors(**pair, scaling=config.scaling_of(module), embedding=embedding)
        return cls(factors, whole)

    @property
    def lora_parameters(self) -> int:
        """The number of values in all factors."""
        return sum(entry.A.numel() + entry.B.numel() for entry in self.factors.values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of `adapter_model.safetensors`, by PEFT's keys: fp32 on the CPU, contiguous."""
        saved = {
            peft_format.factor_key(module, side, entry.embedding): getattr(entry, side)
            for module, entry in self.factors.items()
            for side in "AB"
        }
        saved |= {peft_format.bias_key(name, self.factors): tensor for name, tensor in self.whole.items()}
        return {key: peft_format.as_saved(tensor) for key, tensor in saved.items()}

    def ranks_and_alphas(self) -> dict[str, Any]:
        """`r`, `lora_alpha`, `rank_pattern` and `alpha_pattern`: the commonest values, and the exceptions.

        alpha / r is the scaling of each module to the last bit wherever a double can be found for alpha.
        """
        ranks = {module: entry.rank for module, entry in self.factors.items()}
        alphas = {}
        for module, entry in self.factors.items():
            # The product or, after rounding, one of its neighbours.
            alpha = entry.scaling * entry.rank
            near = (alpha, nextafter(alpha, inf), nextafter(alpha, -inf))
            errors = [abs(value / entry.rank - entry.scaling) for value in near]
            alphas[module] = peft_format.int_if_whole(near[errors.index(min(errors))])
        return peft_format.by_pattern(ranks, alphas, anchor="^")


def check_pair(pair: Mapping[str, Tensor], module: str, source: str) -> None:
    """Raises ValueError unless the sides "A" and "B" of a module are there, and are factors of a product.

    The A of a grouped convolution is there once for each group.
    """
    sizes = [tensor.shape for tensor in pair.values()]
    usable = pair.keys() == {"A", "B"} and min(map(len, sizes)) >= 2 and min(map(min, sizes)) >= 1
    if not usable or pair["A"].shape[0] % pair["B"].shape[1]:
        shapes = {side: tuple(tensor.shape) for side, tensor in sorted(pair.items())}
        raise ValueError(
            f"A and B of {shortened(module)} in {source!r} are no low-rank product; got shapes {shapes}; expected "
            "A (rank, in) and B (out, rank)"
        )


def write_adapter(directory: str | Path, adapter: Adapter, sources: Sequence[AdapterFiles]) -> Path:
    """Write the directory of an adapter that was computed from those in `sources`, which fit each other.

    Labels, task, base model and the first one's tokenizer are taken over. Metrics are not: they were measured with
    another adapter. All files appear or none. Returns the directory's path.
    """
    first = sources[0]
    saved = {name for files in sources for name in files.peft_config.get("modules_to_save") or ()}
    config = {
        **first.peft_config,
        **peft_format.WRITTEN,
        **adapter.ranks_and_alphas(),
        "use_rslora": False,
        "modules_to_save": sorted(saved) or None,
        "bias": max((files.config.bias for files in sources), key=BIAS_MODES.index),
    }
    if set(Adapter.from_files(first).factors) != set(adapter.factors):
        config |= {**peft_format.NO_OTHER_TARGETS, "target_modules": sorted(adapter.factors)}
    info = _info([files.info for files in sources if files.info])
    return write_files(directory, adapter.tensors(), config, info, files=first.tokenizer)


def _info(infos: Sequence[AdapterInfo]) -> AdapterInfo | None:
    if not infos:
        return None
    first, lengths = infos[0], [info.max_length for info in infos]
    return replace(
        # The sum of several adapters is another classifier: it has to be calibrated anew.
        first if len(infos) == 1 else first.calibrated(Calibration()),
        base_model=max((info.base_model for info in infos), key=lambda base: base.fingerprint is not None),
        projections=first.projections if len({info.projections for info in infos}) == 1 else None,
        # PEFT's file has all of it: parts of fused weights and subtracted starts are multiplied out.
        lora=None,
        max_length=None if None in lengths else max(length for length in lengths if length),
        text_columns=first.text_columns if len({info.text_columns for info in infos}) == 1 else (),
        metrics={},
        hf_lora_version=__version__,
    )
