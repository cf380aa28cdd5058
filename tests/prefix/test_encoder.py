import pytest
import torch
from conftest import randomize, tiny_batch, tiny_classifier
from torch import nn

from hf_lora import LoRAConfig, inject_lora
from hf_lora.prefix.encoder import FrozenPrefix

DEPTH = 2


def adapted(model_type="bert", layers=(-2, -1), **options):
    """Four blocks, the upper two adapted."""
    model = tiny_classifier(model_type, **{"num_hidden_layers": 4, "n_layers": 4})
    inject_lora(model, LoRAConfig(**{"rank": 4, "layers": layers, **options}))
    randomize(model)
    return model


def inputs():
    batch = tiny_batch()
    del batch["labels"]
    return batch


def traces(model):
    """Everything that a hook or a swapped forward leaves on a module, and its mode."""
    hooks = [name for name in vars(nn.Module()) if name.endswith("hooks")]
    return {
        name: (module.training, module.__dict__.get("forward"), *(len(getattr(module, h)) for h in hooks))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize(
    ("model_type", "name"), [("bert", "bert.encoder.layer"), ("distilbert", "distilbert.transformer.layer")]
)
def test_the_blocks_are_found_by_structure(model_type, name):
    prefix = FrozenPrefix(adapted(model_type))
    assert (prefix.name, len(prefix.blocks), prefix.depth) == (name, 4, DEPTH)


def test_the_recorded_states_are_transformers_hidden_states():
    model = adapted()
    expected = model(**inputs(), output_hidden_states=True).hidden_states[DEPTH]
    prefix = FrozenPrefix(model)
    observed, _ = prefix.observe(inputs())
    recorded = prefix.record(inputs())
    assert torch.equal(observed, expected) and torch.equal(recorded, expected)
    assert not recorded.requires_grad


def test_recording_is_without_dropout_also_in_a_model_that_trains():
    prefix = FrozenPrefix(adapted())
    expected, _ = prefix.observe(inputs())
    prefix.model.train()
    before = traces(prefix.model)
    assert torch.equal(prefix.record(inputs()), expected)
    assert traces(prefix.model) == before


def test_neither_recording_nor_replaying_runs_the_other_blocks():
    prefix = FrozenPrefix(adapted())
    states, _ = prefix.observe(inputs())
    ran = []
    for index, block in enumerate(prefix.blocks):
        block.attention.register_forward_hook(lambda *_, index=index: ran.append(index))
    prefix.record(inputs())
    assert ran == [0, 1]
    ran.clear()
    with prefix.replay(states):
        prefix.model(**inputs())
    assert ran == [2, 3]


def test_replaying_takes_the_given_states():
    """Other states, other logits: those that the upper half computes from them."""
    prefix = FrozenPrefix(adapted())
    model = prefix.model
    states, _ = prefix.observe(inputs())
    other = states.flip(-1).contiguous()
    mask = torch.zeros(4, 1, 1, 12).masked_fill(inputs()["attention_mask"][:, None, None] == 0, -torch.inf)
    hidden = other
    for block in prefix.blocks[DEPTH:]:
        hidden = block(hidden, mask)
    expected = model.classifier(model.bert.pooler(hidden))
    with prefix.replay(other):
        torch.testing.assert_close(model(**inputs()).logits, expected)


def test_dropout_stays_on_from_the_first_trained_block_and_is_off_below():
    prefix = FrozenPrefix(adapted(dropout=0.0))
    states, logits = prefix.observe(inputs())
    prefix.model.train()
    with prefix.replay(states), torch.no_grad():
        seen = [prefix.model(**inputs()).logits for _ in range(2)]
    assert not torch.equal(seen[0], seen[1])
    for block in prefix.blocks[DEPTH:]:
        block.eval()
    prefix.model.dropout.eval()
    with prefix.replay(states):
        assert torch.equal(prefix.model(**inputs()).logits, logits)


def test_without_a_cache_autograd_records_nothing_below_the_adapted_blocks():
    """An ordinary training step: no tensor in the blocks below requires gradients, and from there on they do."""
    model = adapted().train()
    records = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, args, output, name=name: records.update(
                {name: isinstance(output, torch.Tensor) and output.requires_grad}
            )
        )
    model(**tiny_batch()).loss.backward()
    below = {
        n: r
        for n, r in records.items()
        if n.startswith(("bert.emb", "bert.encoder.layer.0", "bert.encoder.layer.1"))
    }
    assert len(below) > 20 and not any(below.values())
    assert records["bert.encoder.layer.2"] and records["bert.encoder.layer.3"]


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("what", ["observe", "record", "replay"])
def test_an_exception_leaves_nothing_behind(what, mode):
    prefix = FrozenPrefix(adapted())
    states, _ = prefix.observe(inputs())
    prefix.model.train(mode)
    hook = prefix.model.classifier.register_forward_pre_hook(lambda *_: 1 / 0)
    before = traces(prefix.model)
    with pytest.raises(ZeroDivisionError):
        if what == "replay":
            with prefix.replay(states):
                prefix.model(**inputs())
        else:
            getattr(prefix, what)(inputs())
    assert traces(prefix.model) == before
    hook.remove()


