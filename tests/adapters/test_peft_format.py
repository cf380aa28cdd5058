import json

import peft
import pytest
import torch
from conftest import tiny_classifier

from hf_lora import LoRAConfig, inject_lora
from hf_lora.adapters.peft_format import (
    PREFIX,
    as_today,
    bias_key,
    from_peft,
    shortest_suffixes,
    task_of_class,
    to_peft,
)

KEYS = ["base_model.model.a.query.lora_A.weight"]


def injected(**options):
    model = tiny_classifier("bert")
    inject_lora(model, LoRAConfig(**options))
    return model


def test_peft_reads_every_key_of_the_configuration(tmp_path, recwarn):
    model = injected(rank=4, alpha=6, dropout=0.2, bias="lora_only", rank_pattern={"query": 2})
    values = to_peft(model, base_name="some/base", revision="abc")
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    theirs = peft.LoraConfig.from_pretrained(tmp_path)
    assert not [warning for warning in recwarn if "Unexpected keyword" in str(warning.message)]
    assert (theirs.r, theirs.lora_alpha, theirs.lora_dropout, theirs.bias) == (4, 6, 0.2, "lora_only")
    assert theirs.rank_pattern == {"query": 2} and theirs.base_model_name_or_path == "some/base"
    assert theirs.modules_to_save == ["classifier"]


def test_the_configuration_comes_back():
    config = LoRAConfig(rank=4, alpha=6, dropout=0.2, bias="all", alpha_pattern={"key": 3.0})
    model = tiny_classifier("bert")
    names = inject_lora(model, config)
    keys = [f"base_model.model.{name}.lora_A.weight" for name in names]
    read = from_peft(to_peft(model, base_name=None, revision=None), keys)
    twin = tiny_classifier("bert")
    assert inject_lora(twin, read) == names
    assert [read.scaling_of(n) for n in names] == [config.scaling_of(n) for n in names]
    assert (read.dropout, read.bias) == (0.2, "all")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"projections": "qv"}, {"query", "value"}),
        ({"projections": "qo"}, {"attention.self.query", "attention.output.dense"}),
        ({"projections": "q", "layers": [1]}, {"1.attention.self.query"}),
        ({"projections": "qv", "form": "parametrization"}, {"query", "value"}),
    ],
)
def test_suffixes_are_the_shortest_that_select_the_same_modules(options, expected):
    model = injected(**options)
    assert set(shortest_suffixes(model)) == expected


def test_tensors_that_the_configuration_does_not_name_are_refused():
    with pytest.raises(ValueError, match=r"disagree; got 'a\.value'; expected one of \['query'\]"):
        from_peft(
            {"peft_type": "LORA", "target_modules": ["query"]},
            [*KEYS, "base_model.model.a.value.lora_A.weight"],
        )
    with pytest.raises(ValueError, match="has no LoRA tensors"):
        from_peft({"peft_type": "LORA", "target_modules": ["query"]}, ["base_model.model.classifier.weight"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_replication", [[0, 4]]),
        ("target_parameters", ["experts.weight"]),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [1]),
        ("use_qalora", True),
        ("use_bdlora", {"x": 1}),
        ("kasa_config", {"x": 1}),
        ("velora_config", {"x": 1}),
    ],
)
def test_what_we_cannot_represent_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=key):
        from_peft({"peft_type": "LORA", "target_modules": ["query"], key: value}, KEYS)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq"])
def test_initializations_that_rewrite_the_base_are_refused(init):
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' rewrites the base weights"):
        from_peft({"peft_type": "LORA", "target_modules": ["query"], "init_lora_weights": init}, KEYS)


def test_other_peft_methods_are_refused():
    with pytest.raises(ValueError, match="not a LoRA adapter; got peft_type='IA3'"):
        from_peft({"peft_type": "IA3"}, KEYS)


def test_names_of_tensors():
    assert bias_key("a.query.bias", {"a.query"}) == "base_model.model.a.query.base_layer.bias"
    assert bias_key("a.LayerNorm.bias", {"a.query"}) == "base_model.model.a.LayerNorm.bias"


def test_second_copies_that_peft_writes_are_dropped():
    keys = {
        "m.classifier.bias": 1.0,
        "m.classifier.modules_to_save.bias": 1.0,
        "m.pooler.modules_to_save.default.dense.bias": 2.0,
        "m.pooler.dense.bias": 2.0,
        "m.classifier.original_module.bias": 3.0,
        "m.other.modules_to_save.bias": 4.0,
    }
    read = as_today({key: torch.tensor(value) for key, value in keys.items()})
    assert {key: tensor.item() for key, tensor in read.items()} == {
        "m.classifier.bias": 1.0,
        "m.pooler.dense.bias": 2.0,
        "m.other.bias": 4.0,
    }


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("a.query.lora_A.default.weight", "a.query.lora_A.weight"),
        ("a.query.lora_B.mine.weight", "a.query.lora_B.weight"),
        ("a.words.lora_embedding_A.default", "a.words.lora_embedding_A"),
        ("a.query.lora_magnitude_vector", "a.query.lora_magnitude_vector.weight"),
        ("a.query.lora_magnitude_vector.weight", "a.query.lora_magnitude_vector.weight"),
        ("a.query.lora_magnitude_vector.default", "a.query.lora_magnitude_vector.weight"),
        ("a.query.lora_magnitude_vector.default.weight", "a.query.lora_magnitude_vector.weight"),
        ("a.value.bias", "a.value.base_layer.bias"),
        ("a.value.weight", "a.value.base_layer.weight"),
        ("a.key.bias", "a.key.bias"),
    ],
)
def test_keys_of_other_releases_are_read_as_todays(written, key):
    adapted = f"{PREFIX}a.value.lora_A.weight"
    tensors = as_today({f"{PREFIX}{written}": torch.ones(1), adapted: torch.zeros(1)})
    assert tensors == {f"{PREFIX}{key}": torch.ones(1), adapted: torch.zeros(1)}


def test_two_adapters_in_one_file_are_refused():
    keys = [f"{PREFIX}a.query.lora_A.{name}.weight" for name in ("first", "second")]
    with pytest.raises(
        ValueError, match=r"two adapters; got a second 'base_model.model.a.query.lora_A.weight'"
    ):
        as_today(dict.fromkeys(keys, torch.zeros(1)))


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("BertForSequenceClassification", "SEQ_CLS"),
        ("BertForTokenClassification", "TOKEN_CLS"),
        ("BertForQuestionAnswering", "QUESTION_ANS"),
        ("LlamaForCausalLM", "CAUSAL_LM"),
        ("BertModel", "FEATURE_EXTRACTION"),
        ("GPT2LMHeadModel", None),
        ("ViTForImageClassification", None),
        ("PooledClassifier", None),
        (None, None),
    ],
)
def test_the_task_of_a_class(name, task):
    assert task_of_class(name) == task
