"""The warm start against scikit-learn and against forwards of the whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LABELS, tiny_batch, tiny_classifier
from datasets import Dataset
from helpers_recipe import prepared, regressions_loss
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_lora import (
    LoRAConfig,
    LoRATrainer,
    inject_lora,
    load_classifier,
    save_adapter,
    start_lora,
)
from hf_lora.adapters.directory import read_adapter
from hf_lora.adapters.peft_format import adapter_tensors
from hf_lora.lora.inject import injection
from hf_lora.models.loading import load_base
from hf_lora.models.pooling import PooledClassifier
from hf_lora.recipe.head_start import (
    HeadStart,
    features_as_logits,
    fit_warm_start,
    frozen_features,
    install,
    output_layer,
    start_head,
)
from hf_lora.tasks import SINGLE, task_of
from hf_lora.tasks.probe import fit_probe

_SPECIAL_SIZES = {
    "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
}


@pytest.fixture(params=["mean", "cls", "native"])
def run(request, tmp_path: Path, tiny_bert_dir: Path) -> tuple[LoRATrainer, Any]:
    return prepared(tmp_path, tiny_bert_dir, request.param)


def test_features_are_what_goes_into_the_last_layer(run) -> None:
    trainer, data = run
    features = frozen_features(trainer, data.splits["validation"])
    assert features.shape == (12, 32)
    model = trainer.model.eval()
    layer = output_layer(model)
    for row in range(12):
        example = data.splits["validation"][row]
        inputs = {name: torch.tensor([ids]) for name, ids in example.items() if name != "labels"}
        with torch.no_grad():
            logits = model(**inputs).logits
            assert_close(layer(torch.from_numpy(features[row : row + 1])), logits, rtol=1e-4, atol=1e-5)


def test_the_warm_started_heads_loss_is_the_fitted_regressions(run) -> None:
    trainer, data = run
    warm = fit_warm_start(trainer)
    x, y = frozen_features(trainer, data.splits["train"]), np.asarray(data.splits["train"]["labels"])
    install(trainer.model, warm.probe)
    expected = regressions_loss(x, y, warm.probe.strength)
    measured = trainer.evaluate(data.splits["train"])["eval_loss"]
    assert measured == pytest.approx(expected, rel=2e-3)
    logits = trainer.predict(data.splits["validation"]).predictions
    np.testing.assert_allclose(logits, warm.validation, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "model_type", ["roberta", "distilbert", "electra", "deberta-v2", "gpt2", "xlnet", "bart"]
)
def test_the_output_layer_is_found_whatever_the_head_is(model_type: str) -> None:
    if model_type == "xlnet":
        config = AutoConfig.for_model(
            "xlnet", vocab_size=64, num_labels=3, d_model=32, n_layer=2, n_head=4, d_inner=32
        )
        plain = AutoModelForSequenceClassification.from_config(config).eval()
    else:
        plain = tiny_classifier(model_type, **_SPECIAL_SIZES.get(model_type, {}))
    inject_lora(plain, LoRAConfig(rank=2, projections="q"))
    batch = {name: value for name, value in tiny_batch().items() if name != "labels"}
    if model_type == "bart":
        batch["input_ids"][:, -1] = plain.config.eos_token_id
        batch["attention_mask"][:] = 1
    layer = output_layer(plain)
    with torch.no_grad():
        logits = plain(**batch).logits
        with features_as_logits(layer):
            features = plain(**batch).logits
        assert features.ndim == 2
        assert_close(layer(features), logits)
        assert_close(plain(**batch).logits, logits)


def test_a_head_that_does_not_end_with_a_linear_layer_is_named(tmp_path: Path, tiny_bert_dir: Path) -> None:
    trainer, _data = prepared(tmp_path, tiny_bert_dir, "native")
    trainer.model.classifier = torch.nn.Sequential(torch.nn.Linear(32, 2), torch.nn.Softplus())
    injection(trainer.model).fresh = None
    with pytest.raises(ValueError, match="not a linear function of its head's last layer"):
        start_head(trainer, "probe")
    weight = trainer.model.classifier[0].weight.clone()
    start = start_head(trainer, "auto")
    assert start.kind == "random" and start.warm is None and "not a linear function" in start.reason
    assert torch.equal(weight, trainer.model.classifier[0].weight)


def test_random_leaves_the_head_but_fits_the_probe_for_comparison(run) -> None:
    trainer, _data = run
    before = output_layer(trainer.model).weight.detach().clone()
    start = start_head(trainer, "random")
    assert start.kind == "random" and start.warm is not None
    assert torch.equal(before, output_layer(trainer.model).weight)
    assert start_head(trainer, "auto", penalty=1.0).kind == "probe"
    np.testing.assert_allclose(
        output_layer(trainer.model).weight.detach(), start.warm.probe.weight.astype(np.float32), rtol=1e-6
    )


@pytest.mark.parametrize("penalty", [1.0, 30.0])
def test_lora_starts_from_the_regression_with_so_many_times_the_penalty(run, penalty: float) -> None:
    trainer, data = run
    x, y = frozen_features(trainer, data.splits["train"]), np.asarray(data.splits["train"]["labels"])
    start = start_head(trainer, "probe", penalty=penalty)
    assert start.warm is not None
    best = start.warm.probe.strength
    measured = trainer.evaluate(data.splits["train"])["eval_loss"]
    assert measured == pytest.approx(regressions_loss(x, y, best / penalty), rel=2e-3)
    assert str(start).startswith("linear probe: as asked for; 48 examples, C = ")
    # What the run is compared with, and goes back to, is the best one.
    install(trainer.model, start.warm.probe)
    measured = trainer.evaluate(data.splits["train"])["eval_loss"]
    assert measured == pytest.approx(regressions_loss(x, y, best), rel=2e-3)


@pytest.mark.parametrize("telling", ["last layer", "layers below"])
def test_the_validation_set_says_which_layers_the_probe_reads(
    telling: str, tmp_path: Path, tiny_bert_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _data = prepared(tmp_path, tiny_bert_dir, "mean_layers")
    width = 3 * 32
    generator = np.random.default_rng(0)

    def made(_: Any, dataset: Any, **__: Any) -> np.ndarray:
        """Noise, but for eight columns that say the label, not quite without fail."""
        x = generator.normal(size=(len(dataset), width))
        first = width - 32 if telling == "last layer" else 0
        x[:, first : first + 8] += 1.5 * (2 * np.asarray(dataset["labels"])[:, None] - 1)
        return x.astype(np.float32)

    known: dict[int, np.ndarray] = {}
    monkeypatch.setattr(
        "hf_lora.recipe.head_start.labelled_features",
        lambda trainer, dataset, **given: (
            known.setdefault(len(dataset), made(trainer, dataset, **given)),
            np.asarray(dataset["labels"]),
        ),
    )
    start = start_head(trainer, "probe", choose_layers=True)
    assert start.warm is not None
    x, held = (known[len(part)] for part in (trainer.train_dataset, trainer.eval_dataset))
    y, held_y = (np.asarray(part["labels"]) for part in (trainer.train_dataset, trainer.eval_dataset))
    probes = {
        name: fit_probe(x[:, part], y, (held[:, part], held_y), task=task_of(SINGLE), labels=2)
        for name, part in (("mean", slice(-32, None)), ("mean_layers", slice(None)))
    }
    expected = "mean" if telling == "last layer" else "mean_layers"
    assert min(probes, key=lambda name: probes[name].loss or 0.0) == expected
    np.testing.assert_allclose(start.warm.probe.weight, probes[expected].weight)
    np.testing.assert_allclose(
        output_layer(trainer.model).weight.detach(), start.warm.start.weight.astype(np.float32)
    )
    assert start.warm.last_layer == (expected == "mean")
    assert ("better on the last layer alone" in str(start)) == (expected == "mean")
    # The adapter says what its head reads.
    saved = save_adapter(trainer.model, tmp_path / "adapter")
    assert read_adapter(saved).info.pooling == expected


def test_a_pooling_that_was_asked_for_stays(
    tmp_path: Path, tiny_bert_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _data = prepared(tmp_path, tiny_bert_dir, "mean_layers")
    monkeypatch.setattr(PooledClassifier, "read_last_layer", lambda _: pytest.fail("not asked"))
    warm = start_head(trainer, "probe").warm
    assert warm is not None and not warm.last_layer
    assert warm.probe.weight.shape == (2, 3 * 32)


def test_a_ridge_regression_starts_with_so_many_times_the_penalty_too(run) -> None:
    trainer, _data = run
    trainer.model.config.problem_type = "regression"
    labels = np.random.default_rng(0).normal(size=(len(trainer.train_dataset), len(LABELS)))
    trainer.train_dataset = trainer.train_dataset.remove_columns("labels").add_column(
        "labels", labels.tolist()
    )
    trainer.eval_dataset = None
    x = frozen_features(trainer, trainer.train_dataset).astype(np.float64)
    x, y = x - x.mean(0), labels - labels.mean(0)
    scale = np.sqrt((x**2).sum(1).mean())
    warm = fit_warm_start(trainer, 30.0)
    for probe, factor in ((warm.probe, 1.0), (warm.start, 30.0)):
        # By the normal equations, for features of mean squared norm 1.
        penalty = factor * scale**2 / warm.probe.strength
        expected = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y).T
        np.testing.assert_allclose(probe.weight, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("penalty", [0.0, -1.0, float("nan"), float("inf")])
def test_an_unusable_penalty_is_refused(run, penalty: float) -> None:
    with pytest.raises(ValueError, match=f"head_penalty is not usable; got {penalty}"):
        start_head(run[0], "probe", penalty=penalty)


def test_a_checkpoints_own_head_is_kept(tmp_path: Path, tiny_bert_dir: Path) -> None:
    trainer, _ = prepared(tmp_path, tiny_bert_dir, "native")
    plain, _ = load_base(str(tiny_bert_dir), LABELS)
    plain.save_pretrained(tmp_path / "classifier")
    trainer.processing_class.save_pretrained(tmp_path / "classifier")
    trainer, _data = prepared(tmp_path, tmp_path / "classifier", "native")
    start = start_head(trainer, "auto")
    assert start.kind == "checkpoint" and start.warm is not None
    assert_close(trainer.model.classifier.weight, plain.classifier.weight)
    assert start_head(trainer, "probe").kind == "probe"
    assert not torch.equal(trainer.model.classifier.weight, plain.classifier.weight)


def test_a_checkpoints_head_in_another_order_of_labels_gives_the_same_answers(
    tmp_path: Path, tiny_bert_dir: Path
) -> None:
    first, data = prepared(tmp_path, tiny_bert_dir, "native")
    start_head(first, "probe")
    expected = first.predict(data.splits["validation"]).predictions
    plain, _ = load_base(str(tiny_bert_dir), LABELS)
    with torch.no_grad():
        plain.classifier.weight.copy_(first.model.classifier.weight.flip(0))
        plain.classifier.bias.copy_(first.model.classifier.bias.flip(0))
    plain.config.id2label = {0: "Positive", 1: "NEGATIVE"}
    plain.config.label2id = {"Positive": 0, "NEGATIVE": 1}
    plain.save_pretrained(tmp_path / "classifier")
    first.processing_class.save_pretrained(tmp_path / "classifier")
    trainer, data = prepared(tmp_path, tmp_path / "classifier", "native")
    start = start_head(trainer, "auto")
    assert start.kind == "checkpoint" and str(start).startswith(
        "checkpoint: the checkpoint has a trained head"
    )
    np.testing.assert_allclose(trainer.predict(data.splits["validation"]).predictions, expected, atol=1e-5)
    # Other names: the probe.
    plain.config.id2label, plain.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    plain.save_pretrained(tmp_path / "classifier")
    trainer, _ = prepared(tmp_path, tmp_path / "classifier", "native")
    assert start_head(trainer, "auto").kind == "probe"


@pytest.mark.parametrize(
    ("kind", "head_is_trained", "falls_back"),
    [
        ("probe", True, True),
        ("probe", False, True),
        ("checkpoint", True, True),
        ("checkpoint", False, False),
        ("random", True, False),
    ],
)
def test_a_run_goes_back_to_the_probe_unless_its_head_is_to_be_random_or_to_stay(
    run, kind: str, head_is_trained: bool, falls_back: bool
) -> None:
    warm = start_head(run[0], "random").warm
    start = HeadStart(kind, "why", warm, 0.0)
    assert warm is not None and start.fallback(head_is_trained) is (warm if falls_back else None)


def test_an_unknown_start_names_the_known_ones(run) -> None:
    with pytest.raises(
        ValueError, match="unknown head_init; got 'zero'; expected one of auto, probe, random"
    ):
        start_head(run[0], "zero")


def test_the_pass_for_the_features_fills_the_frozen_prefix(tmp_path: Path, tiny_bert_dir: Path) -> None:
    trainer, data = prepared(
        tmp_path,
        tiny_bert_dir,
        config=LoRAConfig(rank=2, layers=(-1,)),
        num_train_epochs=1,
        cache_frozen_prefix="memory",
    )
    warm = start_head(trainer, "probe").warm
    kept = trainer.prefix
    assert kept is not None and kept.store is not None
    assert len(kept.store) == len({tuple(ids) for ids in data.splits["train"]["input_ids"]})
    record, recorded = kept.prefix.record, []
    kept.prefix.record = lambda inputs: recorded.append(inputs) or record(inputs)
    trainer.train()
    assert recorded == []
    assert trainer.prefix is None
    plain, _ = prepared(tmp_path, tiny_bert_dir, "mean")
    expected = fit_warm_start(plain)
    np.testing.assert_allclose(warm.validation, expected.validation, rtol=1e-3, atol=1e-3)


class Rows(torch.utils.data.Dataset):
    """Rows as a data set of torch's."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.rows[row]