def test_a_forward_that_someone_else_has_swapped_is_put_back():
    prefix = FrozenPrefix(adapted())
    block = prefix.blocks[0]
    block.forward = swapped = block.forward
    states, _ = prefix.observe(inputs())
    with prefix.replay(states):
        assert block.__dict__["forward"] is not swapped
    assert block.__dict__["forward"] is swapped


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"layers": None}, r"bert.encoder.layer.0.attention.self.query.lora_A trained, in the first of 4"),
        ({"layers": (0, 3)}, r"bert.encoder.layer.0.attention.self.query.lora_A trained"),
        ({"bias": "all"}, r"bert.encoder.layer.0.attention.self.query.bias trained"),
    ],
)
def test_a_first_block_that_is_trained_is_refused(options, first):
    with pytest.raises(ValueError, match=rf"needs frozen blocks below .* got {first}.*--lora_layers -2 -1"):
        FrozenPrefix(adapted(**options))


@pytest.mark.parametrize("model_type", ["bert", "mpnet"])
def test_a_trained_parameter_before_the_blocks_is_refused(model_type):
    model = adapted(model_type)
    name = {
        "bert": "bert.embeddings.LayerNorm.bias",
        "mpnet": "mpnet.encoder.relative_attention_bias.weight",
    }[model_type]
    model.get_parameter(name).requires_grad_(True)
    with pytest.raises(
        ValueError, match=rf"everything before .*layer.2 frozen; got 1 trained .* first '{name}'"
    ):
        FrozenPrefix(model).observe(inputs())


def test_required_input_gradients_are_no_trained_parameters():
    """Activation checkpointing lets the embeddings' output require gradients."""
    prefix = FrozenPrefix(adapted())
    prefix.model.enable_input_require_grads()
    states, _ = prefix.observe(inputs())
    assert not states.requires_grad
    seen = []
    prefix.blocks[DEPTH].register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    with prefix.replay(states):
        prefix.model(**inputs())
    assert seen == [True]


def test_a_model_without_a_list_of_blocks_is_refused():
    model = adapted(layers=None, target_modules=("pooler.dense",))
    with pytest.raises(ValueError, match=r"needs one list of blocks .* got 0 in BertForSequence.* \(none\)"):
        FrozenPrefix(model)


def test_states_of_another_batch_are_refused():
    prefix = FrozenPrefix(adapted())
    states, _ = prefix.observe(inputs())
    with (
        prefix.replay(states[:3]),
        pytest.raises(ValueError, match=r"got \(3, 12, 32\); expected \(4, 12, 32\)"),
    ):
        prefix.model(**inputs())


def test_a_model_that_trains_nothing_is_refused():
    model = adapted()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"needs a trained block; got none in bert.encoder.layer"):
        FrozenPrefix(model)
