"""Every test runs over the table; what a role is comes from how the model behaves, not from names."""

import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from tiny_models import PAD, TEXT, VISION, WIDE, tiny_inputs, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lora.lora.architectures import (
    ARCHITECTURES,
    ROLE_NAMES,
    ROLES,
    ROW_LAYOUTS,
    Architecture,
    Projection,
    fused,
    separate,
)

WITH_ROLES = [model_type for model_type, entry in ARCHITECTURES.items() if entry.reason is None]
# Fused layers are the subject of test_fused.py, and a bare parameter has no output to change.
SEPARATE = [
    model_type
    for model_type in WITH_ROLES
    if all(place.rows is None and place.tensor == "weight" for place in ARCHITECTURES.get(model_type).q)
]
PROMISED = """bert ernie layoutlm rembert megatron-bert canine roberta xlm-roberta camembert roberta-prelayernorm
    xmod data2vec-text electra esm nystromformer roformer layoutlmv3 big_bird convbert longformer luke mobilebert
    ibert distilbert xlm flaubert albert mpnet deberta deberta-v2 modernbert modernbert-decoder eurobert nomic_bert
    gte jina_embeddings_v3 funnel squeezebert xlnet fnet llama mistral qwen2 qwen3 gemma2 phi phi3 opt biogpt gptj
    gpt_neo gpt2 openai-gpt gpt_neox bloom falcon t5 bart vit deit dinov2 beit swin xlm-roberta-xl"""

# Projections of all others are `(batch, tokens, features)`.
TOKEN_AXIS = {"longformer": 0}

Place = tuple[str, nn.Module, Projection]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny matrices are several times slower on threads that have to wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def places(model: nn.Module, role: str) -> list[Place]:
    """The modules of a role inside the encoder, with the entry that names each."""
    entry = ARCHITECTURES.get(model.config.model_type)
    return [
        (name, module, place)
        for name, module in model.base_model.named_modules()
        for place in entry.projections(role)
        if f".{name}".endswith(f".{place.suffix}")
    ]


def attentions(output: dict) -> list[torch.Tensor]:
    """The attention probabilities in an output, those of a first layer first."""
    # Longformer's are parts of the same attention's.
    keys = [key for key in output if key.endswith("attentions") and key != "global_attentions"]
    return [layer for key in keys for layer in output[key] or ()]


def first_attention(model: nn.Module, inputs: dict) -> torch.Tensor:
    """The probabilities `(batch, heads, queries, keys)` of a layer whose inputs are embeddings."""
    with torch.no_grad():
        first = attentions(model(**inputs, output_attentions=True))[0]
    if not isinstance(first, torch.Tensor) or first.dim() != 4:
        pytest.skip(f"{model.config.model_type} returns something else in place of attention probabilities")
    return first


def test_the_promised_model_types_are_there():
    assert set(PROMISED.split()) <= set(ARCHITECTURES)


def test_every_entry_has_a_tiny_model():
    assert set(ARCHITECTURES) == {*TEXT, *VISION}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_entry_has_its_roles_or_a_reason(model_type):
    entry = ARCHITECTURES.get(model_type)
    found = [bool(entry.projections(role)) for role in ROLES]
    assert not any(found) if entry.reason else all(found)
    assert all(
        place.rows is None or place.rows in ROW_LAYOUTS for r in ROLES for place in entry.projections(r)
    )


def test_fnet_says_that_it_has_no_attention():
    assert "no attention" in ARCHITECTURES.get("fnet").reason
    assert not attentions(tiny_model("fnet")(input_ids=torch.arange(5, 10)[None]))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_tiny_models_are_of_their_type_and_the_same_each_time(model_type):
    first, second = tiny_model(model_type), tiny_model(model_type)
    assert first.config.model_type == model_type and not first.training
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)
    inputs = tiny_inputs(model_type)
    if "attention_mask" in inputs:
        assert (inputs["attention_mask"][-1] == 0).any()
        assert ((inputs["input_ids"] == PAD) == (inputs["attention_mask"] == 0)).all()


@pytest.mark.parametrize("model_type", WITH_ROLES)
def test_every_place_of_a_role_is_trained(model_type):
    model = tiny_model(model_type)
    output = model(**tiny_inputs(model_type))
    assert output.logits.shape == (4, 3)
    output.loss.backward()
    for role in ROLES:
        reached = defaultdict(float)
        for _, module, place in places(model, role):
            gradient = getattr(module, place.tensor).grad
            # The last block of some models has places that no output depends on.
            reached[place] += 0 if gradient is None else gradient.abs().sum().item()
        assert set(reached) == set(ARCHITECTURES.get(model_type).projections(role))
        assert all(reached.values()), (role, reached)


