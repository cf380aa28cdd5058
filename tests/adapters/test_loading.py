"""What a loaded classifier knows of itself, and what its adapter brings back."""

import pytest
import torch
from conftest import LABELS, randomize, tiny_classifier, tiny_tokenizer, without_pooler

from hf_lora import LoRAConfig, head_parameters, load_classifier, lora_parameters, save_adapter
from hf_lora.lora.head import output_layer_in
from hf_lora.lora.inject import injection
from hf_lora.serving.loading import load_trained


@pytest.fixture
def classifier(tiny_bert_dir):
    return load_classifier(str(tiny_bert_dir), LABELS, LoRAConfig(rank=4))[0]


def test_labels_task_and_base_are_recorded(classifier, tiny_bert_dir):
    assert classifier.config.id2label == {0: "negative", 1: "positive"}
    assert classifier.config.num_labels == 2
    info = injection(classifier).info
    assert info.labels == LABELS and info.base_model.name_or_path == str(tiny_bert_dir)
    assert info.base_model.fingerprint.startswith("sha256-")


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


def test_adapters_record_the_hub_id_and_never_a_path_of_the_machine(minilm, tmp_path):
    model, tokenizer = load_classifier(minilm, ["a", "b"])
    directory = save_adapter(model, tmp_path / "a", tokenizer=tokenizer)
    text = "".join((directory / name).read_text() for name in ("adapter_config.json", "hf_lora.json"))
    text += (directory / "tokenizer_config.json").read_text()
    assert minilm in text and "site-packages" not in text
    # 6 layers, 4 projections, rank 8: 6 * 4 * 8 * (384 + 384), and a head of 2 * 384 + 2.
    assert sum(p.numel() for p in lora_parameters(model).values()) == 147_456
    assert sum(p.numel() for p in head_parameters(model).values()) == 770


def trained_base(directory, names, model_type="bert"):
    """A checkpoint with a trained head whose rows have these names, and that head's last layer."""
    model = tiny_classifier(model_type, num_labels=len(names))
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    tiny_tokenizer().save_pretrained(directory)
    layer = model.classifier if model_type in ("bert", "distilbert", "albert") else model.classifier.out_proj
    torch.nn.init.normal_(layer.bias)
    model.save_pretrained(directory)
    return {"weight": layer.weight, "bias": layer.bias}


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra"])
@pytest.mark.parametrize(
    ("names", "labels", "rows", "words"),
    [
        (("a", "b", "c"), ("a", "b", "c"), (0, 1, 2), ""),
        (("A", "b ", "C"), ("a", "b", "c"), (0, 1, 2), ""),
        (("b", "a"), ("a", "b"), (1, 0), "has these labels in another order"),
        (("B", "C", "A"), ("a", "b", "c"), (2, 0, 1), "has these labels in another order"),
        (
            ("LABEL_0", "LABEL_1"),
            ("a", "b"),
            None,
            "is for other labels, ['LABEL_0', 'LABEL_1']: its last layer",
        ),
        (
            ("happy", "sad"),
            ("a", "b"),
            None,
            "is for other labels, ['happy', 'sad']: its last layer starts anew",
        ),
        (("a", "A"), ("a", "b"), None, "is for other labels"),
    ],
)
def test_a_trained_head_is_kept_by_the_names_of_its_labels(
    names, labels, rows, words, model_type, tmp_path, caplog
):
    saved = trained_base(tmp_path / "base", names, model_type)
    model, _ = load_classifier(str(tmp_path / "base"), labels, LoRAConfig(rank=2))
    name, layer = output_layer_in(model, injection(model).head, len(labels))
    if rows is None:
        assert not torch.isclose(layer.weight, saved["weight"]).any()
        assert {f"{name}.weight", f"{name}.bias"} <= injection(model).fresh
    else:
        for which, tensor in saved.items():
            assert torch.equal(getattr(layer, which), tensor[list(rows)]), which
        assert not any(each.startswith(f"{name}.") for each in injection(model).fresh)
    assert words in caplog.text and bool(words) == ("the checkpoint's head" in caplog.text)


def test_a_base_without_a_head_is_not_said_to_have_one(tiny_bert_dir, caplog):
    load_classifier(str(tiny_bert_dir), LABELS, LoRAConfig(rank=2))
    assert "the checkpoint's head" not in caplog.text
