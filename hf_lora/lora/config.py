"""LoRAConfig: what to adapt and how. Validated once, here; every field has an effect."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

from hf_lora._choices import Keywords, Registry, option, unknown
from hf_lora._files import is_number
from hf_lora._text import Budget, Pattern, PatternTable, shortened
from hf_lora.lora.architectures import ROLES

FACTORS = ("lora_A", "lora_B", "lora_magnitude")


@dataclass(frozen=True)
class Variant:
    """Which of a layer's factors are trained; the others are frozen or not there."""

    trained: tuple[str, ...]

    @property
    def magnitude(self) -> bool:
        """Whether the norms of the weight's rows are learned (DoRA)."""
        return "lora_magnitude" in self.trained


VARIANTS: Registry[str, Variant] = Registry("variant")
VARIANTS.register("lora", Variant(("lora_A", "lora_B")))
# Zhang et al. 2023, arXiv:2308.03303: A stays as it was drawn, so its inputs need not be kept.
VARIANTS.register("lora_fa", Variant(("lora_B",)))
VARIANTS.register("dora", Variant(FACTORS))

# The factor of B A for a rank and alpha (rsLoRA: Kalajdzievski 2023, arXiv:2312.03732).
SCALINGS: Registry[str, Callable[[int, float], float]] = Registry("scaling")
SCALINGS.register("standard", lambda rank, alpha: alpha / rank)
SCALINGS.register("rslora", lambda rank, alpha: alpha / math.sqrt(rank))

BIAS_MODES = ("none", "lora_only", "all")
FORMS = ("module", "parametrization")
# The entries of `initializers.INITIALIZERS`, whose module needs torch; a config is made without it.
INITS = ("kaiming", "gaussian", "normal", "orthogonal", "gradient", "pissa", "olora")


