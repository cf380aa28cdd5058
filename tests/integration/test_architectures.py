"""What must hold for every model type of the table: an entry with a tiny configuration is tested with no new code."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from torch import Tensor, nn

from hf_lora import (
    LoRAConfig,
    head_parameters,
    inject_lora,
    load_adapter,
    lora_disabled,
    lora_layers,
    lora_parameters,
    merge_lora,
    save_adapter,
)
from hf_lora.lora.architectures import ARCHITECTURES, ROLES
from hf_lora.lora.inject import injection
from hf_lora.lora.targets import block_of, find_targets
from hf_lora.models.loading import cast_frozen
from hf_lora.models.verify import verify_injection

TOLERANCE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
# bf16 rounds to 0.4 %, and a few layers of it add up.
HALF_TOLERANCE = 0.06


class NotApplicable(Exception):
    """A check that has no meaning for a model type, with the reason."""


@dataclass
class Case:
    """A tiny random model of one type, adapted at every role it has, with all factors random."""

    model_type: str
    roles: str = field(init=False)
    inputs: dict[str, Any] = field(init=False)
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.roles = "".join(role for role in ROLES if ARCHITECTURES.get(self.model_type).projections(role))
        self.inputs = tiny_inputs(self.model_type)
        self.model = self.plain()
        inject_lora(self.model, self.config())
        generator = torch.Generator().manual_seed(2)
        for parameter in lora_parameters(self.model).values():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))

    def config(self) -> LoRAConfig:
        """Rank 2 with a scaling that is not 1, on every role."""
        return LoRAConfig(rank=2, alpha=3, projections=self.roles)

    def plain(self) -> nn.Module:
        """The same model without LoRA."""
        return tiny_model(self.model_type)

    def logits(self, model: nn.Module) -> Tensor:
        """The outputs of a model on the case's inputs."""
        return model(**self.inputs).logits

    def unused(self) -> tuple[str, ...]:
        """The adapted modules whose pretrained output the classifier does not read. Raises for a dead adapter."""
        return verify_injection(self.model, self.inputs, allow_unused=True).unused


def check_identity(case: Case) -> None:
    """An injected model computes what the pretrained one does."""
    model = case.plain()
    before = case.logits(model)
    inject_lora(model, case.config())
    torch.testing.assert_close(case.logits(model), before, atol=1e-6, rtol=1e-6)


def check_roles(case: Case) -> None:
    """Every role is found in every block that has an attention."""
    model = case.plain()
    blocks = {
        role: {block_of(t.name) for t in find_targets(model, LoRAConfig(projections=role))}
        for role in case.roles
    }
    assert blocks and all(blocks.values())
    assert len({frozenset(found) for found in blocks.values()}) == 1, blocks


def check_probe(case: Case) -> None:
    """Every adapter has an effect on the output and gets a gradient, but for what the last block leaves unread."""
    unused = case.unused()
    last = max(block_of(name) or 0 for name in lora_layers(case.model))
    assert all(block_of(name) == last for name in unused), unused


def check_merge(case: Case) -> None:
    """Merged, the model computes the same."""
    model = copy.deepcopy(case.model)
    merge_lora(model)
    torch.testing.assert_close(case.logits(model), case.logits(case.model), **TOLERANCE)


def check_half(case: Case) -> None:
    """Merged and then cast to bf16 with an fp32 head, the model computes nearly the same, disabled too."""
    model = copy.deepcopy(case.model)
    merge_lora(model)
    cast_frozen(model, torch.bfloat16)
    inputs = {
        name: value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in case.inputs.items()
    }
    for disabled in (False, True):
        off = lora_disabled if disabled else nullcontext
        with torch.no_grad(), off(model), off(case.model):
            given, expected = model(**inputs).logits, case.logits(case.model)
        assert given.dtype == torch.float32, given.dtype
        error = torch.linalg.vector_norm(given - expected) / torch.linalg.vector_norm(expected)
        assert error < HALF_TOLERANCE, f"relative error {error:.3f}, disabled: {disabled}"


def check_gradients(case: Case) -> None:
    """Only adapters and head get gradients, and every adapter that takes part in the output does."""
    model = copy.deepcopy(case.model)
    model(**case.inputs).loss.backward()
    allowed = {id(p) for p in (*lora_parameters(model).values(), *head_parameters(model).values())}
    got = {id(parameter) for parameter in model.parameters() if parameter.grad is not None}
    assert got <= allowed
    used = [layer for name, layer in lora_layers(model).items() if name not in case.unused()]
    assert {id(p) for layer in used for p in layer.trained_factors().values()} <= got


