import copy
import pickle
from functools import partial

import peft
import pytest
import torch
from conftest import MODEL_TYPES, randomize, tiny_batch, tiny_classifier
from safetensors.torch import load_file
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_lora import (
    LoRAConfig,
    head_parameters,
    inject_lora,
    load_adapter,
    lora_disabled,
    lora_layers,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_adapter,
    trainable_parameter_count,
    unmerge_lora,
)
from hf_lora.adapters.directory import read_adapter
from hf_lora.adapters.loading import load_tensors
from hf_lora.lora.inject import base_parameters, injection, is_injected


@pytest.fixture
def batch():
    return tiny_batch()


def injected(model_type="bert", **options):
    model = tiny_classifier(model_type)
    inject_lora(model, LoRAConfig(**{"rank": 4, "alpha": 6, **options}))
    randomize(model)
    return model


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_injected_model_starts_as_the_pretrained_one(model_type, batch):
    model = tiny_classifier(model_type)
    before, keys = model(**batch).logits, set(model.state_dict())
    names = inject_lora(model, LoRAConfig())
    assert torch.equal(model(**batch).logits, before)
    assert set(model.state_dict()) == keys | {f"{n}.lora_{x}" for n in names for x in "AB"}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_and_gradients_equal_pefts_with_the_same_factors(model_type, batch):
    model = injected(model_type)
    theirs = peft.get_peft_model(
        tiny_classifier(model_type),
        peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=list(lora_layers(model)),
            modules_to_save=list(_head_children(model)),
        ),
    )
    peft_parameters = dict(theirs.named_parameters())
    twins = {
        name: peft_parameters[f"base_model.model.{name.rpartition('.')[0]}.{name[-6:]}.default.weight"]
        for name in lora_parameters(model)
    }
    for name, twin in twins.items():
        twin.data.copy_(lora_parameters(model)[name].data)
    ours, expected = model(**batch), theirs(**batch)
    torch.testing.assert_close(ours.logits, expected.logits, atol=1e-6, rtol=1e-5)
    ours.loss.backward()
    expected.loss.backward()
    for name, twin in twins.items():
        torch.testing.assert_close(lora_parameters(model)[name].grad, twin.grad, atol=1e-7, rtol=1e-5)
    for name, parameter in head_parameters(model).items():
        child, _, rest = name.partition(".")
        twin = peft_parameters[f"base_model.model.{child}.modules_to_save.default.{rest}"]
        torch.testing.assert_close(parameter.grad, twin.grad, atol=1e-7, rtol=1e-5)


def _head_children(model):
    return dict.fromkeys(name.partition(".")[0] for name in head_parameters(model))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_only_adapters_and_head_get_gradients(model_type, batch):
    model = injected(model_type)
    model(**batch).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(lora_parameters(model)) | set(head_parameters(model))


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", lambda name, adapted: False),
        ("lora_only", lambda name, adapted: name.removesuffix(".bias") in adapted and name.endswith(".bias")),
        ("all", lambda name, adapted: name.endswith(".bias")),
    ],
)
def test_bias_modes_train_the_biases_they_name(bias, expected):
    model = injected(bias=bias, projections="qv")
    adapted = set(lora_layers(model))
    for name, parameter in model.named_parameters():
        if name not in lora_parameters(model) and name not in head_parameters(model):
            assert parameter.requires_grad is expected(name, adapted), name


def test_the_head_can_be_frozen():
    model = injected(train_head=False)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(lora_parameters(model))


def test_counts_are_exact():
    model = injected(projections="qv", rank=4, rank_pattern={"layer.0.attention.self.query": 2})
    count = trainable_parameter_count(model)
    # Three modules of rank 4 and one of rank 2, each rank * (32 + 32); a head of 3 x 32 weights and 3 biases.
    assert count.lora == (3 * 4 + 2) * 64
    assert count.head == 3 * 32 + 3
    assert count.trainable == count.lora + count.head
    assert count.total == sum(p.numel() for p in tiny_classifier("bert").parameters()) + count.lora
    assert str(count) == f"trainable: 995 of {count.total:,} ({100 * 995 / count.total:.2f}%)"


