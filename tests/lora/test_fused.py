"""The role of every output row of every fused layer, found from what a change of it does to attention."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from transformers.pytorch_utils import Conv1D

from hf_lora.lora.architectures import ARCHITECTURES, ROW_LAYOUTS

# Other forms of a model type, as changes of its tiny configuration.
FORMS = {
    "falcon": [
        {"num_kv_heads": 1},
        {"num_kv_heads": 4},
        {"new_decoder_architecture": False, "multi_query": True},
        {"new_decoder_architecture": False, "multi_query": True, "alibi": True},
        {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4},
        {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4, "alibi": True},
    ],
    "gpt_bigcode": [{"multi_query": False}],
    "phi3": [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": None},
        {"head_dim": 4},
    ],
    "gpt_neox": [{"num_attention_heads": 2}],
    "deberta": [{"relative_attention": False, "pos_att_type": []}],
}
CASES = [
    pytest.param(model_type, form, id="-".join([model_type, *(f"{k}={v}" for k, v in form.items())]))
    for model_type, entry in ARCHITECTURES.items()
    if any(place.rows for place in entry.q)
    for form in ({}, *FORMS.get(model_type, ()))
]
TOKEN, TOKENS = 4, 8


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny matrices are several times slower on threads that have to wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fused_layer(model_type, form):
    """A model in double precision, its first fused layer, the layer's output features and its layout."""
    model = tiny_model(model_type, attn_implementation="eager", **form).double()
    (place,) = ARCHITECTURES.get(model_type).q
    layer = next(m for name, m in model.base_model.named_modules() if f".{name}".endswith(f".{place.suffix}"))
    size = layer.nf if isinstance(layer, Conv1D) else layer.out_features
    return model, layer, size, ROW_LAYOUTS.get(place.rows)(model.config, size)


@pytest.mark.parametrize(("model_type", "form"), CASES)
def test_each_row_plays_the_part_that_the_layout_gives_it(model_type, form):
    """Adding to one output of one token moves, of that layer's attention: q the token's own row, k the rows
    of other tokens, too, and v none, only the result. One copy of a sequence in the batch for each output."""
    model, layer, size, layout = fused_layer(model_type, form)
    ids = tiny_inputs(model_type)["input_ids"][:1, :TOKENS].expand(size + 1, -1)

    def add_to_one_output(_, __, output):
        output = output.clone()
        each = torch.arange(size)
        output[each, TOKEN, each] += 3
        return output

    handle = layer.register_forward_hook(add_to_one_output)
    with torch.no_grad():
        result = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_attentions=True)
    handle.remove()
    # The last copy is unchanged.
    rows = (result.attentions[0][:-1] - result.attentions[0][-1]).abs().amax(dim=(1, 3)) > 1e-12
    own, others = rows[:, TOKEN], rows[:, [t for t in range(TOKENS) if t != TOKEN]].any(dim=1)
    role_of = {(False, False): "v", (True, False): "q", (True, True): "k"}
    found = [role_of[pair] for pair in zip(own.tolist(), others.tolist(), strict=True)]
    assert (result.logits[:-1] - result.logits[-1]).abs().amax(dim=1).gt(0).all()
    expected = {row: role for role, ranges in layout.items() for part in ranges for row in part}
    assert found == [expected[row] for row in range(size)]


@pytest.mark.parametrize(("model_type", "form"), CASES)
def test_the_weights_of_a_role_move_only_that_role(model_type, form):
    model, layer, _, layout = fused_layer(model_type, form)
    inputs = {k: v for k, v in tiny_inputs(model_type).items() if k != "labels"}
    with torch.no_grad():
        before = model(**inputs, output_attentions=True)
        for role, ranges in layout.items():
            rows = [row for part in ranges for row in part]
            weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
            old = weight.clone()
            weight[rows] += torch.randn_like(weight[rows])
            after = model(**inputs, output_attentions=True)
            weight.copy_(old)
            assert torch.equal(before.attentions[0], after.attentions[0]) == (role == "v")
            assert not torch.equal(before.logits, after.logits)


@pytest.mark.parametrize(("model_type", "form"), CASES)
def test_layouts_divide_all_rows(model_type, form):
    _, _, size, layout = fused_layer(model_type, form)
    assert list(layout) == ["q", "k", "v"]
    rows = [row for ranges in layout.values() for part in ranges for row in part]
    assert sorted(rows) == list(range(size))


@pytest.mark.parametrize(("model_type", "form"), CASES)
@pytest.mark.parametrize("change", [-1, 1])
def test_sizes_that_do_not_add_up_are_an_error(model_type, form, change):
    model, _, size, _ = fused_layer(model_type, form)
    (place,) = ARCHITECTURES.get(model_type).q
    with pytest.raises(ValueError, match=f"got {size + change} output rows; expected"):
        ROW_LAYOUTS.get(place.rows)(model.config, size + change)


def test_layouts_by_hand():
    config = SimpleNamespace(num_attention_heads=2, num_key_value_heads=1, hidden_size=4)
    assert ROW_LAYOUTS.get("concatenated")(config, 12) == {
        "q": (range(0, 4),),
        "k": (range(4, 8),),
        "v": (range(8, 12),),
    }
    assert ROW_LAYOUTS.get("per_head")(config, 12) == {
        "q": (range(0, 2), range(6, 8)),
        "k": (range(2, 4), range(8, 10)),
        "v": (range(4, 6), range(10, 12)),
    }
    assert ROW_LAYOUTS.get("grouped_query")(config, 8) == {
        "q": (range(0, 4),),
        "k": (range(4, 6),),
        "v": (range(6, 8),),
    }
    falcon = SimpleNamespace(
        num_attention_heads=4, num_kv_heads=2, hidden_size=8, new_decoder_architecture=True, multi_query=True
    )
    assert ROW_LAYOUTS.get("falcon")(falcon, 16) == {
        "q": (range(0, 4), range(8, 12)),
        "k": (range(4, 6), range(12, 14)),
        "v": (range(6, 8), range(14, 16)),
    }
