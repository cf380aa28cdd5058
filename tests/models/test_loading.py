"""Base models with a head, their precision, and casts of the encoder."""

import pytest
import safetensors.torch
import torch
from conftest import LABELS, without_pooler
from tiny_models import tiny_model
from transformers import AutoModelForSequenceClassification

from hf_lora import LoRAConfig, head_parameters, inject_lora, load_classifier, lora_parameters
from hf_lora.lora.inject import injection
from hf_lora.models.loading import Precision, cast_frozen, choose_precision, meta_classifier


@pytest.fixture
def classifier(tiny_bert_dir):
    return load_classifier(str(tiny_bert_dir), LABELS, LoRAConfig(rank=4))[0]


def test_the_encoder_has_the_checkpoints_weights(classifier, tiny_bert_dir):
    own = classifier.state_dict()
    for name, tensor in safetensors.torch.load_file(tiny_bert_dir / "model.safetensors").items():
        assert torch.equal(own[f"bert.{name}"], tensor), name


def test_a_checkpoint_of_another_architecture_is_refused(tiny_bert_dir, tmp_path):
    tensors = safetensors.torch.load_file(tiny_bert_dir / "model.safetensors")
    (tmp_path / "base").mkdir()
    for path in tiny_bert_dir.iterdir():
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    other = {name.replace("attention.self.query", "attn.q"): tensor for name, tensor in tensors.items()}
    other = {name.replace("output.dense", "fc"): tensor for name, tensor in other.items()}
    safetensors.torch.save_file(other, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the checkpoint does not fit the model; got no weights for"):
        load_classifier(str(tmp_path / "base"), LABELS)


@pytest.mark.parametrize("labels", [[], ["a", "a"]])
def test_unusable_labels_are_refused(labels, tiny_bert_dir):
    with pytest.raises(ValueError, match="labels are not usable"):
        load_classifier(str(tiny_bert_dir), labels)


def test_a_base_in_bf16_keeps_head_and_adapter_in_fp32(tiny_bert_dir):
    model, _ = load_classifier(str(tiny_bert_dir), LABELS, dtype=torch.bfloat16)
    trained = {**lora_parameters(model), **head_parameters(model)}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if n not in trained} == {torch.bfloat16}


def test_a_classification_checkpoint_with_other_labels_gets_a_fresh_head(tiny_bert_dir, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=7)
    model.save_pretrained(tmp_path / "seven")
    for path in tiny_bert_dir.glob("tokenizer*"):
        (tmp_path / "seven" / path.name).write_bytes(path.read_bytes())
    loaded, _ = load_classifier(str(tmp_path / "seven"), LABELS)
    assert loaded.classifier.weight.shape == (2, 32)


def test_the_meta_classifier_has_names_and_shapes_only(tiny_bert_dir):
    model = meta_classifier(str(tiny_bert_dir), num_labels=5)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.classifier.weight.shape == (5, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_in_fp32_on_an_encoder_of_either_precision_trains_without_autocast(tiny_bert_dir, dtype):
    model, tokenizer = load_classifier(tiny_bert_dir, ["no", "yes"], dtype=dtype)
    exact, _ = load_classifier(tiny_bert_dir, ["no", "yes"])
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    batch = tokenizer(["one text", "another"], padding=True, return_tensors="pt")
    logits = model.eval()(**batch).logits
    assert logits.dtype == torch.float32 and model.bert.embeddings.word_embeddings.weight.dtype == dtype
    torch.testing.assert_close(logits, exact.eval()(**batch).logits, atol=0.03, rtol=0.03)
    logits.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.dtype == p.grad.dtype == torch.float32 for p in trained)


def test_casting_leaves_adapter_head_and_tables_of_angles_in_fp32():
    model = tiny_model("llama")
    inject_lora(model, LoRAConfig(rank=2))
    angles = model.model.rotary_emb.inv_freq.clone()
    cast_frozen(model, torch.bfloat16)
    kept = {id(p) for p in (*lora_parameters(model).values(), *head_parameters(model).values())}
    assert len(kept) == 2 * 2 * 4 + 1
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if id(parameter) in kept else torch.bfloat16), name
    assert torch.equal(model.model.rotary_emb.inv_freq, angles) and angles.dtype == torch.float32
    # As transformers does it.
    twin = type(model)._from_config(model.config, dtype=torch.bfloat16)
    assert twin.model.rotary_emb.inv_freq.dtype == torch.float32


def test_casting_back_and_forth_does_not_cast_the_head(classifier):
    head = classifier.classifier.weight.detach().clone()
    cast_frozen(classifier, torch.bfloat16)
    cast_frozen(classifier, torch.float32)
    assert {p.dtype for p in classifier.parameters()} == {torch.float32}
    assert torch.equal(classifier.classifier.weight, head)


def test_a_head_inside_the_encoder_is_cast_with_it(tiny_bert_dir, tmp_path):
    base = without_pooler(tiny_bert_dir, tmp_path / "base")
    model, _ = load_classifier(base, LABELS, LoRAConfig(rank=4))
    assert "bert.pooler" in injection(model).head
    ids = torch.arange(5, 15)[None]
    expected = model.eval()(ids).logits
    cast_frozen(model, torch.bfloat16)
    assert model.bert.pooler.dense.weight.dtype == torch.bfloat16
    assert model.classifier.weight.dtype == model(ids).logits.dtype == torch.float32
    torch.testing.assert_close(model(ids).logits, expected, rtol=0.05, atol=0.01)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_what_is_asked_for_is_chosen(name, dtype):
    precision = choose_precision(name)
    assert (precision.name, precision.dtype) == (name, dtype)
    assert str(precision) == f"precision: {name} (as asked for)"


SLOW = Precision("fp32", "this CPU does not multiply bf16 faster")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, SLOW),
        ({"avx512_f": True, "avx512_bf16": False}, SLOW),
        # It has an instruction for it, and is slower with it.
        ({"avx512_bf16": True}, SLOW),
        (
            {"avx512_bf16": True, "amx_bf16": True},
            Precision("bf16", "this CPU multiplies bf16 natively: amx_bf16"),
        ),
    ],
)
def test_auto_follows_the_instructions_of_the_cpu(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_precision("auto", "cpu") == expected


@pytest.mark.parametrize(("native", "name"), [(True, "bf16"), (False, "fp32")])
def test_auto_follows_the_gpu_where_there_is_one(monkeypatch, native, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert choose_precision().name == name


def test_a_device_without_a_rule_is_fp32():
    assert choose_precision("auto", "mps").name == "fp32"


def test_another_word_is_refused():
    with pytest.raises(
        ValueError,
        match="unknown precision; got 'fp16'; expected one of auto, fp32, bf16; did you mean 'bf16'",
    ):
        choose_precision("fp16")


@pytest.mark.parametrize("given", [{"autocast": True}, {"sharded": True}])
def test_auto_is_fp32_where_something_else_decides(monkeypatch, given):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert choose_precision("auto", "cpu", **given).name == "fp32"
    assert choose_precision("bf16", "cpu", **given).name == "bf16"
