import math

import loralib
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_lora.lora import functional
from hf_lora.lora.functional import FastDropout, drop, drop_again, fast_dropout, lora_linear, random_bits


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 5), "lora_A": (2, 5), "lora_B": (7, 2)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_dropout_zeroes_inputs_of_A_only_and_rescales(tensors):
    x, lora_A, lora_B = tensors["x"], tensors["lora_A"], tensors["lora_B"]
    torch.manual_seed(4)
    out = functional.lora_update(x, lora_A, lora_B, 2.0, dropout=0.5)
    torch.manual_seed(4)
    torch.testing.assert_close(out, fast_dropout(x, 0.5) @ lora_A.T @ lora_B.T * 2.0)


def test_delta_weight_is_computed_in_fp32(tensors):
    lora_A, lora_B = tensors["lora_A"].bfloat16(), tensors["lora_B"].bfloat16()
    delta = functional.delta_weight(lora_A, lora_B, 0.3)
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta, 0.3 * (lora_B.double() @ lora_A.double()).float())


def test_merged_weight_rounds_once():
    weight = torch.tensor([[1.0]], dtype=torch.bfloat16)
    # 1 + 3/512 lies between the bf16 neighbours 1 and 1 + 4/512; adding in bf16 would first round 3/512.
    assert functional.merged_weight(weight, torch.tensor([[3 / 512]])).item() == 1 + 4 / 512


NAMES = ("x", "weight", "bias", "lora_A", "lora_B")
# Tokens for which the update is added to the outputs, and to the weight.
FORMS = {"outputs": 4, "weight": 64}


def make(tokens: int = 6, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, tokens // 2, 5), "weight": (7, 5), "bias": (7,), "lora_A": (2, 5), "lora_B": (7, 2)}
    return {
        n: torch.randn(s, generator=generator, dtype=dtype).requires_grad_(n != "weight")
        for n, s in shapes.items()
    }


def plain(x, weight, bias, lora_A, lora_B, scaling):
    """Equation 3 in torch's own operations."""
    return F.linear(x, weight, bias) + F.linear(F.linear(x, lora_A), lora_B) * scaling


def gradients(function, tensors, *arguments):
    tensors = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in tensors.items()}
    y = function(*(tensors[name] for name in NAMES), *arguments)
    y.square().sum().backward()
    return y.detach(), {name: tensor.grad for name, tensor in tensors.items()}


@pytest.mark.parametrize("tokens", FORMS.values(), ids=FORMS)
def test_each_form_is_chosen_where_it_is_less_work(tokens):
    tensors = make(tokens)
    chosen = functional._is_merged(tokens, tensors["weight"], tensors["lora_A"])
    by_hand = tokens * 5 + tokens * 7 > 2 * 5 * 7
    assert chosen is by_hand is (tokens == FORMS["weight"])


def test_half_precision_weights_are_never_merged():
    weight = torch.empty(7, 5, dtype=torch.bfloat16)
    assert not functional._is_merged(10**6, weight, torch.empty(2, 5, requires_grad=True))


def test_it_is_equation_3_written_out():
    tensors = {n: t.detach() for n, t in make().items()}
    x, weight, bias, lora_A, lora_B = (tensors[name] for name in NAMES)
    y = lora_linear(*tensors.values(), 0.5)
    for batch in range(2):
        for token in range(3):
            by_hand = weight @ x[batch, token] + bias + 0.5 * (lora_B @ (lora_A @ x[batch, token]))
            torch.testing.assert_close(y[batch, token], by_hand)


@pytest.mark.parametrize("tokens", FORMS.values(), ids=FORMS)
def test_output_and_gradients_equal_loralib(tokens):
    tensors = make(tokens)
    theirs = loralib.Linear(5, 7, r=2, lora_alpha=3)
    with torch.no_grad():
        for name in NAMES[1:]:
            getattr(theirs, name).copy_(tensors[name])
    x = tensors["x"].detach().clone().requires_grad_()
    expected = theirs(x)
    expected.square().sum().backward()
    y, grads = gradients(lora_linear, tensors, 1.5)
    torch.testing.assert_close(y, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grads["x"], x.grad, atol=1e-5, rtol=1e-5)
    for name in ("bias", "lora_A", "lora_B"):
        torch.testing.assert_close(grads[name], getattr(theirs, name).grad, atol=1e-4, rtol=1e-5)
    assert grads["weight"] is None


@pytest.mark.parametrize("tokens", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    "frozen", [("weight",), ("weight", "bias", "x"), ("lora_A", "weight"), ("lora_B",), ()]
)
def test_gradients_are_those_of_finite_differences(tokens, frozen):
    tensors = make(tokens, torch.float64)
    inputs = tuple(tensors[name].detach().requires_grad_(name not in frozen) for name in NAMES)
    assert torch.autograd.gradcheck(lambda *given: lora_linear(*given, 1.5), inputs)


