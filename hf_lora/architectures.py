"""Where the query, key, value and output projections live, for each model type. Data only.

A suffix is matched as a whole dotted suffix of a module's name inside `model.base_model`:
`attention.output.dense` is BERT's output projection, `output.dense` would also be its feed-forward layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_lora.registry import Registry

ROLES = "qkvo"
ROLE_NAMES = {"q": "query", "k": "key", "v": "value", "o": "output"}


@dataclass(frozen=True)
class Architecture:
    """The module suffixes of each role: `q`, `k`, `v` (the inputs of attention) and `o` (its output)."""

    q: tuple[str, ...]
    k: tuple[str, ...]
    v: tuple[str, ...]
    o: tuple[str, ...]

    def suffixes(self, role: str) -> tuple[str, ...]:
        """The suffixes of one role, a letter of `ROLES`."""
        return {"q": self.q, "k": self.k, "v": self.v, "o": self.o}[role]


ARCHITECTURES: Registry[str, Architecture] = Registry("model type")


def separate(parent: str, q: str, k: str, v: str, o: str) -> Architecture:
    """An architecture with one module each for q, k and v under `parent`, and o at its own suffix."""
    return Architecture(q=(f"{parent}.{q}",), k=(f"{parent}.{k}",), v=(f"{parent}.{v}",), o=(o,))


_BERT = separate("attention.self", "query", "key", "value", "attention.output.dense")

for _model_type in ("bert", "roberta", "xlm-roberta", "camembert", "electra"):
    ARCHITECTURES.register(_model_type, _BERT)
ARCHITECTURES.register("distilbert", separate("attention", "q_lin", "k_lin", "v_lin", "attention.out_lin"))
ARCHITECTURES.register("mpnet", separate("attention.attn", "q", "k", "v", "attention.attn.o"))
ARCHITECTURES.register("albert", separate("attention", "query", "key", "value", "attention.dense"))
ARCHITECTURES.register(
    "deberta-v2",
    separate("attention.self", "query_proj", "key_proj", "value_proj", "attention.output.dense"),
)