def test_shared_parameters_count_once():
    model = injected("albert")
    assert trainable_parameter_count(model).lora == 4 * 4 * 64


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_merge_equals_forward_and_unmerge_restores_every_bit(model_type, batch):
    model = injected(model_type)
    before, unmerged = weights(model), model(**batch).logits
    merge_lora(model)
    torch.testing.assert_close(model(**batch).logits, unmerged, atol=1e-5, rtol=1e-5)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in lora_layers(model)}
    unmerge_lora(model)
    assert_same(weights(model), before)


@pytest.mark.parametrize("form", ["module", "parametrization"])
def test_the_pretrained_weight_follows_a_merged_model_into_another_precision(form, batch):
    model, pretrained = injected(form=form), tiny_classifier()
    merge_lora(model)
    for dtype in (torch.bfloat16, torch.float64, torch.bfloat16):
        model.to(dtype)
        for name, layer in lora_layers(model).items():
            # Kept as it was, in fp32: rounded only for as long as the model is in bf16.
            expected = pretrained.get_submodule(name).weight.to(dtype)
            assert layer.base_weight.dtype == dtype and torch.equal(layer.base_weight, expected)
    with lora_disabled(model):
        pretrained.classifier.load_state_dict(model.classifier.state_dict())
        expected = pretrained.to(torch.bfloat16)(**batch).logits
        assert torch.equal(model(**batch).logits, expected)
    unmerge_lora(model)
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.base_weight, pretrained.get_submodule(name).weight), name


def test_merging_twice_and_unmerging_twice_are_errors():
    model = injected()
    with pytest.raises(ValueError, match="the model is not merged; got 8 such layers"):
        unmerge_lora(model)
    merge_lora(model)
    with pytest.raises(ValueError, match=r"the model is merged already; .*; unmerge_lora undoes it"):
        merge_lora(model)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_disabled_is_the_pretrained_encoder_and_comes_back_whole(bias, merged, batch):
    model = injected(bias=bias)
    pretrained = tiny_classifier("bert")(**batch).logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith("bias") and name not in head_parameters(model):
                parameter.add_(0.3)
    if merged:
        merge_lora(model)
    before, enabled = weights(model), model(**batch).logits
    with lora_disabled(model):
        assert torch.equal(model(**batch).logits, pretrained)
    assert not torch.allclose(enabled, pretrained)
    assert torch.equal(model(**batch).logits, enabled)
    assert_same(weights(model), before)