# What PEFT and flags call these fields.
OTHER_NAMES = {
    **{
        "r": "rank",
        "lora_rank": "rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "init_lora_weights": "init",
    },
    **{"layers_to_transform": "layers", "use_dora": "variant", "use_rslora": "scaling"},
}


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(Keywords):
    """What to adapt and how (Hu et al. 2021, arXiv:2106.09685). Raises ValueError for any value outside the help.

    A pattern of `rank_pattern` or `alpha_pattern` is a regular expression for the end of the dotted name, as in
    PEFT; the first that matches wins. The head is saved with the adapter even where it is not trained.
    """

    MEANT = OTHER_NAMES

    rank: int = option(
        8, help="Rank r of the updates B A; lora_rank 0: no LoRA, the adapter is a linear probe."
    )
    alpha: float = option(16.0, help="The updates are scaled by alpha / rank.")
    dropout: float = option(0.0, help="Dropout on the input of A.")
    projections: str = option("qkvo", help="Projections to adapt: any letters of qkvo.")
    target_modules: tuple[str, ...] | str | None = option(
        None, help="Modules to adapt by name instead: dotted suffixes, one regular expression, or all-linear."
    )
    layers: tuple[int, ...] | None = option(
        None, help="Blocks to adapt, from 0, or from the end when negative; default: all."
    )
    rank_pattern: Mapping[str, int] = option({}, help='Other ranks by module: {"layer.5.*": 16}.')
    alpha_pattern: Mapping[str, float] = option({}, help="Other alphas by module.")
    bias: str = option("none", help="Biases to train: none, lora_only (of the adapted layers) or all.")
    train_head: bool = option(True, help="Train the classification head.", flag="train_head")
    init: str = option(
        "kaiming",
        help="How A and B start: kaiming, gaussian, normal, orthogonal, pissa, olora, or gradient (A along the "
        "gradient of the training loss, before the first step; kaiming until then).",
        flag="",
    )
    variant: str = option(
        "lora",
        help="lora, dora (the norms of the weight's rows are learned too) or lora_fa (A is not trained).",
    )
    scaling: str = option("standard", help="standard (alpha / rank) or rslora (alpha / sqrt(rank)).")
    form: str = option(
        "module",
        help="module (the layer's forward adds the update: fast) or parametrization (the update is put into the "
        "weight; convolutions and bare parameters take this form either way).",
    )

    def __post_init__(self) -> None:
        _check_rank("rank", self.rank)
        _check_alpha("alpha", self.alpha)
        usable = is_number(self.dropout) and 0.0 <= self.dropout < 1.0
        _expect(usable, "dropout is not a probability", self.dropout, "0 <= dropout < 1")
        object.__setattr__(self, "projections", _checked_projections(self.projections))
        object.__setattr__(self, "target_modules", _checked_targets(self.target_modules))
        object.__setattr__(self, "layers", _checked_layers(self.layers))
        _check_patterns("rank_pattern", self.rank_pattern, _check_rank)
        _check_patterns("alpha_pattern", self.alpha_pattern, _check_alpha)
        assert self._patterns  # parsed, which finds those that cannot be used
        _expect(isinstance(self.train_head, bool), "train_head is no bool", self.train_head, "True or False")
        for what, value, known in (("bias mode", self.bias, BIAS_MODES), ("form", self.form, FORMS)):
            if value not in known:
                raise unknown(what, value, known)
        if self.init not in INITS:
            # Registered by the user, or unknown.
            import_module("hf_lora.lora.initializers").INITIALIZERS.get(self.init)
        VARIANTS.get(self.variant)
        SCALINGS.get(self.scaling)

    @cached_property
    def _patterns(self) -> tuple[PatternTable, PatternTable]:
        budget = Budget()
        tables = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        ranks, alphas = (PatternTable(what, values, budget) for what, values in tables.items())
        return ranks, alphas

    def rank_of(self, name: str) -> int:
        """The rank for the module called `name`."""
        return int(self._patterns[0].get(name, self.rank))

    def alpha_of(self, name: str) -> float:
        """The alpha for the module called `name`."""
        return float(self._patterns[1].get(name, self.alpha))

    def scaling_of(self, name: str) -> float:
        """What multiplies B A of the module called `name`: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return SCALINGS.get(self.scaling)(self.rank_of(name), self.alpha_of(name))

    def unused_patterns(self, names: Iterable[str]) -> list[str]:
        """The patterns of ranks and alphas that decide about none of the adapted modules `names`."""
        names = list(names)
        unused = []
        for patterns, table in zip((self.rank_pattern, self.alpha_pattern), self._patterns, strict=True):
            deciding = {table.first(name) for name in names}
            unused += [pattern for pattern in patterns if pattern not in deciding]
        return unused

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `LoRAConfig.from_dict` is the inverse."""
        values = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoRAConfig:
        """The config that `to_dict` wrote. Raises ValueError for an unknown key."""
        return cls(**values)


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether a PEFT pattern key applies to a module: the pattern must match the end of its dotted name."""
    return Pattern("the key", pattern).matches(name, end=True)


def _expect(usable: bool, what: str, got: object, expected: str) -> None:
    if not usable:
        raise ValueError(f"{what}; got {shortened(got)}; expected {expected}")


def _check_rank(what: str, rank: object) -> None:
    usable = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    _expect(usable, f"{what} is not a rank", rank, "a whole number of at least 1, such as 8")


def _check_alpha(what: str, alpha: Any) -> None:
    # More than single precision holds is no scaling.
    usable = is_number(alpha) and 0 < alpha <= 1e30
    _expect(usable, f"{what} is not usable", alpha, "a number above 0, such as 16")


def _check_patterns(what: str, patterns: Mapping[str, Any], check: Callable[[str, object], None]) -> None:
    _expect(isinstance(patterns, Mapping), f"{what} is no mapping", patterns, "{pattern: number}")
    for pattern, value in patterns.items():
        check(f"{what}[{shortened(pattern)}]", value)


def _checked_projections(projections: str) -> str:
    letters = "".join(map(str, projections)) if isinstance(projections, list | tuple | set) else projections
    usable = isinstance(letters, str) and bool(letters) and set(letters) <= set(ROLES)
    expected = f"letters of {ROLES!r}, such as 'qv'; for modules by name use target_modules"
    _expect(usable, "projections are not roles", projections, expected)
    return "".join(role for role in ROLES if role in letters)


def _checked_targets(targets: Sequence[str] | str | None) -> tuple[str, ...] | str | None:
    if isinstance(targets, str):
        Pattern("target_modules", targets)
    if targets is None or isinstance(targets, str):
        return targets
    names = tuple(targets) if isinstance(targets, Sequence | set | frozenset) else ()
    usable = bool(names) and all(isinstance(name, str) and name for name in names)
    expected = "names such as ['query', 'value'], a regular expression, or 'all-linear'"
    _expect(usable, "target_modules is not usable", targets, expected)
    return tuple(dict.fromkeys(names))


def _checked_layers(layers: Sequence[int] | None) -> tuple[int, ...] | None:
    if layers is None:
        return None
    numbers = (layers,) if isinstance(layers, int) else tuple(layers) if isinstance(layers, Sequence) else ()
    usable = bool(numbers) and all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    _expect(usable, "layers are not block numbers", layers, "such as [0, 1] or [-2, -1]")
    return tuple(dict.fromkeys(numbers))
