"""The benchmarks compare what they say: the same network, and gradients for the same parameters."""

import pytest
import sides
from sides import STEPS, Case

TINY = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setitem(sides.SHAPES, "tiny", TINY)


def steps(**options):
    case = Case("tiny", **{"precision": "fp32", "dropout": 0.0, "batch": 2, "length": 8, **options})
    return {name: make(case) for name, make in STEPS.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_sides_compute_the_same_loss(precision):
    tolerance = {"fp32": 1e-6, "bf16": 2e-2}[precision]
    losses = {}
    for name, step in steps(precision=precision).items():
        assert step() > 0
        losses[name] = step.loss.item()
    assert losses == pytest.approx(dict.fromkeys(STEPS, losses["bound"]), abs=tolerance)


@pytest.mark.parametrize("layers", [None, 1])
def test_the_same_number_of_parameters_is_trained(layers):
    sides = steps(layers=layers)
    trained = {
        name: sum(p.numel() for p in sides[name].model.parameters() if p.requires_grad) for name in STEPS
    }
    by_hand = (layers or 3) * 4 * 2 * 8 * 32 + 32 * 5 + 5
    assert trained == {**dict.fromkeys(STEPS, by_hand), "bound": 0}


@pytest.mark.parametrize(("layers", "expected"), [(None, [True, True, True]), (1, [False, True, True])])
def test_the_bound_goes_back_to_the_input_of_the_lowest_adapted_block(layers, expected):
    step = steps(layers=layers)["bound"]
    recorded = []
    for block in step.model.bert.encoder.layer:
        block.register_forward_hook(lambda module, inputs, output: recorded.append(output.requires_grad))
    step()
    assert recorded == expected
