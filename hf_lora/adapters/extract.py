"""An adapter extracted from a fully fine-tuned model: the low-rank part of its change, and an account of the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_lora.adapters.arithmetic import Truncation, balanced, check_budget
from hf_lora.adapters.info import AdapterInfo, BaseModel
from hf_lora.adapters.loading import load_tensors
from hf_lora.adapters.peft_format import from_peft
from hf_lora.adapters.values import Adapter, Factors
from hf_lora.lora.config import LoRAConfig
from hf_lora.lora.head import belongs_to, find_head, fresh_modules
from hf_lora.lora.inject import inject_lora, injection
from hf_lora.lora.targets import ALL_LINEAR, find_targets
from hf_lora.models._transformers_private import commit_of, optional_file
from hf_lora.models.bundled import resolve_base
from hf_lora.models.loading import labels_of, load_base, load_config, load_tokenizer
from hf_lora.tasks import task_of

# A randomized SVD is faster for matrices whose smaller side is at least the first number, and at least `rank` times the
# second.
_LARGE, _RANKS_WITHIN = 256, 8
_OVERSAMPLING, _POWER_ITERATIONS = 16, 6


@dataclass(frozen=True)
class Change:
    """The change of a tensor: the Frobenius norms of tuned - base (`moved`) and of base (`size`)."""

    moved: float
    size: float

    @property
    def relative(self) -> float:
        """The norm of the change over that of the base; 1 if the base is zero and changed."""
        return self.moved / self.size if self.size else float(self.moved > 0.0)


@dataclass(frozen=True)
class Extraction:
    """An extracted adapter, and which changes it holds.

    modules_to_save: the modules that are whole in `adapter.whole`: head and LayerNorms.
    bias: PEFT's mode, "all" if `adapter.whole` has the biases, else "none".
    truncations: the loss by the rank, by module; `old_rank` is the smaller side of the weight.
    covered, carried, left_out: the changes of the weights that the factors approximate, by module; and by name of the
        tensors outside the head that are kept exactly, and of those for which the adapter has no place.
    """

    adapter: Adapter
    modules_to_save: tuple[str, ...]
    bias: str
    truncations: Mapping[str, Truncation]
    covered: Mapping[str, Change]
    carried: Mapping[str, Change]
    left_out: Mapping[str, Change]

    @property
    def kept_energy(self) -> float:
        """The share of the squared norms of all changes outside the head that is in the adapter."""
        kept = sum(
            self.covered[name].moved ** 2 * entry.kept_energy for name, entry in self.truncations.items()
        )
        kept += sum(change.moved**2 for change in self.carried.values())
        groups = (self.covered, self.carried, self.left_out)
        total = sum(change.moved**2 for group in groups for change in group.values())
        return kept / total if total else 1.0


@dataclass(frozen=True)
class Finetuned:
    """A fully fine-tuned classifier, its tokenizer, and `model`: its base with the extracted adapter in it."""

    checkpoint: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    extraction: Extraction
    info: AdapterInfo


def extract_finetuned(
    base: str,
    finetuned: str,
    *,
    revision: str | None = None,
    finetuned_revision: str | None = None,
    projections: str | None = None,
    dtype: torch.dtype | None = None,
    hub: Mapping[str, Any] | None = None,
    **budget: Any,
) -> Finetuned:
    """Load a fully fine-tuned classifier and its base model, and extract the adapter between them.

    base, finetuned: Hub ids or directories; revision, finetuned_revision: theirs.
    projections: as in `linear_modules`. budget: rank, energy and keep_vectors of `extract_adapter`.
    dtype: of both; None: as they are stored. hub: options of `from_pretrained` for both, such as token.
    A checkpoint without a tokenizer was trained with its base's.
    Raises ValueError or OSError if one of them cannot be loaded, or if they do not belong together.
    """
    check_budget(budget.get("rank"), budget.get("energy"))
    of_base = {**(hub or {}), "revision": revision}
    of_tuned = {**(hub or {}), "revision": finetuned_revision}
    tuned, labels, problem_type = _load_finetuned(finetuned, dtype, of_tuned)
    model, missing = load_base(base, labels, problem_type=problem_type, dtype=dtype, **of_base)
    if model.config.model_type != tuned.config.model_type:
        raise ValueError(
            f"the fine-tuned model is not one of this base; got a {tuned.config.model_type} in "
            f"{finetuned!r}; expected a {model.config.model_type} as {base!r}"
        )
    head = (*find_head(model), *fresh_modules(model, missing))
    extraction = extract_adapter(
        dict(model.named_parameters()),
        dict(tuned.named_parameters()),
        modules=linear_modules(model, projections=projections, head=head),
        head=head,
        **budget,
    )
    base_model = BaseModel(base, revision or commit_of(model.config))
    info = AdapterInfo(labels, problem_type, base_model=base_model, projections=projections)
    inject_extraction(model, extraction, info)
    own = optional_file(resolve_base(finetuned, **of_tuned), "tokenizer_config.json", **of_tuned)
    source, options = (base, of_base) if own is None else (finetuned, of_tuned)
    return Finetuned(tuned, load_tokenizer(source, **options), model, extraction, info)


def _load_finetuned(
    name: str, dtype: torch.dtype | None, hub: Mapping[str, Any]
) -> tuple[PreTrainedModel, tuple[str, ...], str]:
    """A fine-tuned classifier, its labels in order, and its problem type."""
    labels = labels_of(name, **hub)
    problem_type = task_of(load_config(name, **hub).problem_type, len(labels)).name
    model, missing = load_base(name, labels, problem_type=problem_type, dtype=dtype, **hub)
    if missing:
        raise ValueError(
            f"{name!r} is no fine-tuned classifier; it has no weights for {sorted(missing)[0]!r}; "
            "expected a checkpoint with its classification head"
        )
    return model, labels, problem_type


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
    """The adapter that approximately turns the parameters of a base model into those of its fine-tuned copy.

    modules: dotted names of linear layers, weights `(out, in)`. Their changes are approximated at `rank` or at the
        smallest rank that keeps `energy`; exactly one of the two is given, as in `arithmetic.resize`.
    head: dotted names of modules taken whole from `tuned_tensors`; the base need not have them.
    keep_vectors: keep changed tensors of one dimension exactly. PEFT's format allows this for LayerNorms as whole
        modules, and for all biases together.
    Raises ValueError if names or shapes outside the head differ, or for an unusable module, rank or energy.
    """
    check_budget(rank, energy)
    modules, head = tuple(modules), tuple(head)
    changes = _changes(base_tensors, tuned_tensors, head)
    weights = {module: f"{module}.weight" for module in modules}
    unusable = [m for m, name in weights.items() if name not in changes or base_tensors[name].ndim != 2]
    if unusable or not modules:
        raise ValueError(
            f"modules cannot be extracted; got {unusable or 'none'}; expected linear layers outside the head"
        )
    changed = {name: change for name, change in changes.items() if change.moved > 0.0}
    norms, bias = _places(base_tensors, changed) if keep_vectors else ((), "none")
    to_save = (*head, *norms)
    factors, truncations = {}, {}
    for module, name in weights.items():
        delta = tuned_tensors[name].detach().float() - base_tensors[name].detach().float()
        A, B, truncations[module] = _low_rank(delta, changes[name].moved, rank, energy)
        factors[module] = Factors(A, B, scaling=1.0)
    whole = {
        name: tensor.detach().float()
        for name, tensor in tuned_tensors.items()
        if belongs_to(name, to_save) or (bias == "all" and _is_bias(name))
    }
    rest = {name: change for name, change in changed.items() if name not in weights.values()}
    return Extraction(
        adapter=Adapter(factors, whole),
        modules_to_save=to_save,
        bias=bias,
        truncations=truncations,
        covered={module: changes[name] for module, name in weights.items()},
        carried={name: change for name, change in rest.items() if name in whole},
        left_out={name: change for name, change in rest.items() if name not in whole},
    )


def linear_modules(
    model: nn.Module, *, projections: str | None = None, head: Iterable[str] | None = None
) -> list[str]:
    """The dotted names of the linear layers outside the head, or only of those in the roles of `projections`.

    A fused weight counts as a whole. Raises ValueError for a role in another kind of layer.
    """
    head = find_head(model) if head is None else tuple(head)
    config = LoRAConfig(target_modules=ALL_LINEAR)
    if projections is not None:
        config = LoRAConfig(projections=projections)
    targets = find_targets(model, config, head)
    modules = {target.name: model.get_submodule(target.module) for target in targets}
    linear = [target.name for target in targets if isinstance(modules[target.name], nn.Linear)]
    other = [name for name in modules if name not in linear]
    if other and projections is not None:
        raise ValueError(
            f"projections={projections!r} cannot be extracted; got {other[0]!r}; expected linear layers"
        )
    return linear


def inject_extraction(model: nn.Module, extraction: Extraction, info: AdapterInfo | None = None) -> None:
    """Put an extracted adapter into the base model, for use and for `save_adapter`.

    Raises ValueError if the model is adapted already, or if the adapter does not fit it.
    """
    adapter, tensors = extraction.adapter, extraction.adapter.tensors()
    values = {"peft_type": "LORA", "bias": extraction.bias, **adapter.ranks_and_alphas()}
    config = replace(from_peft(values, tensors), target_modules=tuple(adapter.factors))
    inject_lora(model, config, head=extraction.modules_to_save)
    load_tensors(model, tensors, source="the extracted adapter")
    injection(model).info = info


def _changes(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], head: tuple[str, ...]
) -> dict[str, Change]:
    """The changes of the tensors outside the head; both sides must have them in the same shape."""
    changes = {}
    for name in dict.fromkeys((*base, *tuned)):
        if belongs_to(name, head):
            continue
        shapes = [tuple(side[name].shape) if name in side else "none" for side in (base, tuned)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the fine-tuned model is not one of this base; {name!r} has shape {shapes[1]}; expected {shapes[0]}"
            )
        before, after = (side[name].detach().double() for side in (base, tuned))
        changes[name] = Change((after - before).norm().item(), before.norm().item())
    return changes


def _places(base: Mapping[str, Tensor], changed: Iterable[str]) -> tuple[tuple[str, ...], str]:
    """Where PEFT can keep changed vectors: modules that have only vectors, and the mode of all other biases."""
    matrices = {name.rpartition(".")[0] for name, tensor in base.items() if tensor.ndim != 1}
    modules = dict.fromkeys(name.rpartition(".")[0] for name in changed)
    norms = tuple(module for module in modules if module and module not in matrices)
    biases = any(_is_bias(name) and not belongs_to(name, norms) for name in changed)
    return norms, "all" if biases else "none"


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"


def _low_rank(
    delta: Tensor, size: float, rank: int | None, energy: float | None
) -> tuple[Tensor, Tensor, Truncation]:
    """A `(k, in)` and B `(out, k)`: B A approximates `delta` `(out, in)`, whose Frobenius norm is `size`."""
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