class Stream(torch.utils.data.IterableDataset):
    """Rows one after the other."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = list(rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def _with_text(rows: Dataset) -> Dataset:
    return rows.add_column("text", ["a text"] * len(rows))


def _encoded_when_read(rows: Dataset) -> Dataset:
    """Rows of other columns, from which a transform makes the examples."""
    hidden = rows.rename_columns({name: f"{name}_kept" for name in rows.column_names})
    names = rows.column_names
    return hidden.with_transform(lambda batch: {name: batch[f"{name}_kept"] for name in names})


# From the rows that the command line prepares to data sets as people make them.
DATA_SETS: dict[str, Callable[[Dataset], Any]] = {
    "column label": lambda rows: rows.rename_column("labels", "label"),
    "text kept": _with_text,
    "text kept, column label": lambda rows: _with_text(rows).rename_column("labels", "label"),
    "list": list,
    "list with texts": lambda rows: list(_with_text(rows)),
    "torch": Rows,
    "transform": _encoded_when_read,
    "tensors": lambda rows: rows.with_format("numpy"),
    "stream": lambda rows: rows.to_iterable_dataset(),
    "stream of torch": Stream,
}


@pytest.mark.parametrize("kind", DATA_SETS)
def test_the_start_takes_what_trainer_takes(kind: str, tmp_path: Path, tiny_bert_dir: Path) -> None:
    """The same head and the same A as with prepared rows; then Trainer trains on the same data sets."""
    starts, config = [], LoRAConfig(rank=2, init="gradient")
    settings = {"remove_unused_columns": kind != "transform", "max_steps": 1}
    for made in (lambda rows: rows, DATA_SETS[kind]):
        trainer, data = prepared(tmp_path, tiny_bert_dir, config=config, **settings)
        trainer.train_dataset, trainer.eval_dataset = map(made, data.splits.values())
        start = start_head(trainer)
        assert start.kind == "probe"
        start_lora(trainer)
        starts.append(
            {name: value.detach().clone() for name, value in adapter_tensors(trainer.model).items()}
        )
        trainer.train()
    assert starts[0].keys() == starts[1].keys()
    for name, value in starts[0].items():
        # A is turned by a random draw of examples in their order, which a stream does not have.
        assert_close(starts[1][name], value, rtol=1e-4, atol=1e-5)


def test_several_evaluation_sets_choose_the_penalty_together(run) -> None:
    trainer, data = run
    held = data.splits["validation"]
    whole = fit_warm_start(trainer)
    trainer.eval_dataset = {"first": held.select(range(5)), "rest": held.select(range(5, len(held)))}
    parts = fit_warm_start(trainer)
    np.testing.assert_allclose(parts.validation, whole.validation, rtol=1e-3, atol=1e-4)
    assert parts.probe.strength == whole.probe.strength


@pytest.mark.parametrize(
    ("options", "function"),
    [
        ({"prediction_loss_only": True}, None),
        ({"eval_do_concat_batches": False}, None),
        ({"batch_eval_metrics": True}, None),
        ({"include_for_metrics": ["inputs", "loss"]}, None),
        ({"dataloader_drop_last": True, "per_device_eval_batch_size": 32}, None),
        ({}, lambda logits, labels: logits.argmax(-1)),
    ],
)
def test_how_a_user_evaluates_does_not_change_the_start(
    options: dict[str, Any], function: Any, tmp_path: Path, tiny_bert_dir: Path
) -> None:
    heads = []
    for settings, preprocess in (({}, None), (options, function)):
        trainer, _ = prepared(tmp_path, tiny_bert_dir, **settings)
        trainer.preprocess_logits_for_metrics = preprocess
        assert start_head(trainer).kind == "probe"
        heads.append(output_layer(trainer.model).weight.detach().clone())
    assert torch.equal(*heads)


@pytest.mark.parametrize("head_init", ["auto", "probe"])
@pytest.mark.parametrize(
    ("spoilt", "got"),
    [
        (lambda rows: rows.remove_columns("labels"), "got input_ids"),
        (lambda rows: list(rows.remove_columns("labels")), "got input_ids"),
        (lambda rows: rows.rename_column("labels", "sentiment"), "got .*sentiment"),
        (lambda rows: None, "got no training data"),
        (lambda rows: [], "got no training data"),
    ],
)
def test_data_that_no_probe_fits_are_refused(run, head_init: str, spoilt: Any, got: str) -> None:
    trainer, data = run
    trainer.train_dataset = spoilt(data.splits["train"])
    with pytest.raises(ValueError, match=f"a linear probe needs examples with labels; {got}"):
        start_head(trainer, head_init)


def test_a_random_head_in_the_place_of_a_probe_is_warned_of(run, caplog: pytest.LogCaptureFixture) -> None:
    trainer, _ = run
    start_head(trainer, "random")
    assert "the head starts at random" not in caplog.text
    trainer.is_fsdp_enabled = True
    assert start_head(trainer).kind == "random"
    assert "the head starts at random: no probe is fitted where the weights are sharded" in caplog.text


def test_balanced_weights_are_of_any_data_set(tmp_path: Path, tiny_bert_dir: Path) -> None:
    trainer, data = prepared(tmp_path, tiny_bert_dir, max_steps=1)
    rows = data.splits["train"].select(range(9))
    args = dataclasses.replace(trainer.args, class_weights="balanced")
    for kind, made in DATA_SETS.items():
        parts = {"model": trainer.model, "args": args, "processing_class": trainer.processing_class}
        if "stream" in kind:
            with pytest.raises(ValueError, match="class_weights='balanced' needs a data set of known size"):
                LoRATrainer(**parts, train_dataset=made(rows))
        else:
            weights = LoRATrainer(**parts, train_dataset=made(rows)).class_weights
            counts = np.bincount(rows["labels"])
            assert_close(weights, torch.tensor(9 / (2 * counts), dtype=torch.float32))


@pytest.fixture
def remade(tmp_path: Path, tiny_bert_dir: Path) -> LoRATrainer:
    """A trainer whose model is made anew for every training, with a learning rate that moves nothing."""
    made, data = prepared(tmp_path, tiny_bert_dir, max_steps=1, learning_rate=1e-20)

    def model_init() -> torch.nn.Module:
        return load_classifier(str(tiny_bert_dir), LABELS, LoRAConfig(rank=2), pooling="mean")[0]

    return LoRATrainer(
        model_init=model_init,
        args=made.args,
        train_dataset=data.splits["train"],
        eval_dataset=data.splits["validation"],
        processing_class=made.processing_class,
    )


def test_both_starts_act_on_the_model_that_is_trained(remade: LoRATrainer) -> None:
    start_head(remade)
    start_lora(remade)
    before = remade.model
    started = adapter_tensors(before)
    for _ in range(2):
        remade.train()
        assert remade.model is not before
        for name, value in adapter_tensors(remade.model).items():
            assert_close(value, started[name], rtol=1e-4, atol=1e-6)
        assert injection(remade.model).config.init == "gradient"
        before = remade.model


def test_without_a_start_the_card_claims_none(remade: LoRATrainer, tmp_path: Path) -> None:
    remade.train()
    remade.save_model(str(tmp_path / "saved"))
    assert remade.lora_start is None
    assert "| lora_init | kaiming |" in (tmp_path / "saved" / "README.md").read_text()
