import json

import pytest
import safetensors.torch
import torch
from conftest import LABELS, randomize
from tiny_models import tiny_model
from transformers import AutoModelForSequenceClassification

from hf_lora import LoRAConfig, head_parameters, inject_lora, load_classifier, lora_parameters, save_adapter
from hf_lora.lora.inject import injection
from hf_lora.models.loading import cast_frozen, meta_classifier
from hf_lora.serving.classifier import load_trained


@pytest.fixture
def classifier(tiny_bert_dir):
    return load_classifier(str(tiny_bert_dir), LABELS, LoRAConfig(rank=4))[0]


def without_pooler(directory, target):
    """The same checkpoint as a model that was pretrained without a pooler."""
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    target.mkdir()
    for path in directory.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    assert len(kept) == len(tensors) - 2
    safetensors.torch.save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def test_labels_task_and_base_are_recorded(classifier, tiny_bert_dir):
    assert classifier.config.id2label == {0: "negative", 1: "positive"}
    assert classifier.config.num_labels == 2
    info = injection(classifier).info
    assert info.labels == LABELS and info.base_model.name_or_path == str(tiny_bert_dir)
    assert info.base_model.fingerprint.startswith("sha256-")


def test_the_encoder_has_the_checkpoints_weights(classifier, tiny_bert_dir):
    own = classifier.state_dict()
    for name, tensor in safetensors.torch.load_file(tiny_bert_dir / "model.safetensors").items():
        assert torch.equal(own[f"bert.{name}"], tensor), name


def test_a_fresh_pooler_is_trained_saved_and_restored(tiny_bert_dir, tmp_path):
    base = without_pooler(tiny_bert_dir, tmp_path / "base")
    model, tokenizer = load_classifier(base, LABELS, LoRAConfig(rank=4))
    assert injection(model).head == ("classifier", "bert.pooler")
    assert model.bert.pooler.dense.weight.requires_grad
    randomize(model)
    save_adapter(model, tmp_path / "a", tokenizer=tokenizer)
    torch.manual_seed(99)
    twin, _, _ = load_trained(tmp_path / "a")
    for name, parameter in head_parameters(model).items():
        assert torch.equal(parameter, head_parameters(twin)[name]), name


def test_a_head_that_nobody_has_weights_for_is_refused(tiny_bert_dir, tmp_path):
    base = without_pooler(tiny_bert_dir, tmp_path / "base")
    model, tokenizer = load_classifier(str(tiny_bert_dir), LABELS, LoRAConfig(rank=4))
    directory = save_adapter(model, tmp_path / "a", tokenizer=tokenizer)
    with pytest.raises(
        ValueError, match=r"neither the adapter .* nor its base .* has weights for 2 tensors.*pooler"
    ):
        load_trained(directory, base=base, check_base=False)


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


def test_a_trained_directory_needs_no_other_argument(adapter_dir, tiny_bert_dir):
    model, tokenizer, info = load_trained(adapter_dir)
    assert info.labels == LABELS and info.max_length == 32 and not model.training
    assert tokenizer("the film").input_ids[0] == tokenizer.cls_token_id


def test_a_foreign_adapter_gets_numbered_labels(adapter_dir, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (foreign / name).write_bytes((adapter_dir / name).read_bytes())
    model, _, info = load_trained(foreign)
    assert info.labels == ("LABEL_0", "LABEL_1") and model.config.num_labels == 2


def test_an_adapter_without_a_base_asks_for_it(adapter_dir, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (foreign / "adapter_config.json").write_text(json.dumps(config))
    (foreign / "adapter_model.safetensors").write_bytes(
        (adapter_dir / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match="names no base model; pass base="):
        load_trained(foreign)


def test_the_meta_classifier_has_names_and_shapes_only(tiny_bert_dir):
    model = meta_classifier(str(tiny_bert_dir), num_labels=5)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.classifier.weight.shape == (5, 32)


def test_adapters_record_the_hub_id_and_never_a_path_of_the_machine(minilm, tmp_path):
    model, tokenizer = load_classifier(minilm, ["a", "b"])
    directory = save_adapter(model, tmp_path / "a", tokenizer=tokenizer)
    text = "".join((directory / name).read_text() for name in ("adapter_config.json", "hf_lora.json"))
    text += (directory / "tokenizer_config.json").read_text()
    assert minilm in text and "site-packages" not in text
    # 6 layers, 4 projections, rank 8: 6 * 4 * 8 * (384 + 384), and a head of 2 * 384 + 2.
    assert sum(p.numel() for p in lora_parameters(model).values()) == 147_456
    assert sum(p.numel() for p in head_parameters(model).values()) == 770


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
