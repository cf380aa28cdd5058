import copy
import json
import shutil

import peft
import pytest
import safetensors.torch
import torch
from conftest import MODEL_TYPES, randomize, tiny_batch, tiny_classifier
from helpers_differential import FORMS, in_older_form
from tiny_models import tiny_inputs, tiny_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
)

from hf_lora import LoRAConfig, inject_lora, load_adapter, lora_layers, merge_lora, save_adapter
from hf_lora.adapters.directory import read_adapter
from hf_lora.adapters.peft_format import adapter_tensors
from hf_lora.lora.head import belongs_to
from hf_lora.lora.inject import injection, is_injected


@pytest.fixture
def batch():
    return tiny_batch()


def trained(model_type="bert", seed=7, **options):
    """A model as training leaves it: every trained tensor has moved."""
    model = tiny_classifier(model_type)
    inject_lora(model, LoRAConfig(**{"rank": 4, "alpha": 6, **options}))
    randomize(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_save_and_load_give_the_same_logits_exactly(model_type, bias, batch, tmp_path):
    model = trained(model_type, bias=bias)
    twin = tiny_classifier(model_type)
    load_adapter(twin, save_adapter(model, tmp_path / "a"))
    assert torch.equal(twin(**batch).logits, model(**batch).logits)
    assert {n: p.requires_grad for n, p in twin.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_peft_loads_what_we_write(model_type, bias, batch, tmp_path):
    model = trained(model_type, bias=bias, rank_pattern={r".*layer\.0\..*": 2}, alpha_pattern={".*[kq].*": 3})
    save_adapter(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny_classifier(model_type), tmp_path / "a").eval()
    torch.testing.assert_close(theirs(**batch).logits, model(**batch).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_we_load_what_peft_writes(model_type, bias, batch, tmp_path):
    ours = trained(model_type)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, task_type="SEQ_CLS", bias=bias, target_modules=sorted(read_targets(ours, tmp_path))
    )
    theirs = peft.get_peft_model(tiny_classifier(model_type), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs.eval().save_pretrained(tmp_path / "theirs")
    model = tiny_classifier(model_type)
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(model(**batch).logits, theirs(**batch).logits, atol=1e-6, rtol=1e-5)


def read_targets(model, tmp_path):
    return json.loads((save_adapter(model, tmp_path / "t") / "adapter_config.json").read_text())[
        "target_modules"
    ]


def test_a_fresh_pooler_is_saved_and_restored(batch, tmp_path):
    model = tiny_classifier("bert")
    inject_lora(model, LoRAConfig(), head=["classifier", "bert.pooler"])
    with torch.no_grad():
        model.bert.pooler.dense.weight.normal_()
    save_adapter(model, tmp_path / "a")
    twin = tiny_classifier("bert")
    load_adapter(twin, tmp_path / "a")
    assert torch.equal(twin(**batch).logits, model(**batch).logits)
    assert twin.bert.pooler.dense.weight.requires_grad
    theirs = peft.PeftModel.from_pretrained(tiny_classifier("bert"), tmp_path / "a")
    torch.testing.assert_close(theirs(**batch).logits, model(**batch).logits, atol=1e-6, rtol=1e-5)


def test_the_files_and_their_contents(tmp_path):
    model = trained(projections="qv")
    directory = save_adapter(
        model, tmp_path / "a", metrics={"eval_accuracy": 0.5}, files={"README.md": "card"}
    )
    names = {"adapter_config.json", "adapter_model.safetensors", "hf_lora.json", "README.md"}
    assert {path.name for path in directory.iterdir()} == names
    assert (directory / "README.md").read_text() == "card"
    tensors = safetensors.torch.load_file(directory / "adapter_model.safetensors")
    prefix = "base_model.model.bert.encoder.layer"
    expected = {
        f"{prefix}.{n}.attention.self.{r}.lora_{x}.weight"
        for n in (0, 1)
        for r in ("query", "value")
        for x in "AB"
    }
    assert set(tensors) == expected | {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
    config = json.loads((directory / "adapter_config.json").read_text())
    assert list(config) == sorted(config) and config["target_modules"] == ["query", "value"]
    sidecar = json.loads((directory / "hf_lora.json").read_text())
    assert sidecar["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"] and sidecar["projections"] == "qv"
    assert sidecar["metrics"] == {"eval_accuracy": 0.5}
    assert sidecar["base_model"]["fingerprint"].startswith("sha256-")


def test_a_merged_model_saves_the_same_adapter(tmp_path):
    model = trained()
    expected = adapter_tensors(model)
    fingerprint = read_adapter(save_adapter(model, tmp_path / "a")).info.base_model.fingerprint
    merge_lora(model)
    saved = read_adapter(save_adapter(model, tmp_path / "b"))
    assert saved.info.base_model.fingerprint == fingerprint
    for key, tensor in expected.items():
        assert torch.equal(saved.tensors[key], tensor), key


def test_another_base_is_refused_with_both_fingerprints(batch, tmp_path):
    directory = save_adapter(trained(), tmp_path / "a")
    trained_on = read_adapter(directory).info.base_model.fingerprint
    other = tiny_classifier("bert")
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight.mul_(1.01)
    with pytest.raises(ValueError, match="not the one the adapter") as error:
        load_adapter(other, directory)
    assert trained_on in str(error.value) and str(error.value).count("sha256-sampled-bf16:") == 2
    assert not is_injected(other)
    load_adapter(other, directory, check_base=False)


def test_a_base_in_bf16_is_the_same_base(tmp_path):
    load_adapter(tiny_classifier("bert").bfloat16(), save_adapter(trained(), tmp_path / "a"))


def rewrite(directory, change):
    """Change the tensors of an adapter as another tool would: without our sidecar."""
    (directory / "hf_lora.json").unlink()
    path = directory / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def test_large_numbers_are_not_taken_for_damage(tmp_path):
    directory = save_adapter(trained(), tmp_path / "a")
    rewrite(directory, lambda tensors: tensors[QUERY].fill_(3e38))
    model = tiny_classifier("bert")
    load_adapter(model, directory)
    lora_A = model.bert.encoder.layer[0].attention.self.query.lora_A
    assert lora_A.sum() == torch.inf and torch.equal(lora_A, torch.full_like(lora_A, 3e38))


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
CLASSIFIER = "base_model.model.classifier.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(QUERY),
            r"got 1 missing, first '.*layer\.0\.attention\.self\.query\.lora_A\.weight'",
        ),
        (lambda t: t.pop(CLASSIFIER), r"1 missing, first 'base_model\.model\.classifier\.weight'"),
        (lambda t: t.update(extra=torch.zeros(1)), "1 unexpected, first 'extra'"),
        (lambda t: t.update({QUERY: torch.zeros(3, 32)}), r"has shape \(3, 32\), expected \(4, 32\)"),
        (
            lambda t: t.update({CLASSIFIER: torch.zeros(2, 32)}),
            r"expected \(3, 32\); load the base with num_labels=2",
        ),
        (lambda t: t[QUERY].fill_(torch.nan), "is damaged; .* holds something else than finite numbers"),
        # These add up to NaN and not to infinity.
        (
            lambda t: t[CLASSIFIER][0, :2].copy_(torch.tensor([torch.inf, -torch.inf])),
            "is damaged; .*classifier",
        ),
        (
            lambda t: t.update({QUERY: torch.zeros(4, 32, dtype=torch.int64)}),
            "something else than finite numbers",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_and_the_model_stays_as_it_was(change, message, tmp_path, batch):
    directory = save_adapter(trained(), tmp_path / "a")
    rewrite(directory, change)
    model = tiny_classifier("bert")
    before = model(**batch).logits
    with pytest.raises(ValueError, match=message):
        load_adapter(model, directory)
    assert not is_injected(model) and torch.equal(model(**batch).logits, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_changed_file_is_recognised(tmp_path):
    directory = save_adapter(trained(), tmp_path / "a")
    path = directory / "adapter_model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors .* was changed after it was written"):
        read_adapter(directory)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(name, tmp_path):
    directory = save_adapter(trained(), tmp_path / "a")
    (directory / name).unlink()
    with pytest.raises(ValueError, match=f"not an adapter directory; {name} is missing"):
        read_adapter(directory)


def test_truncated_tensors_are_one_clear_error(tmp_path):
    directory = save_adapter(trained(), tmp_path / "a")
    (directory / "hf_lora.json").unlink()
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot be read"):
        read_adapter(directory)


def test_a_diverged_model_is_not_saved_over_a_good_one(tmp_path):
    model = trained()
    directory = save_adapter(model, tmp_path / "a")
    before = (directory / "adapter_model.safetensors").read_bytes()
    model.classifier.bias.data[0] = torch.nan
    with pytest.raises(
        ValueError, match=r"not saved, since training diverged; .*classifier\.bias.* lower learning rate"
    ):
        save_adapter(model, directory)
    assert (directory / "adapter_model.safetensors").read_bytes() == before


def test_saving_again_keeps_other_files(tmp_path):
    directory = save_adapter(trained(seed=1), tmp_path / "a")
    (directory / "metrics.json").write_text("{}")
    model = trained(seed=2)
    save_adapter(model, directory)
    assert (directory / "metrics.json").read_text() == "{}"
    for key, tensor in adapter_tensors(model).items():
        assert torch.equal(read_adapter(directory).tensors[key], tensor)


def test_a_moved_directory_still_loads(tmp_path, batch):
    model = trained()
    shutil.move(save_adapter(model, tmp_path / "a"), tmp_path / "b")
    twin = tiny_classifier("bert")
    load_adapter(twin, tmp_path / "b")
    assert torch.equal(twin(**batch).logits, model(**batch).logits)


def peft_adapter(base, directory, seed=5, **options):
    """An adapter of peft on a base model, trained and saved; returns peft's model."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"], **options}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(directory)
    return theirs


def logits(model, inputs):
    with torch.no_grad():
        return model(**{name: value for name, value in inputs.items() if name != "labels"}).logits


def assert_same(model, expected, inputs):
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_dora_in_transformers_and_peft(bias, batch, tmp_path):
    model = trained(variant="dora", bias=bias)
    directory = save_adapter(model, tmp_path / "a")
    expected = logits(model, batch)
    own = tiny_classifier("bert")
    own.load_adapter(directory)
    assert_same(own.eval(), expected, batch)
    assert_same(peft.PeftModel.from_pretrained(tiny_classifier("bert"), directory).eval(), expected, batch)


def test_dora_saved_with_the_names_of_before_still_loads(batch, tmp_path):
    model = trained(variant="dora")
    directory = save_adapter(model, tmp_path / "a")

    def rename(tensors):
        for key in [key for key in tensors if "magnitude" in key]:
            tensors[key.removesuffix(".weight")] = tensors.pop(key)

    info = (directory / "hf_lora.json").read_text()
    rewrite(directory, rename)
    (directory / "hf_lora.json").write_text(json.dumps({**json.loads(info), "sha256": {}}))
    twin = tiny_classifier("bert")
    load_adapter(twin, directory)
    assert torch.equal(logits(twin, batch), logits(model, batch))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"use_dora": True},
        {"modules_to_save": ["pooler"]},
        {"target_modules": ["query", "word_embeddings"]},
        {"task_type": None},
        {"task_type": None, "modules_to_save": ["classifier"]},
    ],
    ids=str,
)
def test_adapters_of_any_release_of_peft_load(options, form, batch, tmp_path):
    theirs = peft_adapter(tiny_classifier("bert"), tmp_path / "a", **{"task_type": "SEQ_CLS", **options})
    in_older_form(tmp_path / "a", form)
    model = tiny_classifier("bert")
    load_adapter(model, tmp_path / "a")
    assert_same(model, logits(theirs, batch), batch)


PARTS = [
    ("bert", {"target_modules": ["query"]}),
    ("bert", {"target_modules": "all-linear"}),
    ("roberta", {"target_modules": ["query", "dense"]}),
    ("roberta", {"target_modules": ["query"], "modules_to_save": ["out_proj"]}),
    ("deberta-v2", {"target_modules": ["query_proj"], "task_type": "SEQ_CLS"}),
    ("bart", {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    ("t5", {"target_modules": ["q"], "task_type": "SEQ_CLS"}),
    ("bigbird_pegasus", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    ("modernbert-decoder", {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    ("distilbert", {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
    ("vit", {"target_modules": ["q_proj"]}),
]


@pytest.mark.parametrize(("model_type", "options"), PARTS, ids=str)
def test_the_rest_of_the_head_is_saved_with_an_adapter_that_leaves_it_out(model_type, options, tmp_path):
    inputs = tiny_inputs(model_type)
    theirs = peft_adapter(tiny_model(model_type), tmp_path / "theirs", **options)
    expected = logits(theirs, inputs)
    model = tiny_model(model_type)
    load_adapter(model, tmp_path / "theirs")
    assert_same(model, expected, inputs)
    directory = save_adapter(model, tmp_path / "ours")
    # Another head than the base that it was loaded on: what is saved brings its own.
    twin = tiny_model(model_type)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if belongs_to(name, injection(model).head):
                parameter.zero_()
    again = copy.deepcopy(twin)
    load_adapter(twin, directory)
    assert torch.equal(logits(twin, inputs), logits(model, inputs))
    assert_same(peft.PeftModel.from_pretrained(again, directory).eval(), expected, inputs)


def test_a_part_of_a_module_to_save_is_no_whole_one(tmp_path):
    peft_adapter(tiny_classifier("roberta"), tmp_path / "a", task_type="SEQ_CLS")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["base_model.model.classifier.dense.bias"]
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"got 1 missing, first 'base_model\.model\.classifier\.dense\.bias'"
    ):
        load_adapter(tiny_classifier("roberta"), tmp_path / "a")


def test_a_module_that_is_saved_by_itself_and_as_a_part_is_refused(tmp_path):
    peft_adapter(
        tiny_classifier("roberta"), tmp_path / "a", modules_to_save=["classifier", "classifier.dense"]
    )
    model = tiny_classifier("roberta")
    with pytest.raises(ValueError, match="twice, by itself and as a part; got modules_to_save="):
        load_adapter(model, tmp_path / "a")
    assert not is_injected(model)


KINDS = {
    "TOKEN_CLS": (AutoModelForTokenClassification, "token classification, such as NER"),
    "QUESTION_ANS": (AutoModelForQuestionAnswering, "question answering"),
    "FEATURE_EXTRACTION": (AutoModel, "a bare encoder"),
}


@pytest.mark.parametrize("maker", ["ours", "peft", "peft without a task"])
@pytest.mark.parametrize("task", KINDS)
def test_an_adapter_for_another_task_says_what_it_is_for(task, maker, tmp_path):
    auto, words = KINDS[task]
    base = auto.from_config(tiny_classifier("bert", num_labels=2).config).eval()
    plain = copy.deepcopy(base)
    if maker == "ours":
        inject_lora(base, LoRAConfig(rank=4))
        randomize(base)
        save_adapter(base, tmp_path / "a")
    else:
        head = {"TOKEN_CLS": ["classifier"], "QUESTION_ANS": ["qa_outputs"]}.get(task)
        named = {"task_type": task} if maker == "peft" else {"modules_to_save": head}
        base = peft_adapter(base, tmp_path / "a", **named)
    with pytest.raises(
        ValueError, match=f"is for {words}; got task_type='{task}'; expected 'SEQ_CLS'; .*{auto.__name__} "
    ):
        load_adapter(tiny_classifier("bert"), tmp_path / "a")
    # Into a model of its kind it goes.
    load_adapter(plain, tmp_path / "a")
    inputs = {name: value for name, value in tiny_batch().items() if name != "labels"}
    for got, expected in zip(plain(**inputs).to_tuple(), base(**inputs).to_tuple(), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert peft.PeftModel.from_pretrained(auto.from_config(plain.config), tmp_path / "a")


def test_updates_alone_go_into_a_model_with_another_head(tmp_path):
    model = tiny_model("llama")
    base = AutoModelForCausalLM.from_config(model.config)
    theirs = peft_adapter(base, tmp_path / "a", target_modules=["q_proj"], task_type="CAUSAL_LM")
    load_adapter(model, tmp_path / "a")
    key = "model.layers.0.self_attn.q_proj"
    expected = theirs.base_model.model.get_submodule(key).get_delta_weight("default")
    torch.testing.assert_close(lora_layers(model)[key].delta_weight(), expected)
