"""Every test runs over the table; what a role is comes from how the model behaves, not from names."""

import re
from collections import defaultdict

import pytest
import torch
from tiny_models import PAD, TEXT, VISION, WIDE, tiny_inputs, tiny_model
from torch import nn

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