def test_disabled_is_undone_after_an_exception_and_nests(batch):
    model = injected()
    enabled = model(**batch).logits
    with pytest.raises(RuntimeError), lora_disabled(model):
        raise RuntimeError
    assert torch.equal(model(**batch).logits, enabled)
    with lora_disabled(model):
        with lora_disabled(model):
            inner = model(**batch).logits
        assert torch.equal(model(**batch).logits, inner)
    assert torch.equal(model(**batch).logits, enabled)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_remove_gives_back_the_pretrained_model(bias, batch):
    model = tiny_classifier("bert")
    model.classifier.weight.requires_grad_(False)
    before, required = weights(model), {n: p.requires_grad for n, p in model.named_parameters()}
    types = [type(module) for module in model.modules()]
    inject_lora(model, LoRAConfig(bias=bias))
    randomize(model)
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.bias.add_(float(bias == "all"))
    remove_lora(model)
    assert_same(weights(model), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    assert [type(module) for module in model.modules()] == types
    inject_lora(model, LoRAConfig())


def test_removing_from_a_merged_model_leaves_a_plain_fine_tuned_one(batch):
    model = injected()
    unmerged = model(**batch).logits
    merge_lora(model)
    remove_lora(model)
    assert set(model.state_dict()) == set(tiny_classifier("bert").state_dict())
    torch.testing.assert_close(model(**batch).logits, unmerged, atol=1e-5, rtol=1e-5)


def test_a_failing_injection_changes_nothing():
    model = tiny_classifier("bert")
    before = weights(model)
    with pytest.raises(ValueError, match="cannot adapt"):
        inject_lora(model, LoRAConfig(target_modules=["query", "LayerNorm"]))
    assert_same(weights(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    inject_lora(model, LoRAConfig())


def test_injecting_twice_is_an_error():
    with pytest.raises(ValueError, match="has LoRA layers already; call remove_lora"):
        inject_lora(injected(), LoRAConfig())


def test_functions_on_a_plain_model_say_what_to_call():
    for function in (merge_lora, remove_lora, lora_parameters, trainable_parameter_count):
        with pytest.raises(
            ValueError, match="has no LoRA layers; got a plain BertForSequenceClassification; call inject"
        ):
            function(tiny_classifier("bert"))


def test_patterns_change_rank_and_scaling_of_what_they_match():
    model = injected(rank=4, alpha=8, rank_pattern={"query": 2}, alpha_pattern={r"layer\.1\..*": 1})
    layers = lora_layers(model)
    for name, layer in layers.items():
        rank = 2 if name.endswith("query") else 4
        assert layer.lora_A.shape == (rank, 32) and layer.lora_B.shape == (32, rank)
        assert layer.scaling == (1 if ".layer.1." in name else 8) / rank


def test_a_copied_model_is_independent(batch):
    model = injected()
    twin = copy.deepcopy(model)
    merge_lora(twin)
    assert not any(layer.merged for layer in lora_layers(model).values())
    torch.testing.assert_close(twin(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


def test_dropout_of_lora_is_off_in_evaluation(batch):
    model = injected(dropout=0.5)
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    model.train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)


def tied(kind):
    """A model whose adapted weight is another module's too, and inputs."""
    if kind == "t5":
        return tiny_model("t5"), tiny_inputs("t5"), ["embed_tokens", "q"]
    if kind == "bart":
        return tiny_model("bart"), tiny_inputs("bart"), ["encoder.embed_tokens", "q_proj"]
    model = tiny_classifier()
    query, key = (
        model.bert.encoder.layer[0].attention.self.query,
        model.bert.encoder.layer[0].attention.self.key,
    )
    if kind == "parameter":
        key.weight = query.weight
    elif kind == "memory":
        key.weight.data = query.weight.data
    else:
        both = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
        query.weight.data, key.weight.data = both[:40][:32], both[31:][:32]
    return model, tiny_batch(), ["layer.0.attention.self.query", "value"]


@pytest.mark.parametrize("form", ["module", "parametrization"])
@pytest.mark.parametrize("kind", ["t5", "bart", "parameter", "memory", "part of the memory"])
def test_a_weight_that_is_another_modules_too_is_not_merged(kind, form, tmp_path):
    model, batch, names = tied(kind)
    inject_lora(model, LoRAConfig(target_modules=names, form=form))
    randomize(model)
    before, logits = weights(model), model(**batch).logits
    for change in (merge_lora, lambda model: model.save_pretrained(tmp_path / "m")):
        with pytest.raises(ValueError, match=r"cannot merge '.*', whose weight is '.*' too") as error:
            change(model)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "m").exists() and not any(layer.merged for layer in lora_layers(model).values())
    assert_same(weights(model), before)
    assert torch.equal(model(**batch).logits, logits)


@pytest.mark.parametrize("model_type", ["albert", "twice"])
def test_a_module_that_is_used_repeatedly_is_merged(model_type, batch):
    model = tiny_classifier("albert" if model_type == "albert" else "bert", num_hidden_layers=3)
    if model_type == "twice":
        model.bert.encoder.layer[2] = model.bert.encoder.layer[0]
    inject_lora(model, LoRAConfig())
    randomize(model)
    before, logits = weights(model), model(**batch).logits
    merge_lora(model)
    torch.testing.assert_close(model(**batch).logits, logits, atol=1e-5, rtol=1e-5)
    unmerge_lora(model)
    assert_same(weights(model), before)


def test_weights_are_unmerged_in_reverse_order(monkeypatch):
    model, order = injected(), []
    merge_lora(model)
    for name, layer in lora_layers(model).items():
        monkeypatch.setattr(layer, "unmerge", partial(order.append, name))
    unmerge_lora(model)
    assert order == list(lora_layers(model))[::-1]


@pytest.mark.parametrize("form", ["module", "parametrization"])
def test_a_part_that_is_adapted_already_is_not_adapted_again(form):
    config = LoRAConfig(form=form)
    model = tiny_classifier()
    inject_lora(model.bert, config)
    other = tiny_classifier()
    other.bert = model.bert
    for outer in (model, other, model.bert.encoder):
        with pytest.raises(
            ValueError, match=r"a part of the model has LoRA layers already; got 8, first '.*query"
        ):
            inject_lora(outer, config)
    remove_lora(model.bert)
    inject_lora(model, config)
    with pytest.raises(ValueError, match="has LoRA layers already"):
        inject_lora(model.bert, config)


def test_a_model_that_peft_has_adapted_is_not_adapted_again():
    model = tiny_classifier()
    outer = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    before = weights(outer)
    for part in (model, outer):
        with pytest.raises(ValueError, match="a part of the model has LoRA layers already; got ") as error:
            inject_lora(part, LoRAConfig())
        assert "\n" not in str(error.value)
    assert_same(weights(outer), before)


@pytest.mark.parametrize("form", ["module", "parametrization"])
def test_other_factors_are_not_loaded_under_a_merged_weight(form, tmp_path):
    model = injected(form=form)
    files = read_adapter(save_adapter(model, tmp_path / "a"))
    randomize(model, 0.3)
    merge_lora(model)
    before = weights(model)
    with pytest.raises(ValueError, match="the update in the weight is another one; call unmerge_lora first"):
        load_tensors(model, files.tensors, source="a")
    assert_same(weights(model), before)
    unmerge_lora(model)
    load_tensors(model, files.tensors, source="a")
    assert_same(weights(model), weights(injected(form=form)))


@pytest.mark.parametrize("copied", [False, True], ids=["state_dict", "copied"])
@pytest.mark.parametrize("part", ["", "bert"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("form", ["module", "parametrization"])
def test_a_merged_state_is_not_loaded_into_an_adapted_model(form, strict, part, copied):
    model, merged = injected(form=form), injected(form=form)
    merge_lora(merged)
    state = merged.get_submodule(part).state_dict()
    if copied and part:
        return  # a bare mapping says nothing of itself, and only the whole model knows its base
    before = weights(model)
    with pytest.raises(ValueError, match=r"cannot load weights of a merged model; got '.*query"):
        model.get_submodule(part).load_state_dict(dict(state) if copied else state, strict=strict)
    if not part:
        assert_same(weights(model), before)
    with pytest.raises(ValueError, match=r"cannot load weights into a merged model; got '.*query"):
        merged.load_state_dict(before, strict=strict)


@pytest.mark.parametrize("form", ["module", "parametrization"])
def test_a_state_of_the_unmerged_model_is_loaded_as_torch_does(form, batch, tmp_path):
    model = injected(form=form)
    other = tiny_classifier()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    inject_lora(other, LoRAConfig(rank=4, alpha=6, form=form))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other(**batch).logits, model(**batch).logits)
    plain = tiny_classifier()
    assert other.load_state_dict(plain.state_dict(), strict=False).missing_keys
    plain.bert.load_state_dict({n: 2 * t for n, t in plain.bert.state_dict().items()})
    with pytest.raises(ValueError, match="cannot load a plain model's weights under an adapter"):
        other.load_state_dict(plain.state_dict(), strict=False)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"form": "parametrization", "bias": "all"}, {"variant": "dora"}, {"init": "pissa"}],
    ids=str,
)
@pytest.mark.parametrize("model_type", ["bert", "roberta", "deberta-v2", "gpt2"])
def test_save_pretrained_writes_the_fine_tuned_model(model_type, options, merged, batch, tmp_path):
    model = tiny_model("gpt2") if model_type == "gpt2" else tiny_classifier(model_type)
    plain_keys = set(model.state_dict())
    inject_lora(model, LoRAConfig(rank=4, alpha=6, **options))
    randomize(model)
    with torch.no_grad():
        for name in injection(model).frozen_biases:
            model.get_parameter(name).add_(0.1)
    logits = model(**batch).logits
    if merged:
        merge_lora(model)
    before = weights(model)
    model.save_pretrained(tmp_path / "m")
    assert_same(weights(model), before)
    plain = type(model).from_pretrained(tmp_path / "m").eval()
    assert set(load_file(tmp_path / "m" / "model.safetensors")) <= plain_keys
    torch.testing.assert_close(plain(**batch).logits, logits, atol=1e-5, rtol=1e-5)
    remove_lora(model)
    assert "save_pretrained" not in vars(model)


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_saves_its_own_weights(copy_of, batch, tmp_path):
    model = injected()
    twin = copy_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    logits = twin(**batch).logits
    twin.save_pretrained(tmp_path / "m", state_dict=twin.state_dict())
    plain = type(model).from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(plain(**batch).logits, logits, atol=1e-5, rtol=1e-5)
    remove_lora(twin)
    twin.load_state_dict(plain.state_dict())


def test_what_is_around_a_model_makes_no_difference(batch, tmp_path):
    expected = save_adapter(injected(), tmp_path / "plain")
    wrappers = {
        "compiled": torch.compile,
        "parallel": nn.DataParallel,
        "both": lambda m: nn.DataParallel(torch.compile(m)),
    }
    for name, wrapped in wrappers.items():
        model = injected()
        outer = wrapped(model)
        assert (
            load_file(save_adapter(outer, tmp_path / name) / "adapter_model.safetensors").keys()
            == load_file(expected / "adapter_model.safetensors").keys()
        )
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                load_file(tmp_path / name / "adapter_model.safetensors").values(),
                load_file(expected / "adapter_model.safetensors").values(),
                strict=True,
            )
        )
        for file in ("adapter_config.json", "hf_lora.json"):
            assert (tmp_path / name / file).read_bytes() == (expected / file).read_bytes()
        assert head_parameters(outer).keys() == head_parameters(model).keys()
        assert base_parameters(outer).keys() == base_parameters(model).keys()
        assert trainable_parameter_count(outer) == trainable_parameter_count(model)
        with lora_disabled(outer):
            disabled = model(**batch).logits
        assert remove_lora(outer) and not is_injected(outer)
        assert torch.equal(model(**batch).logits, disabled)
        load_adapter(outer, expected)
        assert torch.equal(model(**batch).logits, injected()(**batch).logits)