@pytest.mark.parametrize("model_type", WITH_ROLES)
def test_every_attention_computes_q_k_and_v_before_o(model_type):
    model = tiny_model(model_type, attn_implementation="eager")
    events, called, everything = defaultdict(str), set(), {}
    for role in ROLES:
        for name, module, place in places(model, role):
            everything[name] = place
            block = name.removesuffix(place.suffix)

            def note(*_, name=name, block=block, role=role):
                called.add(name)
                events[block] += role

            module.register_forward_hook(note)
    output = model(**tiny_inputs(model_type), output_attentions=True)
    assert called == {name for name, place in everything.items() if not place.bypassed}
    if all(place.tensor == "weight" and not place.bypassed for place in everything.values()):
        one_attention = r"(?=[^o]*q)(?=[^o]*k)(?=[^o]*v)[qkv]+o+"
        assert all(re.fullmatch(f"({one_attention})+", order) for order in events.values()), dict(events)
    outputs, count = "".join(events.values()).count("o"), len(attentions(output))
    assert outputs >= count > 0 and outputs % count == 0


@pytest.mark.parametrize("model_type", WITH_ROLES)
def test_feed_forward_layers_are_never_matched(model_type):
    model = tiny_model(model_type)
    wide = {
        name
        for name, module in model.base_model.named_modules()
        for parameter in module.parameters(recurse=False)
        if not isinstance(module, nn.Embedding) and parameter.dim() > 1 and max(parameter.shape) >= WIDE
    }
    assert wide
    assert not wide & {name for role in ROLES for name, *_ in places(model, role)}


@pytest.mark.parametrize("model_type", WITH_ROLES)
def test_attention_moves_with_the_weights_of_q_and_k_only(model_type):
    model = tiny_model(model_type, attn_implementation="eager")
    inputs = tiny_inputs(model_type)
    before = first_attention(model, inputs)
    for role in ROLES:
        weights = [getattr(m, place.tensor) for _, m, place in places(model, role) if place.rows is None]
        if not weights:
            continue  # tests/test_fused.py
        kept = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.data += 0.5 * torch.randn_like(weight)
        assert (not torch.equal(before, first_attention(model, inputs))) == (role in "qk"), role
        for weight, old in zip(weights, kept, strict=True):
            weight.data = old


@pytest.mark.parametrize("model_type", SEPARATE)
def test_a_query_moves_its_own_row_of_attention_and_a_key_a_column(model_type):
    model = tiny_model(model_type, attn_implementation="eager")
    inputs, token = tiny_inputs(model_type), 3
    before = first_attention(model, inputs)
    others = [row for row in range(before.shape[2]) if row != token]

    def add_at_token(module, _, output):
        first, *rest = output if isinstance(output, tuple) else (output,)
        first = first.clone()
        tokens = first.movedim(-1 if isinstance(module, nn.Conv1d) else TOKEN_AXIS.get(model_type, 1), 0)
        # DeBERTa projects its one table of relative positions, too, and LUKE its few entities.
        if len(first) > 1 and len(tokens) > token:
            tokens[token] += torch.randn(tokens[token].shape[-1:])
        return (first, *rest) if isinstance(output, tuple) else first

    for role in "qk":
        hooks = [module.register_forward_hook(add_at_token) for _, module, _ in places(model, role)]
        moved = (first_attention(model, inputs) - before).abs().amax(dim=(0, 1, 3))
        for hook in hooks:
            hook.remove()
        if role == "q":
            assert moved[token] > 0 and (moved[others] == 0).all()
        else:
            assert (moved[others] > 0).any()


@pytest.mark.parametrize(("role", "moves"), [("q", "own"), ("k", "others"), ("v", "none"), ("o", "none")])
def test_the_bare_parameters_of_xlnet_act_on_tokens_as_their_roles_do(role, moves):
    """Where all tokens but one are zero, a change of q's weight can move one row only; r would move all."""
    model, token = tiny_model("xlnet", attn_implementation="eager").double(), 3
    nothing = torch.zeros(1, 8, 32, dtype=torch.double)
    something = nothing.index_fill(1, torch.tensor(token), 1.0)
    before = [first_attention(model, {"inputs_embeds": embeds}) for embeds in (nothing, something)]
    for _, module, place in places(model, role):
        getattr(module, place.tensor).data += torch.randn(32, 4, 8, dtype=torch.double)
    assert torch.equal(before[0], first_attention(model, {"inputs_embeds": nothing}))
    after = first_attention(model, {"inputs_embeds": something})
    moved = {row for row in range(8) if not torch.equal(before[1][:, :, row], after[:, :, row])}
    assert {"own": moved == {token}, "others": len(moved) > 1, "none": not moved}[moves]


def test_separate_and_fused_spell_out_their_places():
    entry = separate("a b", "q", "k k2", "v", "a.o b.o")
    assert entry.q == (Projection("a.q"), Projection("b.q"))
    assert entry.k == (Projection("a.k"), Projection("a.k2"), Projection("b.k"), Projection("b.k2"))
    assert entry.projections("o") == (Projection("a.o"), Projection("b.o"))
    assert separate("", "q", "k", "v") == Architecture(*((Projection(role),) for role in "qkv"))
    together = Projection("a.qkv", rows="per_head")
    assert fused("a.qkv", "per_head", "a.o") == Architecture(*[(together,)] * 3, o=(Projection("a.o"),))


def test_roles_have_names():
    assert "".join(ROLE_NAMES) == ROLES


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