def test_dropout_acts_on_the_input_of_A_alone():
    tensors = make(400)
    torch.manual_seed(4)
    dropped, _, factor = drop(tensors["x"].detach().reshape(-1, 5), 0.5)
    mask = (dropped != 0).reshape(tensors["x"].shape) * factor
    torch.manual_seed(4)
    y, grads = gradients(lora_linear, tensors, 2.0, 0.5)

    def by_hand(x, weight, bias, lora_A, lora_B):
        return F.linear(x, weight, bias) + F.linear(F.linear(x * mask, lora_A), lora_B) * 2.0

    expected, expected_grads = gradients(by_hand, tensors)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    for name in ("x", "bias", "lora_A", "lora_B"):
        torch.testing.assert_close(grads[name], expected_grads[name], atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_keeps_its_type_and_the_factors_theirs(dtype):
    tensors = make(40)
    exact, exact_grads = gradients(plain, tensors, 0.5)
    half = {n: t.detach().to(t.dtype if "lora" in n else dtype) for n, t in tensors.items()}
    half = {n: t.requires_grad_(n != "weight") for n, t in half.items()}
    y, grads = gradients(lora_linear, half, 0.5)
    assert y.dtype == grads["x"].dtype == dtype and grads["lora_A"].dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, atol=0.1, rtol=0.03)
    for name in ("lora_A", "lora_B"):
        error = (grads[name] - exact_grads[name]).norm() / exact_grads[name].norm()
        assert error < 0.02


def test_autocast_decides_the_precision():
    tensors = make(40)
    with torch.autocast("cpu", torch.bfloat16):
        y, grads = gradients(lora_linear, tensors, 0.5)
        expected, expected_grads = gradients(plain, tensors, 0.5)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, atol=0.1, rtol=0.03)
    for name in ("x", "lora_A", "lora_B"):
        assert grads[name].dtype == torch.float32
        error = (grads[name] - expected_grads[name]).norm() / expected_grads[name].norm()
        assert error < 0.03


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_what_is_kept_for_the_backward(p):
    tokens, features, rank = 64, 32, 2
    x = torch.randn(tokens, features, requires_grad=True)
    weight, lora_B = torch.randn(features, features), torch.randn(features, rank, requires_grad=True)
    lora_A = torch.randn(rank, features, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [lora_linear(x, weight, None, lora_A, lora_B, 1.0, p) for _ in "qkv"]
    own = {t.untyped_storage().data_ptr() for t in (x, weight, lora_A, lora_B)}
    masks = tokens * features * (p > 0)
    hidden = tokens * rank * 4 * (p > 0)  # merged, h is not kept
    assert sum(size for place, size in kept.items() if place not in own) == 3 * (masks + hidden)
    assert x.untyped_storage().data_ptr() in kept and len(outputs) == 3


def test_a_frozen_A_needs_no_input():
    tensors = make(64)
    tensors["lora_A"].requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        lora_linear(*(tensors[name] for name in NAMES), 1.0)
    assert torch.Size((64, 5)) not in saved and torch.Size((2, 64)) in saved


def test_the_output_can_be_changed_in_place():
    """Longformer divides its queries in place."""
    tensors = make()

    def halved(*given):
        y = lora_linear(*given)
        y /= 2
        return y

    _, grads = gradients(halved, tensors, 1.5)
    _, expected = gradients(lambda *given: plain(*given) / 2, tensors, 1.5)
    torch.testing.assert_close(grads["lora_A"], expected["lora_A"])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_activation_checkpointing_changes_nothing(p):
    tensors = make(40)

    def again(*given):
        return checkpoint(lora_linear, *given, use_reentrant=False)

    results = []
    for function in (lora_linear, again):
        torch.manual_seed(3)
        results.append(gradients(function, tensors, 1.5, p))
    (y, grads), (other_y, other_grads) = results
    assert torch.equal(y, other_y)
    assert all(torch.equal(grads[name], other_grads[name]) for name in ("x", "lora_A", "lora_B"))


@pytest.mark.parametrize("tokens", FORMS.values(), ids=FORMS)
def test_it_compiles_into_one_graph(tokens):
    tensors = make(tokens)
    compiled = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)
    y, grads = gradients(compiled, tensors, 1.5)
    expected, expected_grads = gradients(plain, tensors, 1.5)
    torch.testing.assert_close(y, expected)
    for name in ("x", "lora_A", "lora_B"):
        torch.testing.assert_close(grads[name], expected_grads[name], atol=1e-4, rtol=1e-5)


def test_dropout_compiles_too():
    tensors = make(400)
    compiled = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)
    y, grads = gradients(compiled, tensors, 1.5, 0.5)
    dropped = y - F.linear(*(tensors[name].detach() for name in ("x", "weight", "bias")))
    # Without dropout the update of a token is the same at every call; with it, inputs are missing.
    assert not torch.allclose(dropped, plain(*tensors.values(), 1.5).detach() - y + dropped)
    assert all(grads[name].isfinite().all() and grads[name].any() for name in ("x", "lora_A", "lora_B"))


MANY = 1 << 22


