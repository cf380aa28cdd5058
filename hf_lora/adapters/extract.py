"""An adapter from a full fine-tuning: the low-rank part of what it changed, and an account of the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_lora.adapters.arithmetic import Truncation, balanced, check_budget
from hf_lora.adapters.info import AdapterInfo
from hf_lora.adapters.peft_format import load_tensors
from hf_lora.adapters.values import Adapter, Factors
from hf_lora.lora.config import LoRAConfig
from hf_lora.lora.head import belongs_to, find_head
from hf_lora.lora.inject import inject_lora, injection
from hf_lora.lora.targets import find_targets

# From here on a randomized SVD is worth it: the smaller side of the matrix, and how many ranks go into it.
_LARGE, _RANKS_WITHIN = 256, 8
_OVERSAMPLING, _POWER_ITERATIONS = 16, 6


@dataclass(frozen=True)
class Change:
    """How far a tensor moved: the Frobenius norms of tuned - base and of base."""

    moved: float
    size: float

    @property
    def relative(self) -> float:
        """The norm of the change over that of the base; 1 for a change of nothing but zeros."""
        return self.moved / self.size if self.size else float(self.moved > 0.0)


@dataclass(frozen=True)
class Extraction:
    """An extracted adapter and what it covers.

    modules_to_save: the modules that `adapter.whole` brings with all their tensors: head and LayerNorms.
    bias: PEFT's mode, "all" if `adapter.whole` brings the biases, else "none".
    truncations: what the rank cost, by module. `old_rank` is the smaller side of the weight.
    covered: how far the weights moved whose change the factors approximate, by module.
    carried: how far the tensors outside the head moved that are kept exactly, by name.
    left_out: how far the changed tensors moved that the adapter has no place for, by name.
    """

    adapter: Adapter
    modules_to_save: tuple[str, ...]
    bias: str
    truncations: Mapping[str, Truncation]
    covered: Mapping[str, Change]
    carried: Mapping[str, Change]
    left_out: Mapping[str, Change]


def extract_adapter(
    base_tensors: Mapping[str, Tensor],
    tuned_tensors: Mapping[str, Tensor],
    *,
    modules: Iterable[str],
    rank: int | None = None,
    energy: float | None = None,
    head: Iterable[str] = (),
    keep_vectors: bool = True,
) -> Extraction:
    """The adapter that turns the parameters of a base model into those of its fine-tuned copy, approximately.

    modules: dotted names of linear layers, weights `(out, in)`; each change is approximated at `rank` or,
        exactly one of the two, at the smallest rank that keeps `energy` (as in `arithmetic.resize`).
    head: dotted names of modules taken whole from `tuned_tensors`; the base need not have them.
    keep_vectors: carry changed tensors of one dimension exactly, LayerNorms as whole modules and biases all
        together, since PEFT has no other place for them.
    Raises ValueError if names or shapes outside the head differ, or for an unusable module, rank or energy.
    """
    check_budget(rank, energy)
    modules, head = tuple(modules), tuple(head)
    outside = _common(base_tensors, tuned_tensors, head)
    unusable = [name for name in modules if getattr(outside.get(f"{name}.weight"), "ndim", 0) != 2]
    if unusable or not modules:
        raise ValueError(
            f"modules cannot be extracted; got {unusable or 'none'}; expected linear layers outside the head"
        )
    changes = {name: _change(base_tensors[name], tuned_tensors[name]) for name in outside}
    changed = {name for name, change in changes.items() if change.moved > 0.0}
    norms, bias = _places(outside, changed) if keep_vectors else ((), "none")
    to_save = (*head, *norms)
    factors, truncations = {}, {}
    for module in modules:
        weight = f"{module}.weight"
        delta = tuned_tensors[weight].detach().float() - base_tensors[weight].detach().float()
        A, B, truncations[module] = _low_rank(delta, changes[weight].moved, rank, energy)
        factors[module] = Factors(A, B, scaling=1.0)
    is_bias = {name for name in outside if bias == "all" and name.rpartition(".")[2] == "bias"}
    whole = {
        n: t.detach().float() for n, t in tuned_tensors.items() if belongs_to(n, to_save) or n in is_bias
    }
    weights = {f"{module}.weight" for module in modules}
    rest = [name for name in outside if name in changed and name not in weights]
    return Extraction(
        adapter=Adapter(factors, whole),
        modules_to_save=to_save,
        bias=bias,
        truncations=truncations,
        covered={module: changes[f"{module}.weight"] for module in modules},
        carried={name: changes[name] for name in rest if name in whole},
        left_out={name: changes[name] for name in rest if name not in whole},
    )


def linear_modules(
    model: nn.Module, *, projections: str | None = None, head: Iterable[str] | None = None
) -> list[str]:
    """The linear layers outside the head, or only those in the roles of `projections`, by dotted name.

    A fused weight comes whole with any of its roles. Raises ValueError for a role in another kind of layer.
    """
    head = find_head(model) if head is None else tuple(head)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if projections is None:
        return [name for name, _ in model.named_modules() if name in linear and not belongs_to(name, head)]
    names = [target.name for target in find_targets(model, LoRAConfig(projections=projections), head)]
    other = [name for name in names if name not in linear]
    if other:
        raise ValueError(
            f"projections={projections!r} cannot be extracted; got {other[0]!r}; expected linear layers"
        )
    return names


def inject_extraction(model: nn.Module, extraction: Extraction, info: AdapterInfo | None = None) -> None:
    """Put an extracted adapter into the base model, as `load_adapter` would, so that it can be used and saved.

    Raises ValueError if the model is adapted already or is another one.
    """
    sizes = extraction.adapter.ranks_and_alphas()
    config = LoRAConfig(
        rank=sizes["r"],
        alpha=sizes["lora_alpha"],
        rank_pattern=sizes["rank_pattern"],
        alpha_pattern=sizes["alpha_pattern"],
        target_modules=tuple(extraction.adapter.factors),
        bias=extraction.bias,
    )
    inject_lora(model, config, head=extraction.modules_to_save)
    load_tensors(model, extraction.adapter.tensors(), source="the extracted adapter")
    injection(model).info = info


def _common(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], head: tuple[str, ...]
) -> dict[str, Tensor]:
    """The base's tensors outside the head, which both must have in the same shape."""
    sides = [
        {name: tensor for name, tensor in tensors.items() if not belongs_to(name, head)}
        for tensors in (base, tuned)
    ]
    for name in sorted({*sides[0], *sides[1]}):
        shapes = [tuple(side[name].shape) if name in side else "none" for side in sides]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the fine-tuned model is not one of this base; {name!r} has shape {shapes[1]}; expected {shapes[0]}"
            )
    return sides[0]