@pytest.mark.parametrize("form", ["module", "parametrization"])
def test_a_stock_trainer_writes_plain_models_and_resumes_none_of_them(form, batch, tmp_path):
    rows = [{key: tensor[row] for key, tensor in batch.items()} for row in range(4)]
    options = {"output_dir": str(tmp_path), "max_steps": 2, "save_steps": 1, "use_cpu": True, "report_to": []}
    args = TrainingArguments(**options, learning_rate=0.1, disable_tqdm=True)
    model = injected(form=form)
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "last"))
    logits = model.eval()(**batch).logits
    for directory in (tmp_path / "checkpoint-2", tmp_path / "last"):
        assert set(load_file(directory / "model.safetensors")) == set(tiny_classifier().state_dict())
        plain = type(model).from_pretrained(directory).eval()
        torch.testing.assert_close(plain(**batch).logits, logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"cannot load a plain model's weights under an adapter.*LoRATrainer"
    ):
        Trainer(injected(form=form), args, train_dataset=rows).train(resume_from_checkpoint=True)
    best = TrainingArguments(
        **{**options, "output_dir": str(tmp_path / "best")},
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        disable_tqdm=True,
    )
    with pytest.raises(ValueError, match=r"cannot load a plain model's weights under an adapter"):
        Trainer(injected(form=form), best, train_dataset=rows, eval_dataset=rows).train()
    assert (tmp_path / "best" / "checkpoint-2" / "model.safetensors").is_file()
