"""Mistakes of the usual LoRA tutorial that no room's own tests rule out."""

import pytest
import safetensors.torch
import torch
from conftest import LABELS, tiny_classifier
from helpers_training import arguments, dataset, injected

from hf_lora import LoRATrainer, TextClassifier, head_parameters, load_adapter, lora_parameters, save_adapter


def test_a_head_made_after_the_optimizer_is_not_left_untrained(tmp_path):
    model = injected()
    optimizer = torch.optim.AdamW(lora_parameters(model).values())
    with pytest.raises(ValueError, match=r"does not hold 2 trained parameters, first 'classifier\.weight'"):
        LoRATrainer(
            model=model, args=arguments(tmp_path), train_dataset=dataset(), optimizers=(optimizer, None)
        )


def test_nothing_is_saved_with_pickle(tmp_path):
    directory = save_adapter(injected(), tmp_path / "a")
    assert {path.suffix for path in directory.iterdir()} == {".json", ".safetensors"}
    assert safetensors.torch.load_file(directory / "adapter_model.safetensors")


def test_an_adapter_of_fewer_layers_is_not_loaded_in_part(tmp_path):
    directory = save_adapter(injected(rank=4, alpha=8.0), tmp_path / "a")
    with pytest.raises(ValueError, match="missing"):
        load_adapter(tiny_classifier("bert", num_hidden_layers=3), directory, check_base=False)


def test_head_and_labels_are_not_lost_on_reload(adapter_dir):
    saved = safetensors.torch.load_file(adapter_dir / "adapter_model.safetensors")
    classifier = TextClassifier.from_pretrained(adapter_dir)
    for name, parameter in head_parameters(classifier.model).items():
        assert torch.equal(parameter, saved[f"base_model.model.{name}"])
    assert classifier.info.labels == LABELS and classifier.model.config.id2label == dict(enumerate(LABELS))
