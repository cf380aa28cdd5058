"""LoRATrainer's checkpoints: what is in them, from which one a run goes on, and what it keeps."""

import logging

import pytest
import torch
from helpers_training import arguments, assert_same_tensors, dataset, injected, trainer
from transformers import ViTConfig, ViTForImageClassification

from hf_lora import LoRAConfig, LoRATrainer, inject_lora
from hf_lora.adapters.peft_format import adapter_tensors
from hf_lora.training.checkpoints import checkpoints, problem

STEPS = {"save_strategy": "steps", "save_steps": 2}


def steps(directory):
    return [int(path.name.partition("-")[2]) for path in checkpoints(directory)]


def test_every_file_of_a_checkpoint_is_summed_and_none_holds_a_frozen_weight(tmp_path):
    run = trainer(tmp_path, **STEPS)
    run.train()
    assert steps(tmp_path) == [2, 4, 6]
    for checkpoint in checkpoints(tmp_path):
        assert problem(checkpoint) is None
        assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {
            path.name for path in checkpoint.iterdir()
        }
    frozen = sum(p.nbytes for p in run.model.parameters() if not p.requires_grad)
    assert sum(path.stat().st_size for path in checkpoints(tmp_path)[-1].glob("*")) < frozen


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "adapter_model.safetensors", "trainer_state.json", "checksums.json"]
)
def test_true_goes_on_from_the_newest_whole_checkpoint_and_says_so(name, tmp_path, caplog):
    undisturbed = trainer(tmp_path / "a", **STEPS)
    undisturbed.train()
    expected = adapter_tensors(undisturbed.model)
    newest = checkpoints(tmp_path / "a")[-1] / name
    newest.write_bytes(newest.read_bytes()[:-1])
    resumed = trainer(tmp_path / "a", **STEPS)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=True)
    assert f"checkpoint-6 is not whole ({name}" in caplog.text and "going on from checkpoint-4" in caplog.text
    assert_same_tensors(adapter_tensors(resumed.model), expected)
    assert problem(checkpoints(tmp_path / "a")[-1]) is None


def test_a_named_checkpoint_that_is_not_whole_is_refused(tmp_path):
    run = trainer(tmp_path, **STEPS)
    run.train()
    (tmp_path / "checkpoint-4" / "scheduler.pt").unlink()
    again = trainer(tmp_path, **STEPS)
    with pytest.raises(ValueError, match=r"checkpoint-4.*scheduler.pt is missing"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_true_without_any_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no whole checkpoint to resume from"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_the_best_and_the_newest_are_kept(tmp_path):
    worse = iter([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    run = LoRATrainer(
        model=injected(),
        args=arguments(
            tmp_path,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=True,
        ),
        train_dataset=dataset(),
        eval_dataset=dataset(),
        compute_metrics=lambda _: {"score": next(worse)},
    )
    run.train()
    assert steps(tmp_path) == [1, 6]
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")


def test_a_failing_write_ends_in_one_line_and_keeps_what_was_there(tmp_path, monkeypatch):
    run = trainer(tmp_path, **STEPS)
    saved = torch.save

    def full(*given, **options):
        if run.state.global_step == 4:
            raise RuntimeError(
                "[enforce fail at inline_container.cc:1] . PytorchStreamWriter failed writing file"
            )
        return saved(*given, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"checkpoint-4' could not be written; got .* MB free") as caught:
        run.train()
    assert "\n" not in str(caught.value)
    assert steps(tmp_path) == [2] and problem(tmp_path / "checkpoint-2") is None
    assert not list(tmp_path.glob(".checkpoint-*"))


def card_of(run, directory):
    run.save_model(str(directory))
    return (directory / "README.md").read_text()


def test_the_card_has_what_was_measured_whoever_measured_it(tmp_path):
    run = trainer(tmp_path / "run", max_steps=2)
    run.compute_metrics = lambda _: {"accuracy": 0.8125}
    assert "No results were measured." in card_of(run, tmp_path / "before")
    run.train()
    run.evaluate()
    run.evaluate(metric_key_prefix="test")
    card = card_of(run, tmp_path / "measured")
    assert "| accuracy | 0.8125 | 0.8125 |" in card and "No results" not in card
    assert "value: 0.8125" in card
    assert "preparation_time" not in card
    run.args.max_steps = 3
    run.train(resume_from_checkpoint=None)
    run.state.log_history = [{"eval_loss": 0.5, "eval_accuracy": 0.8125, "step": 2, "epoch": 1.0}]
    assert "No results of these weights were measured." in card_of(run, tmp_path / "later")


def test_the_card_of_the_best_weights_has_their_results(tmp_path):
    scores = iter([0.25, 0.75, 0.5])
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "greater_is_better": True}
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    data = dataset()
    run = LoRATrainer(
        model=injected(),
        args=arguments(tmp_path / "run", max_steps=3, **best, **steps),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda _: {"accuracy": next(scores)},
    )
    run.train()
    assert "| accuracy | 0.7500 |" in card_of(run, tmp_path / "best")
    assert "| accuracy | 0.2500 |" in (tmp_path / "run" / "checkpoint-1" / "README.md").read_text()


def test_an_image_classifier_is_no_text_classifier(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8))
    inject_lora(model, LoRAConfig(rank=2, target_modules=["q_proj"]))
    card = card_of(LoRATrainer(model=model, args=arguments(tmp_path / "run")), tmp_path / "saved")
    assert "into an image classifier." in card and "pipeline_tag: image-classification" in card
    assert (
        "text classifier" not in card and "TextClassifier" not in card and "text-classification" not in card
    )
