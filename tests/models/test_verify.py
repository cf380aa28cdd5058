import copy
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import MODEL_TYPES, tiny_batch, tiny_classifier, tiny_tokenizer
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from hf_lora import LoRAConfig, inject_lora, lora_disabled, lora_layers, lora_parameters, merge_lora
from hf_lora.lora.architectures import ARCHITECTURES
from hf_lora.models.verify import VerificationReport, probe_batch, verify_injection

FORMS = ["module", "parametrization"]
# Their last block computes more than the head reads.
PARTLY_UNUSED = {"canine", "longformer", "luke", "lilt"}
WITH_ROLES = [model_type for model_type, entry in ARCHITECTURES.items() if entry.reason is None]


class Blocks(nn.Module):
    """Attention whose out_proj is a plain Linear that it reads the weight of, and layers dead in other ways."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.attention.out_proj.__class__ = nn.Linear
        self.live, self.zeroed, self.uncalled, self.detached = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("nothing", None)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, labels=None):
        self.calls += 1
        torch.rand(1)
        x = self.drop(self.table(input_ids))
        x = x + self.attention(x, x, x)[0] + 0.0 * self.zeroed(x) + self.detached(x).detach()
        x = self.norm(self.live(x).mean(1))
        if labels is not None and labels[0] == 99:
            raise RuntimeError("out of memory")
        return SimpleNamespace(logits=self.head(x))


BATCH = {"input_ids": torch.arange(1, 13).reshape(2, 6), "labels": torch.tensor([0, 1])}
DEAD = ["attention.out_proj", "zeroed", "uncalled", "detached"]


def blocks(targets, form="module", **options):
    model = Blocks()
    inject_lora(
        model, LoRAConfig(target_modules=tuple(targets), form=form, rank=2, **options), head=("head",)
    )
    return model


def state(model):
    """Everything that the probe could leave behind."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "buffers": {name: (id(buffer), buffer.clone()) for name, buffer in model.named_buffers()},
        "gradients": {
            name: None if p.grad is None else (id(p.grad), p.grad.clone())
            for name, p in model.named_parameters()
        },
        "required": {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "global hooks": len(torch.nn.modules.module._global_forward_hooks),
        "random": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_same(left, right):
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for name in left:
            assert_same(left[name], right[name])
    elif isinstance(left, tuple):
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right)
    else:
        assert left == right


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bert_style_models_pass_in_both_forms(model_type, form):
    model = tiny_classifier(model_type)
    inject_lora(model, LoRAConfig(form=form))
    for batch in (tiny_batch(), probe_batch(model)):
        with mock.patch.object(model, "forward", wraps=model.forward) as forward:
            report = verify_injection(model, batch)
        assert report.layers == len(lora_layers(model)) and not report.unused
        assert forward.call_count == 2


@pytest.mark.parametrize("model_type", WITH_ROLES)
def test_every_model_type_of_the_table_passes(model_type):
    model = tiny_model(model_type)
    inject_lora(model, LoRAConfig(rank=2))
    report = verify_injection(model, tiny_inputs(model_type), allow_unused=True)
    assert not report.unused or model_type in PARTLY_UNUSED, report.unused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_bases_pass(dtype, form):
    model = tiny_classifier("bert").to(dtype)
    inject_lora(model, LoRAConfig(form=form))
    assert lora_parameters(model).popitem()[1].dtype == torch.float32
    verify_injection(model, probe_batch(model))


@pytest.mark.parametrize(
    "options", [{"dropout": 0.9}, {"projections": "o", "layers": (0,)}, {"train_head": False}]
)
def test_the_config_does_not_matter(options):
    model = tiny_classifier("bert").train()
    inject_lora(model, LoRAConfig(**options))
    verify_injection(model, tiny_batch())


@pytest.mark.parametrize("name", DEAD)
def test_a_dead_layer_is_named_and_the_live_one_is_not(name):
    with pytest.raises(ValueError, match=rf"no effect at {name}: .*; try .*got 1 such layers of 2") as raised:
        verify_injection(blocks([name, "live"]), BATCH)
    assert "live" not in str(raised.value) and "\n" not in str(raised.value)


def test_all_dead_layers_are_named_with_their_reasons():
    with pytest.raises(ValueError) as raised:
        verify_injection(blocks([*DEAD, "live"]), BATCH)
    _, bypassed, unused = str(raised.value).split("no effect at ")
    assert bypassed.startswith("attention.out_proj: the model reads the weight")
    assert unused.startswith("zeroed, uncalled, detached: the model does not use these layers")
    assert "got 4 such layers of 5" in unused