def hashed_by_hand(count: int) -> list[int]:
    """lowbias32 with two keys, in Python's own integers; the two halves of each word, as signed numbers."""
    start, key = torch.empty(2, dtype=torch.int32).random_(-(1 << 31), 1 << 31).tolist()
    halves = []
    for counter in range((count + 1) // 2):
        word = (counter + start) % 2**32
        word ^= word >> 16
        word = (word * 0x7FEB352D % 2**32) ^ (key % 2**32)
        word ^= word >> 15
        word = word * 0x846CA68B % 2**32
        word ^= word >> 16
        halves += [word & 0xFFFF, word >> 16]
    return [half - 2**16 if half >= 2**15 else half for half in halves][:count]


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 101])
def test_the_bits_are_those_of_the_hash_whatever_the_blocks(monkeypatch, count):
    monkeypatch.setattr(functional, "_BLOCK", 8)
    torch.manual_seed(7)
    expected = hashed_by_hand(count)
    torch.manual_seed(7)
    assert random_bits(count).tolist() == expected


def test_the_bits_are_uniform():
    torch.manual_seed(0)
    counts = torch.bincount(random_bits(MANY).int() + 32768, minlength=65536).double()
    expected = MANY / 65536
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    # 65,535 degrees of freedom: mean 65,535, standard deviation 362.
    assert abs(chi_square - 65535) < 5 * math.sqrt(2 * 65535)


def kept(p: float, count: int = MANY) -> torch.Tensor:
    return (drop(torch.ones(count), p)[0] != 0).double()


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_mean_and_variance_are_those_of_dropout(p):
    torch.manual_seed(1)
    values = fast_dropout(torch.ones(MANY, dtype=torch.float64), p)
    variance = p / (1 - p)
    assert abs(values.mean().item() - 1) < 5 * math.sqrt(variance / MANY) + 1 / 65536 / (1 - p)
    assert values.var().item() == pytest.approx(variance, rel=0.01)
    assert set(values.unique().tolist()) <= {0.0, 1 / (1 - p)}


@pytest.mark.parametrize("lag", [1, 2, 3, 8, 32, 384, 1 << 17, (1 << 18) + 1])
def test_positions_are_independent(lag):
    torch.manual_seed(2)
    mask = kept(0.1) - 0.9
    correlation = (mask[:-lag] * mask[lag:]).mean().item() / 0.09
    assert abs(correlation) < 5 / math.sqrt(MANY - lag)


def test_calls_are_independent():
    torch.manual_seed(3)
    masks = torch.stack([kept(0.1, MANY // 16) - 0.9 for _ in range(16)])
    between = (masks @ masks.T / masks.shape[1] / 0.09).triu(1)
    assert between.abs().max().item() < 5 / math.sqrt(masks.shape[1])


def test_masks_come_from_the_seed_and_differ_from_call_to_call():
    x = torch.ones(1000)
    torch.manual_seed(4)
    first, second = fast_dropout(x, 0.3), fast_dropout(x, 0.3)
    torch.manual_seed(4)
    assert torch.equal(fast_dropout(x, 0.3), first) and not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients_carry_the_same_mask(dtype, transposed):
    x = torch.randn(60, 50, generator=torch.Generator().manual_seed(5)).to(dtype)
    x[0] = 0  # a value of zero is kept like any other, and so gets its gradient
    x = (x.T if transposed else x).requires_grad_()
    torch.manual_seed(6)
    mask = drop(torch.ones_like(x), 0.25)[0]
    torch.manual_seed(6)
    y = fast_dropout(x, 0.25)
    y.backward(torch.full_like(y, 3))
    assert 0 < int(mask.count_nonzero()) < mask.numel() and y.dtype == dtype
    torch.testing.assert_close(y, x.detach() * mask * (1 / 0.75))
    torch.testing.assert_close(x.grad, 3 * mask * (1 / 0.75))


def test_the_native_masks_of_other_devices_obey_the_same_rules(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = torch.randn(100, 100)
    dropped, mask, factor = drop(x, 0.25)
    assert mask.dtype == torch.bool and 0.7 < mask.double().mean() < 0.8
    torch.testing.assert_close(dropped * factor, x * mask / 0.75)
    torch.testing.assert_close(drop_again(x, mask, 0.25) * factor, x * mask / 0.75)


def test_checkpointing_draws_the_mask_again():
    x = torch.randn(40, 40, requires_grad=True)
    torch.manual_seed(8)
    (expected,) = torch.autograd.grad(fast_dropout(x, 0.4).square().sum(), x)
    torch.manual_seed(8)
    y = checkpoint(lambda value: fast_dropout(value, 0.4), x, use_reentrant=False)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(grad, expected)


def test_the_layer_is_dropout():
    x = torch.randn(30, 30)
    layer = FastDropout(0.5)
    torch.manual_seed(9)
    expected = fast_dropout(x, 0.5)
    torch.manual_seed(9)
    assert isinstance(layer, nn.Dropout) and torch.equal(layer(x), expected)
    assert layer.eval()(x) is x and FastDropout(0.0)(x) is x
    assert not FastDropout(1.0)(x).any()
    inplace = x.clone()
    assert FastDropout(0.5, inplace=True)(inplace) is inplace
