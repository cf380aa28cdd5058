"""The mistakes of the usual LoRA tutorial, one test each that shows we do not make it."""

import pytest
import safetensors.torch
import torch
from conftest import LABELS, randomize, tiny_batch, tiny_classifier
from helpers_training import arguments, dataset, injected, trainer

from hf_lora import (
    LoRAConfig,
    LoRATrainer,
    TextClassifier,
    head_parameters,
    inject_lora,
    load_adapter,
    lora_parameters,
    merge_lora,
    save_adapter,
    trainable_parameter_count,
)
from hf_lora.adapters.peft_format import adapter_tensors


def test_target_names_of_another_architecture_are_not_silently_skipped():
    with pytest.raises(ValueError, match="got 'q_proj'; candidates"):
        inject_lora(tiny_classifier("bert"), LoRAConfig(target_modules=["q_proj", "v_proj"]))


def test_the_rest_of_the_network_does_not_go_on_training(tmp_path):
    model = injected(projections="q")
    frozen = {
        n: p.detach().clone()
        for n, p in model.named_parameters()
        if n.startswith("bert.") and "lora_" not in n
    }
    trainer(tmp_path, model).train()
    parameters = dict(model.named_parameters())
    assert len(frozen) == 39
    assert all(torch.equal(parameters[name], tensor) for name, tensor in frozen.items())


def test_a_head_made_after_the_optimizer_is_not_left_untrained(tmp_path):
    model = injected()
    optimizer = torch.optim.AdamW(lora_parameters(model).values())
    with pytest.raises(ValueError, match=r"does not hold 2 trained parameters, first 'classifier\.weight'"):
        LoRATrainer(
            model=model, args=arguments(tmp_path), train_dataset=dataset(), optimizers=(optimizer, None)
        )


def test_the_head_is_trained(tmp_path):
    model = injected()
    before = {name: parameter.detach().clone() for name, parameter in head_parameters(model).items()}
    trainer(tmp_path, model).train()
    assert all(not torch.equal(before[name], parameter) for name, parameter in head_parameters(model).items())


def test_nothing_is_saved_with_pickle(tmp_path):
    directory = save_adapter(injected(), tmp_path / "a")
    assert {path.suffix for path in directory.iterdir()} == {".json", ".safetensors"}
    assert safetensors.torch.load_file(directory / "adapter_model.safetensors")


def test_what_does_not_match_is_not_skipped_on_load(tmp_path):
    directory = save_adapter(injected(rank=4, alpha=8.0), tmp_path / "a")
    other = tiny_classifier("bert", num_hidden_layers=3)
    with pytest.raises(ValueError, match="missing"):
        load_adapter(other, directory, check_base=False)


def test_a_missing_head_does_not_come_back_random(tmp_path):
    directory = save_adapter(injected(), tmp_path / "a")
    (directory / "hf_lora.json").unlink()
    path = directory / "adapter_model.safetensors"
    tensors = {key: t for key, t in safetensors.torch.load_file(path).items() if "classifier" not in key}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"2 missing, first 'base_model\.model\.classifier\.bias'"):
        load_adapter(tiny_classifier("bert"), directory)


def test_head_and_labels_are_not_lost_on_reload(adapter_dir):
    saved = safetensors.torch.load_file(adapter_dir / "adapter_model.safetensors")
    classifier = TextClassifier.from_pretrained(adapter_dir)
    for name, parameter in head_parameters(classifier.model).items():
        assert torch.equal(parameter, saved[f"base_model.model.{name}"])
    assert classifier.info.labels == LABELS and classifier.model.config.id2label == dict(enumerate(LABELS))
    assert classifier.predict("the film was good")["label"] in LABELS


def test_parameters_are_counted_right():
    model = injected(rank=4, projections="qv")
    by_hand = 2 * 2 * 4 * (32 + 32) + (3 * 32 + 3)
    assert trainable_parameter_count(model).trainable == by_hand
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == by_hand


def test_lora_dropout_is_not_active_in_evaluation():
    model = injected(dropout=0.9)
    randomize(model)
    batch = tiny_batch()
    model.eval()
    assert torch.equal(model(**batch).logits, model(**batch).logits)


def test_scaling_is_not_forgotten_in_merge():
    model = injected(rank=4, alpha=32.0)
    randomize(model, std=0.1)
    model.eval()
    query = model.bert.encoder.layer[0].attention.self.query
    original = query.weight.detach().clone()
    merge_lora(model)
    torch.testing.assert_close(query.weight, original + 8.0 * query.lora_B @ query.lora_A)


def test_resume_does_not_restart_the_learning_rate_schedule(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path, **options)
    whole.train()
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    rates = [
        [e["learning_rate"] for e in run.state.log_history if "learning_rate" in e]
        for run in (whole, resumed)
    ]
    assert rates[0] == rates[1] and rates[0][2] < rates[0][0]
    for key, tensor in adapter_tensors(whole.model).items():
        assert torch.equal(adapter_tensors(resumed.model)[key], tensor)