def test_layers_that_the_model_does_not_use_can_be_allowed_and_bypassed_ones_cannot():
    model = blocks([*DEAD[1:], "live"])
    with mock.patch.object(model, "forward", wraps=model.forward) as forward:
        report = verify_injection(model, BATCH, allow_unused=True)
    assert report.unused == ("zeroed", "uncalled", "detached") and forward.call_count == 3
    expected = (
        "verified: 1 of 4 adapted layers act on the output; the model does not use zeroed, uncalled, detached"
    )
    assert str(report) == expected
    with pytest.raises(ValueError, match=r"no effect at attention.out_proj: .*got 1 such layers of 5"):
        verify_injection(blocks([*DEAD, "live"]), BATCH, allow_unused=True)
    with pytest.raises(ValueError, match="no effect at zeroed"):
        verify_injection(blocks(["zeroed"]), BATCH, allow_unused=True)


def test_the_weight_space_form_reaches_the_layer_that_is_bypassed():
    verify_injection(blocks(["attention.out_proj", "live"], form="parametrization"), BATCH)
    with pytest.raises(ValueError, match="no effect at uncalled: the model does not use"):
        verify_injection(blocks(["uncalled", "live"], form="parametrization"), BATCH)


def test_a_model_without_any_gradient_is_dead():
    model = blocks(["live"])
    model.forward = torch.no_grad()(model.forward)
    with pytest.raises(ValueError, match="no effect at live"):
        verify_injection(model, BATCH)


class Fused(nn.Module):
    """A fused query-key-value weight, of which the value is not used."""

    def __init__(self, used):
        super().__init__()
        self.config = AutoConfig.for_model("modernbert", hidden_size=8, num_attention_heads=2)
        self.base_model = nn.Module()
        self.base_model.attn = nn.Module()
        self.base_model.attn.Wqkv = nn.Linear(8, 24)
        self.used = used

    def forward(self, x):
        return self.base_model.attn.Wqkv(x)[..., : self.used].sum(1)


def test_a_part_of_a_fused_weight_can_be_dead():
    torch.manual_seed(0)
    x = {"x": torch.randn(2, 3, 8)}
    live, dead = Fused(24), Fused(16)
    for model in (live, dead):
        inject_lora(model, LoRAConfig(projections="qv", rank=2), head=())
    verify_injection(live, x)
    with pytest.raises(ValueError, match=r"base_model.attn.Wqkv \(part 2 of 2\): the model does not use"):
        verify_injection(dead, x)