def _change(base: Tensor, tuned: Tensor) -> Change:
    base = base.detach().double()
    return Change((tuned.detach().double() - base).norm().item(), base.norm().item())


def _places(tensors: Mapping[str, Tensor], changed: set[str]) -> tuple[tuple[str, ...], str]:
    """Where PEFT can keep changed vectors: modules of nothing but vectors, whole; all other biases at once."""
    by_module: dict[str, list[str]] = {}
    for name in tensors:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    norms = tuple(
        module
        for module, names in by_module.items()
        if module and changed.intersection(names) and all(tensors[name].ndim == 1 for name in names)
    )
    biases = {name for name in changed if name.rpartition(".")[2] == "bias" and not belongs_to(name, norms)}
    return norms, "all" if biases else "none"


def _low_rank(
    delta: Tensor, size: float, rank: int | None, energy: float | None
) -> tuple[Tensor, Tensor, Truncation]:
    """A `(k, in)` and B `(out, k)` with B A near `delta` `(out, in)`, whose Frobenius norm is `size`."""
    side = min(delta.shape)
    if rank is not None and side >= _LARGE and rank * _RANKS_WITHIN <= side:
        # The sketch is random; its seed is fixed so that the same models give the same adapter.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(delta, q=rank + _OVERSAMPLING, niter=_POWER_ITERATIONS)
        Vh = V.mT
    else:
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    total = size**2 if len(S) < side else S.double().square().cumsum(0)[-1].item()
    A, B, truncation = balanced(U, S, Vh, total=total, rank=rank, energy=energy)
    return A.contiguous(), B.contiguous(), replace(truncation, old_rank=side)
