"""Training again on all examples, against the same run composed by hand and scikit-learn's plain regression."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LABELS, write_texts
from datasets import concatenate_datasets
from helpers_cli import read_texts
from helpers_recipe import prepared, regressions_loss, run_training
from helpers_training import Terminate
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor
from transformers import set_seed

from hf_lora import LoRATrainer, TextClassifier
from hf_lora.adapters.peft_format import adapter_tensors
from hf_lora.recipe.compare import Snapshot, refit
from hf_lora.recipe.head_start import frozen_features, install, output_layer, start_head
from hf_lora.training.checkpoints import EXIT_CODE, Preempted
from hf_lora.training.gradient_init import choose_start, start_lora

Train = Callable[..., dict[str, Any]]
# To fit a temperature on: 24 of 60 texts.
ENOUGH = ("--validation_fraction", 0.4)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    for name, count in (("train", 60), ("test", 21)):
        write_texts(folder / f"{name}.csv", count)
    return {f"--{name}_file": folder / f"{name}.csv" for name in ("train", "test")}


@pytest.fixture(scope="module")
def train(tiny_bert_dir: Path, files: dict[str, Path]) -> Train:
    def run(output: Path, *flags: object) -> dict[str, Any]:
        argv = ["--model_name_or_path", tiny_bert_dir, "--output_dir", output, "--max_seq_length", 32]
        argv += [
            "--use_cpu",
            "True",
            "--precision",
            "fp32",
            "--disable_tqdm",
            "True",
            "--num_train_epochs",
            2,
        ]
        argv += [part for pair in files.items() for part in pair]
        # The probe of these toy texts leaves LoRA nothing to learn.
        argv += ["--lora_rank", 2, "--learning_rate", 1e-2, "--head_init", "random"]
        return run_training([str(part) for part in (*argv, *flags)])

    return run


@pytest.fixture(scope="module")
def refitted(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("runs") / "refitted"
    return output, train(output, *ENOUGH)


@pytest.fixture(scope="module")
def single(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("runs") / "single"
    return output, train(output, *ENOUGH, "--refit", "never")


def tensors(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("head", ["probe", "random"])
def test_it_is_the_run_from_the_start_on_all_examples(head: str, tmp_path: Path, tiny_bert_dir: Path) -> None:
    settings = {"num_train_epochs": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 16}
    trainer, data = prepared(tmp_path, tiny_bert_dir, **settings)
    fresh = Snapshot.of(trainer.model)
    start = start_head(trainer, head, on_all=True)
    choose_start(trainer, "auto", start.kind)
    trainer.train()
    first = {name: tensor.clone() for name, tensor in adapter_tensors(trainer.model).items()}
    done = refit(trainer, data, start, fresh, "auto")
    assert done.examples == 60 and done.seconds > 0
    assert [entry["step"] for entry in trainer.state.log_history] == [6]

    other, _ = prepared(tmp_path, tiny_bert_dir, **settings)
    everything = concatenate_datasets([data.splits["train"], data.splits["validation"]])
    by_hand = LoRATrainer(
        model=other.model, args=other.args, train_dataset=everything, processing_class=other.processing_class
    )
    if head == "probe":
        assert start.warm is not None and start.warm.on_all is not None
        install(other.model, start.warm.on_all[1])
        start_lora(by_hand)
    set_seed(other.args.seed)
    by_hand.train()
    # 60 examples in batches of 16 are 4 steps of each epoch, where 48 were 3.
    assert (trainer.state.global_step, by_hand.state.global_step) == (6, 8)
    expected = adapter_tensors(by_hand.model)
    assert_same(adapter_tensors(trainer.model), expected)
    assert not any(torch.equal(first[name], tensor) for name, tensor in expected.items())


def test_the_head_starts_from_a_regression_on_all_examples(tmp_path: Path, tiny_bert_dir: Path) -> None:
    trainer, data = prepared(tmp_path, tiny_bert_dir)
    everything = concatenate_datasets([data.splits["train"], data.splits["validation"]])
    x, y = frozen_features(trainer, everything), np.asarray(everything["labels"])
    start = start_head(trainer, "probe", penalty=30.0, on_all=True)
    assert start.warm is not None and start.warm.on_all is not None
    assert start.warm.best is start.warm.on_all[0] and start.warm.best.examples == 60
    for probe, factor in zip(start.warm.on_all, (1.0, 30.0), strict=True):
        install(trainer.model, probe)
        measured = trainer.evaluate(everything)["eval_loss"]
        expected = regressions_loss(x, y, start.warm.probe.strength / factor)
        assert measured == pytest.approx(expected, rel=2e-3)


@pytest.mark.slow
def test_the_validation_split_judges_the_training_without_it(refitted, single) -> None:
    (output, metrics), (plain, before) = refitted, single
    timing = ("_runtime", "_per_second")
    judged = {name for name in before if name.startswith("eval_") and not name.endswith(timing)}
    judged |= {"temperature"}
    assert {"eval_accuracy_probe", "eval_calibration_error"} < judged
    assert {name: metrics[name] for name in judged} == {name: before[name] for name in judged}
    assert metrics["global_step"] == before["global_step"] and metrics["train_loss"] == before["train_loss"]
    assert metrics["refit_examples"] == 60 and metrics["refit_runtime"] > 0
    assert not {"refit_examples", "refit_runtime"} & set(before)
    assert not any(torch.equal(tensor, tensors(output)[name]) for name, tensor in tensors(plain).items())


def test_the_test_split_judges_the_adapter(refitted, files: dict[str, Path], capsys) -> None:
    output, metrics = refitted
    texts, names = read_texts(files["--test_file"])
    predictions = TextClassifier.from_pretrained(output, precision="fp32").predict(texts)
    right = [prediction["label"] == name for prediction, name in zip(predictions, names, strict=True)]
    assert metrics["test_accuracy"] == pytest.approx(np.mean(right))


def test_card_and_terminal_say_so(train: Train, refitted, single, tmp_path: Path, capsys) -> None:
    words = "retrained on all 60 examples"
    assert words in ModelCard.load(refitted[0] / "README.md").text
    assert "retrained on" not in ModelCard.load(single[0] / "README.md").text
    train(tmp_path / "run")
    printed = " ".join(capsys.readouterr().out.split())
    assert "retraining on all 60 examples ..." in printed
    assert (
        "retraining: on all 60 examples, " in printed
        and "validation scores were measured before it" in printed
    )


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_adapter(train: Train, refitted, tmp_path: Path) -> None:
    checkpoints = sorted(path.name for path in refitted[0].glob("checkpoint-*"))
    # 36 examples of training are two steps an epoch; the second training leaves none.
    assert checkpoints == ["checkpoint-2", "checkpoint-4"]
    for name in checkpoints:
        output = tmp_path / name
        shutil.copytree(refitted[0] / name, output / name)
        metrics = train(output, *ENOUGH, "--resume_from_checkpoint")
        assert_same(tensors(output), tensors(refitted[0]))
        assert metrics["eval_loss"] == refitted[1]["eval_loss"]


@pytest.mark.slow
def test_sigterm_ends_it_and_leaves_the_checkpoints(
    train: Train, refitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    own = LoRATrainer.__init__

    def second_is_terminated(self: LoRATrainer, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        made.append(len(made))
        if len(made) == 2:
            self.add_callback(Terminate(3))

    monkeypatch.setattr(LoRATrainer, "__init__", second_is_terminated)
    with pytest.raises(Preempted) as caught:
        train(tmp_path / "run", *ENOUGH)
    assert caught.value.code == EXIT_CODE and caught.value.step == 4 and len(made) == 2
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not (tmp_path / "run" / "metrics.json").exists()
    monkeypatch.undo()
    train(tmp_path / "run", *ENOUGH, "--resume_from_checkpoint")
    assert_same(tensors(tmp_path / "run"), tensors(refitted[0]))


def test_the_handler_of_a_program_stays(tmp_path: Path, tiny_bert_dir: Path) -> None:
    trainer, data = prepared(tmp_path, tiny_bert_dir, max_steps=4)
    fresh, start = Snapshot.of(trainer.model), start_head(trainer, "probe", on_all=True)
    trainer.train()
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        refit(trainer, data, start, fresh, "auto")
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


@pytest.mark.slow
def test_a_training_that_failed_is_not_kept(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    # At so small a rate the first training is as good as its probe.
    flags = (*ENOUGH, "--head_init", "probe", "--head_penalty", 1, "--learning_rate", 1e-12)
    expected = train(tmp_path / "single", *flags, "--refit", "never")
    assert expected["eval_accuracy"] > 0.7
    own = LoRATrainer.train
    trained: list[LoRATrainer] = []

    def second_is_lost(self: LoRATrainer, *args: Any, **kwargs: Any) -> Any:
        done = own(self, *args, **kwargs)
        trained.append(self)
        if len(trained) == 2:
            layer = output_layer(self.model)
            with torch.no_grad():
                layer.weight.neg_()
                layer.bias.neg_()
        return done

    monkeypatch.setattr(LoRATrainer, "train", second_is_lost)
    metrics = train(tmp_path / "run", *flags)
    assert len(trained) == 2
    assert_same(tensors(tmp_path / "run"), tensors(tmp_path / "single"))
    assert metrics["test_accuracy"] == expected["test_accuracy"]
    assert metrics["refit_runtime"] > 0 and "refit_examples" not in metrics
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "retraining: on all 60 examples, " in printed
        and "; not kept: it does worse on the validation" in printed
    )
    assert "retrained on" not in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("why", ["rank 0", "safeguard"])
def test_where_the_probe_is_kept_it_is_that_of_all_examples(
    why: str, train: Train, tmp_path: Path, tiny_bert_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "safeguard":
        monkeypatch.setattr("hf_lora.recipe.compare.clearly_better", lambda before, after: True)
    flags = ("--lora_rank", 0) if why == "rank 0" else ()
    metrics = train(tmp_path / "run", "--head_init", "probe", *flags)
    assert metrics["refit_examples"] == 60
    for name in ("accuracy", "f1_macro"):
        assert metrics[f"test_{name}"] == metrics[f"test_{name}_probe"]
        assert metrics[f"eval_{name}"] == metrics[f"eval_{name}_probe"]
    saved = tensors(tmp_path / "run")
    assert not any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)
    # The regression of all examples, with the penalty that the validation split has chosen.
    (tmp_path / "again").mkdir()
    trainer, data = prepared(tmp_path / "again", tiny_bert_dir, "native")
    start = start_head(trainer, "probe", penalty=1.0)
    assert start.warm is not None
    everything = concatenate_datasets([data.splits["train"], data.splits["validation"]])
    x, y = frozen_features(trainer, everything), np.asarray(everything["labels"])
    layer = output_layer(trainer.model)
    with torch.no_grad():
        for kind in ("weight", "bias"):
            getattr(layer, kind).copy_(saved[f"base_model.model.classifier.{kind}"])
    expected = regressions_loss(x, y, start.warm.probe.strength)
    assert trainer.evaluate(everything)["eval_loss"] == pytest.approx(expected, rel=2e-3)


@pytest.mark.slow
def test_an_evaluation_at_the_start_is_of_the_first_training(train: Train, tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--eval_on_start", True)["refit_examples"] == 60


def test_a_validation_file_is_trained_on_if_asked(train: Train, tmp_path: Path) -> None:
    write_texts(tmp_path / "validation.csv", 24)
    flags = ("--validation_file", tmp_path / "validation.csv")
    assert "refit_examples" not in train(tmp_path / "auto", *flags)
    metrics = train(tmp_path / "always", *flags, "--refit", "always")
    assert metrics["refit_examples"] == 84
    assert json.loads((tmp_path / "always" / "metrics.json").read_text())["refit_examples"] == 84
    assert json.loads((tmp_path / "always" / "hf_lora.json").read_text())["labels"] == list(LABELS)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of examples of each pass over a split, in order."""
    seen: list[int] = []
    loop: Callable[..., Any] = LoRATrainer.evaluation_loop

    def counted(self: LoRATrainer, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(dataloader.dataset))
        return loop(self, dataloader, *args, **kwargs)

    monkeypatch.setattr(LoRATrainer, "evaluation_loop", counted)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "after_training"),
    [
        # With the adapter and with it disabled.
        (("--refit", "never"), 2),
        # And when it is done, whether the refit is kept.
        (("--refit", "always"), 3),
        # Without evaluations, for what the safeguard asks.
        (("--refit", "never", "--eval_strategy", "no"), 3),
    ],
)
def test_no_split_is_predicted_twice_with_the_same_parameters(
    tmp_path: Path,
    train: Train,
    passes: list[int],
    flags: tuple[str, ...],
    after_training: int,
) -> None:
    # As good as the probe that it starts from, so that the run does not go back to that.
    start = ("--head_init", "probe", "--head_penalty", 1, "--learning_rate", 1e-6)
    train(tmp_path / "out", *ENOUGH, *start, *flags)
    features = [36, 24, 21]  # of training, validation and test split
    evaluations = [] if "no" in flags else [24, 24]  # after each of two epochs
    assert passes == [*features, *evaluations, *[24] * after_training, 21, 21]
