"""Several adapters in one batch give what each gives alone, for every model type of the table whose weights stack."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pytest
import torch
from tiny_models import EOS, LENGTH, PAD, ROWS, TEXT, tiny_inputs, tiny_model
from torch import Tensor, nn

from hf_lora import LoRAConfig, inject_lora, lora_disabled
from hf_lora.lora.architectures import ARCHITECTURES, ROLES
from hf_lora.models.pooling import NATIVE, POOLINGS, PooledClassifier
from hf_lora.stacks.contents import contents_of
from hf_lora.stacks.model import StackedModel

TOLERANCE = 1e-5
# By name: the number of labels, the kind of head, and options of LoRA; without targets every role is adapted.
ADAPTERS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "plain": (3, NATIVE, {"alpha": 3}),
    "values": (5, NATIVE, {"rank": 5, "projections": "v", "scaling": "rslora"}),
    "dora": (2, NATIVE, {"rank": 3, "variant": "dora", "bias": "all"}),
    "pissa": (4, NATIVE, {"init": "pissa"}),
    "last_block": (3, NATIVE, {"bias": "lora_only", "layers": (-1,)}),
    "all_linear": (2, NATIVE, {"target_modules": "all-linear", "rank": 1}),
    "mean": (3, "mean", {}),
    "cls": (2, "cls", {"variant": "dora"}),
    "mean_layers": (6, "mean_layers", {"bias": "all"}),
}
OF_ROLES = tuple(name for name in ADAPTERS if name != "all_linear")
NOT_LINEAR, NOT_BY_SEQUENCE = (
    "updates of other weights than linear layers",
    "do not map sequences to sequences",
)
# The adapters that are refused, by model type: the reason, and the name of the first module that cannot be stacked.
REFUSED: dict[str, dict[str, tuple[str, str]]] = {
    # Its QuantLinear is no nn.Linear.
    "ibert": dict.fromkeys(OF_ROLES, (NOT_LINEAR, "attention.self")),
    # Convolutions, and bare parameters; both have linear layers besides.
    "squeezebert": dict.fromkeys(OF_ROLES, (NOT_LINEAR, "attention.")),
    "xlnet": dict.fromkeys(OF_ROLES, (NOT_LINEAR, "rel_attn.")),
    # Projections of relative positions, which have no sequences. DeBERTa-v2 has them in common with queries and keys.
    "deberta": dict.fromkeys(("dora", "all_linear", "mean_layers"), (NOT_BY_SEQUENCE, "attention.self.pos_")),
    "deberta-v2": dict.fromkeys(
        [name for name in ADAPTERS if name != "values"], (NOT_BY_SEQUENCE, "attention.self.query_proj")
    ),
    # Routers that return the experts with their weights.
    "phimoe": {"all_linear": (NOT_BY_SEQUENCE, "mlp.router")},
    "gpt_oss": {"dora": (NOT_BY_SEQUENCE, "mlp.router")},
}
# Tokens first, and a projection without sequences.
FAST = {"longformer", "deberta-v2"}
STACKED = [name for name in TEXT if ARCHITECTURES.get(name).reason is None]


def classifier(model_type: str, labels: int, kind: str, encoder: nn.Module | None = None) -> Any:
    """A plain classifier; encoder: one with the weights that it gets."""
    model = tiny_model(model_type, labels)
    if kind != NATIVE:
        model = PooledClassifier(model, kind).eval()
    if encoder is not None:
        own = model.base_model.state_dict()
        model.base_model.load_state_dict({name: encoder.state_dict()[name] for name in own})
    return model


def inputs_of(model_type: str, rows: int) -> dict[str, Tensor]:
    """Random inputs of several lengths, padded to one."""
    given = {name: value for name, value in tiny_inputs(model_type).items() if name != "labels"}
    inputs = {name: value[torch.arange(rows) % ROWS] for name, value in given.items()}
    lengths = LENGTH - torch.arange(rows) * 5 % 8
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    ids = torch.randint(5, 60, mask.shape, generator=torch.Generator().manual_seed(rows))
    ids[mask == 0] = PAD
    ids[torch.arange(rows), lengths - 1] = EOS
    return {**inputs, "input_ids": ids, "attention_mask": mask}


@dataclass
class Case:
    """Adapters of one model type in a stacked model, and alone."""

    model_type: str
    stacked: StackedModel = field(init=False)
    slots: dict[str, int] = field(default_factory=dict)
    alone: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.probe = inputs_of(self.model_type, 7)
        self.plain = classifier(self.model_type, 2, NATIVE)
        self.stacked = StackedModel(copy.deepcopy(self.plain), self.probe)
        for name, (labels, kind, _) in ADAPTERS.items():
            model = self.adapted(name)
            if model is None:
                continue
            try:
                contents = contents_of(model)
                if kind not in self.stacked.heads:
                    plain = classifier(self.model_type, labels, kind, self.plain.base_model)
                    self.stacked.add_kind(kind, plain, self.probe)
                self.stacked.check(contents)
            except ValueError as error:
                self.refused[name] = str(error)
                continue
            self.alone[name], self.slots[name] = model, len(self.slots) + 1
            self.stacked.reserve(self.slots[name])
            self.stacked.put(self.slots[name], kind, contents)

    def adapted(self, name: str) -> Any:
        """An adapter far from its start; None where its kind of head, or its target, is not for the model type."""
        labels, kind, options = ADAPTERS[name]
        roles = "".join(role for role in ROLES if ARCHITECTURES.get(self.model_type).projections(role))
        targets = {} if "target_modules" in options else {"projections": roles}
        if kind != NATIVE and not self.pools(kind):
            return None
        model = classifier(self.model_type, labels, kind, self.plain.base_model)
        if self.model_type == "ibert" and name == "all_linear":
            return None  # it has no linear layer
        inject_lora(model, LoRAConfig(**{"rank": 2, **targets, **options}))
        model(**self.probe).logits.square().sum().backward()
        generator = torch.Generator().manual_seed(len(name))
        for parameter in model.parameters():
            # What gets no gradient stays where it is, as in training.
            if parameter.grad is not None and parameter.grad.any():
                parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return model

    def pools(self, kind: str) -> bool:
        """Whether the states of this encoder can be pooled."""
        try:
            classifier(self.model_type, 2, kind)(**self.probe)
        except (AttributeError, TypeError, ValueError):
            return False
        return True

    @torch.no_grad()
    def check(self, names: list[str], *, enabled: bool) -> None:
        """Compare a batch, each of its sequences with an adapter, with each adapter alone on the same sequences."""
        names = sorted(names, key=lambda name: (ADAPTERS[name][1], self.slots[name]))
        inputs = inputs_of(self.model_type, len(names))
        rows: dict[int, Tensor] = {}
        for part, logits in self.stacked(inputs, [self.slots[name] for name in names], enabled=enabled):
            rows.update(zip(range(part.start, part.stop), logits, strict=True))
        assert rows.keys() == set(range(len(names)))
        start = 0
        for name, group in groupby(names):
            own = slice(start, start + len(list(group)))
            with nullcontext() if enabled else lora_disabled(self.alone[name]):
                expected = self.alone[name](**inputs).logits[own]
            got = torch.stack([rows[row][: expected.shape[1]] for row in range(own.start, own.stop)])
            error = (got - expected).abs().max() / max(1.0, float(expected.abs().max()))
            assert error <= TOLERANCE, f"{name} in {names}, enabled: {enabled}: {error:.1e}"
            start = own.stop

    def batches(self) -> Iterator[list[str]]:
        """One adapter on a few sequences, and on many, where it is merged; all of them, and half of them."""
        for name in self.alone:
            yield from ([name] * count for count in (1, 2, 12))
        if len(self.alone) > 1:
            yield list(self.alone) * 2
            yield [*list(self.alone)[::2], *list(self.alone)[:1]]


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in STACKED],
)
def test_adapters_in_one_batch_give_what_each_gives_alone(model_type: str) -> None:
    case = Case(model_type)
    expected = REFUSED.get(model_type, {})
    assert case.refused.keys() <= expected.keys(), case.refused
    assert case.alone.keys().isdisjoint(expected)
    for name, error in case.refused.items():
        reason, module = expected[name]
        assert reason in error and module in error and "\n" not in error
    for names in case.batches():
        for enabled in (True, False):
            case.check(names, enabled=enabled)


@pytest.mark.slow
def test_the_table_of_refusals_has_no_adapter_that_is_never_made() -> None:
    for model_type, expected in REFUSED.items():
        made = {name for name in expected if ADAPTERS[name][1] == NATIVE}
        assert made <= Case(model_type).refused.keys(), model_type


def test_every_kind_of_head_is_tested() -> None:
    assert {kind for _, kind, _ in ADAPTERS.values()} == {NATIVE, *POOLINGS}