def check_reload(case: Case) -> None:
    """Saved and loaded, the model computes exactly the same."""
    with TemporaryDirectory() as folder:
        model = case.plain()
        load_adapter(model, save_adapter(case.model, Path(folder) / "a"))
    torch.testing.assert_close(case.logits(model), case.logits(case.model), atol=1e-6, rtol=1e-6)


def check_peft(case: Case) -> None:
    """peft with the same factors computes the same logits and the same gradients."""
    theirs = _in_peft(case)
    base = theirs.base_model.model
    bypassed = [t.name for t in injection(case.model).targets if t.bypassed]
    if bypassed:
        merged = theirs.merge_and_unload()
        torch.testing.assert_close(case.logits(merged), case.logits(case.model), **TOLERANCE)
        raise NotApplicable(f"merged only: peft's own forward is bypassed at {bypassed[0]}")
    torch.testing.assert_close(case.logits(base), case.logits(case.model), **TOLERANCE)
    model = copy.deepcopy(case.model)
    model(**case.inputs).loss.backward()
    base(**case.inputs).loss.backward()
    for name, layer in lora_layers(model).items():
        if name in case.unused():
            continue
        wrapped = base.get_submodule(name)
        grad_A, grad_B = (getattr(wrapped, which)["default"].weight.grad for which in ("lora_A", "lora_B"))
        expected_A = _sum_of_groups(grad_A, layer.groups).reshape(layer.lora_A.shape)
        expected_B = layer._from_blocks(grad_B.reshape(len(grad_B), -1))
        torch.testing.assert_close(layer.lora_A.grad, expected_A, **TOLERANCE)
        torch.testing.assert_close(layer.lora_B.grad, expected_B, **TOLERANCE)


def check_from_peft(case: Case) -> None:
    """What peft saves after loading ours loads here again, with the same logits."""
    theirs = _in_peft(case)
    with TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model = case.plain()
        if any(layer.groups > 1 for layer in lora_layers(case.model).values()):
            raise NotApplicable("peft's grouped convolutions mix groups in general, which ours does not")
        load_adapter(model, folder)
    torch.testing.assert_close(case.logits(model), case.logits(case.model), **TOLERANCE)


def _in_peft(case: Case) -> Any:
    bare = [t.name for t in injection(case.model).targets if t.tensor != "weight"]
    if bare:
        raise NotApplicable(f"{bare[0]} is a bare parameter, which peft's LoRA does not adapt at a low rank")
    with TemporaryDirectory() as folder:
        save_adapter(case.model, Path(folder) / "a")
        try:
            theirs = peft.PeftModel.from_pretrained(case.plain(), Path(folder) / "a", is_trainable=True)
        except ValueError as error:
            if "is not supported" in str(error):
                raise NotApplicable("peft does not adapt this layer type") from None
            raise
        return theirs.eval()


def _sum_of_groups(grad: Tensor, groups: int) -> Tensor:
    """The gradient of A of a grouped convolution from that of peft's, which has it once for each group."""
    if groups == 1:
        return grad
    rank, inputs = grad.shape[0] // groups, grad.shape[1] // groups
    blocks = grad.reshape(groups, rank, groups, inputs, *grad.shape[2:])
    return torch.stack([blocks[group, :, group] for group in range(groups)]).sum(0)


CHECKS = (
    check_identity,
    check_roles,
    check_probe,
    check_merge,
    check_half,
    check_gradients,
    check_reload,
    check_peft,
    check_from_peft,
)
# The fast half has one of each kind: absolute and relative positions, fused projections, a decoder, images.
FAST = {"bert", "distilbert", "deberta-v2", "modernbert", "gpt2", "vit"}
ADAPTED = [name for name, entry in ARCHITECTURES.items() if entry.reason is None]


def test_the_table_is_long_enough() -> None:
    assert len(ARCHITECTURES) >= 45


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ADAPTED],
)
def test_every_check_holds(model_type: str) -> None:
    case = Case(model_type)
    for check in CHECKS:
        try:
            check(case)
        except NotApplicable:
            # Only the comparison with peft is ever left out.
            assert check in (check_peft, check_from_peft)


@pytest.mark.parametrize("model_type", [name for name in ARCHITECTURES if name not in ADAPTED])
def test_what_cannot_be_adapted_is_refused_with_the_reason(model_type: str) -> None:
    with pytest.raises(ValueError, match=ARCHITECTURES.get(model_type).reason):
        inject_lora(tiny_model(model_type), LoRAConfig())