class Encoder(nn.Module):
    """torch's own encoder layer, which in evaluation without gradients runs as one kernel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 8)
        self.first = nn.Linear(8, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids):
        return self.head(self.layer(self.first(self.table(input_ids))).mean(1))


@pytest.mark.parametrize("targets", [("linear1",), ("linear1", "first")])
def test_a_layer_that_acts_in_training_only_is_named(targets):
    model = Encoder()
    inject_lora(model, LoRAConfig(target_modules=targets), head=("head",))
    inputs = {"input_ids": BATCH["input_ids"]}
    with torch.no_grad():
        before = model.eval()(**inputs)
        lora_parameters(model)["layer.linear1.lora_B"].fill_(1.0)
        # The premise: torch's kernel ignores the adapter.
        assert torch.equal(model(**inputs), before)
    with pytest.raises(ValueError, match=r"no effect at layer.linear1: these layers act in training only"):
        verify_injection(model, inputs)
    model = Encoder()
    inject_lora(model, LoRAConfig(target_modules=targets, form="parametrization"), head=("head",))
    verify_injection(model, inputs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("outcome", ["passes", "finds a dead layer", "raises"])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_left_behind(form, outcome, training):
    model = blocks(
        ["live", "zeroed"] if outcome == "finds a dead layer" else ["live"], form=form, dropout=0.5
    )
    model.train(training)
    model.norm.train(not training)
    nn.init.normal_(lora_parameters(model)["live.lora_B"])
    lora_parameters(model)["live.lora_B"].requires_grad_(False)
    model(BATCH["input_ids"]).logits.sum().backward()
    assert model.head.weight.grad is not None and model.table.weight.grad is None
    batch = {**BATCH, "labels": torch.tensor([99, 0])} if outcome == "raises" else BATCH
    before = state(model)
    with torch.set_grad_enabled(training):
        if outcome == "passes":
            verify_injection(model, batch)
        else:
            expected = RuntimeError if outcome == "raises" else ValueError
            with pytest.raises(expected, match=r"out of memory|no effect at zeroed"):
                verify_injection(model, batch)
    assert_same(before, state(model))


def test_training_goes_on_as_without_the_probe():
    losses = []
    for probed in (False, True):
        model = tiny_classifier("bert").train()
        inject_lora(model, LoRAConfig(dropout=0.1))
        torch.manual_seed(5)
        if probed:
            verify_injection(model, probe_batch(model))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(3):
            loss = model(**tiny_batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss)
    assert torch.equal(*losses)


def test_merged_and_disabled_models_are_refused():
    model = tiny_classifier("bert")
    with pytest.raises(ValueError, match="no LoRA layers"):
        verify_injection(model, tiny_batch())
    inject_lora(model, LoRAConfig())
    with (
        lora_disabled(model),
        pytest.raises(ValueError, match=r"or disabled adapter; .*outside lora_disabled"),
    ):
        verify_injection(model, tiny_batch())
    merge_lora(model)
    with pytest.raises(ValueError, match=r"a merged or disabled adapter; .*call unmerge_lora first"):
        verify_injection(model, tiny_batch())


def test_an_output_that_is_not_finite_proves_nothing():
    model = blocks(["live"])
    model.head.bias.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="logits that are not finite"):
        verify_injection(model, BATCH)


def test_a_trained_adapter_passes_and_the_report_says_so():
    model = tiny_classifier("bert")
    inject_lora(model, LoRAConfig(rank=2))
    for parameter in lora_parameters(model).values():
        nn.init.zeros_(parameter)
    report = verify_injection(copy.deepcopy(model), tiny_batch())
    count = len(lora_layers(model))
    assert isinstance(report, VerificationReport)
    assert str(report) == f"verified: {count} of {count} adapted layers act on the output"


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "shape", "dtype"),
    [
        (None, 3, (2,), torch.long),
        ("single_label_classification", 2, (2,), torch.long),
        ("multi_label_classification", 3, (2, 3), torch.float32),
        ("regression", 1, (2,), torch.float32),
        ("regression", 2, (2, 2), torch.float32),
        (None, 1, (2,), torch.float32),
    ],
)
def test_the_probe_batch_has_labels_of_the_problem_type(problem_type, num_labels, shape, dtype):
    model = tiny_classifier("bert", num_labels, problem_type=problem_type)
    inject_lora(model, LoRAConfig())
    batch = probe_batch(model)
    assert batch["labels"].shape == shape and batch["labels"].dtype == dtype
    assert torch.isfinite(model(**batch).loss)
    verify_injection(model, batch)


def test_the_probe_batch_has_the_special_tokens_in_their_places():
    model, tokenizer = tiny_classifier("bert"), tiny_tokenizer()
    ids = probe_batch(model, tokenizer)["input_ids"]
    assert ids[:, 0].tolist() == [tokenizer.cls_token_id] * 2
    assert ids[:, -1].tolist() == [tokenizer.sep_token_id] * 2
    inner = ids[:, 1:-1].flatten().tolist()
    assert len(set(inner)) == len(inner) and not set(inner) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        (
            "t5",
            {
                "d_model": 32,
                "d_kv": 8,
                "d_ff": 64,
                "num_layers": 2,
                "num_heads": 4,
                "decoder_start_token_id": 0,
            },
        ),
        ("bart", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}),
    ],
)
def test_encoder_decoder_models_read_the_class_at_the_end_token(model_type, sizes):
    model = tiny_classifier(model_type, **sizes)
    batch = probe_batch(model)
    assert (batch["input_ids"] == model.config.eos_token_id).sum(1).tolist() == [1, 1]
    assert model(**batch).logits.shape == (2, 3)


def test_image_models_get_images():
    config = AutoConfig.for_model("vit", image_size=8, patch_size=4, hidden_size=32, num_hidden_layers=1)
    config.num_attention_heads, config.intermediate_size, config.num_labels = 4, 64, 3
    model = AutoModelForImageClassification.from_config(config).eval()
    batch = probe_batch(model)
    assert batch["pixel_values"].shape == (2, 3, 8, 8) and model(**batch).logits.shape == (2, 3)
    names = tuple(name for name, module in model.vit.named_modules() if type(module) is nn.Linear)
    inject_lora(model, LoRAConfig(target_modules=names))
    verify_injection(model, batch)


def test_other_models_need_a_batch_of_their_own():
    with pytest.raises(ValueError, match="cannot make a batch for a Blocks"):
        probe_batch(Blocks())
