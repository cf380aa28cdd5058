from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
from conftest import BAD, GOOD, WORDS
from helpers_recipe import command, run_training
from scipy.special import expit, softmax

from hf_lora import TextClassifier
from hf_lora.adapters.directory import read_adapter
from hf_lora.tasks import MULTI, REGRESSION, SINGLE, task_of
from hf_lora.tasks.calibration import Calibration
from hf_lora.tasks.mistakes import measurer


def write(path: Path, kind: str, seed: int, count: int) -> tuple[list[str], np.ndarray]:
    """Texts of a good or a bad word or of both; a seventh of the labels is wrong, so that nothing is certain."""
    generator = np.random.default_rng(seed)
    texts, truth, lines = [], [], []
    for _ in range(count):
        good, bad = generator.random(2) < (0.6, 0.25)
        flips = generator.random(2) < 1 / 7
        words = [str(generator.choice(GOOD))] * int(good) + [str(generator.choice(BAD))] * int(bad)
        texts.append(" ".join([f"the {generator.choice(WORDS[5:10])} was", *words]))
        has = [int(good != flips[0]), int(bad != flips[1])]
        label: Any = {
            SINGLE: ["no", "yes"][has[0]],
            MULTI: [n for n, h in zip("gb", has, strict=True) if h],
        }.get(kind, float(good) + generator.normal())
        truth.append({SINGLE: has[0], MULTI: has}.get(kind, label))
        lines.append(json.dumps({"text": texts[-1], "label": label}))
    path.write_text("\n".join(lines) + "\n")
    return texts, np.array(truth)


class Run:
    """A small training run: what it wrote and said, and the outputs of the reloaded adapter on its two splits."""

    def __init__(self, base: Path, folder: Path, kind: str, held_out: int = 120) -> None:
        parts = [(folder / f"{name}.json", number) for name, number in (("train", 160), ("eval", held_out))]
        made = [
            write(path, kind, seed, count)
            for seed, (path, count) in enumerate([*parts, (folder / "test.json", 90)])
        ]
        argv = command(base, folder / "run", "--train_file", folder / "train.json", "--problem_type", kind)
        argv += ["--validation_file", str(folder / "eval.json"), "--test_file", str(folder / "test.json")]
        argv += ["--max_steps", "30", "--learning_rate", "2e-2", "--lora_rank", "4", "--seed", "1"]
        self.directory = folder / "run"
        self.metrics = run_training(argv)
        self.info = read_adapter(self.directory).info
        assert self.info is not None
        self.classifier = TextClassifier.from_pretrained(self.directory, precision="fp32")
        self.truth = {"eval": made[1][1], "test": made[2][1]}
        # Labels are in the order of the adapter's names.
        order = [["g", "b"].index(name) for name in self.info.labels] if kind == MULTI else None
        if order:
            self.truth = {split: truth[:, order] for split, truth in self.truth.items()}
        self.texts = {"eval": made[1][0], "test": made[2][0]}
        self.logits = {split: self.classifier.logits(texts).numpy() for split, texts in self.texts.items()}


@pytest.fixture(scope="module")
def single(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tiny_bert_dir, tmp_path_factory.mktemp("single"), SINGLE)


@pytest.fixture(scope="module")
def multi(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tiny_bert_dir, tmp_path_factory.mktemp("multi"), MULTI)


def error_by_hand(confidence: np.ndarray, right: np.ndarray) -> float:
    """The expected calibration error in 15 bins, one prediction after another."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for sure, good in zip(confidence, right, strict=True):
        number = next(number for number in range(15) if sure <= (number + 1) / 15 + 1e-12)
        bins.setdefault(number, []).append((sure, good))
    gaps = [abs(sum(g for _, g in rows) - sum(c for c, _ in rows)) for rows in bins.values()]
    return float(sum(gaps) / len(confidence))


def test_the_temperature_is_fitted_on_the_validation_split_and_saved(single: Run) -> None:
    expected = task_of(SINGLE).calibrate(single.logits["eval"], single.truth["eval"]).temperature
    assert single.info.temperature == single.metrics["temperature"] == pytest.approx(expected, rel=1e-3)
    assert single.info.temperature != 1.0 and single.info.thresholds is None


@pytest.mark.parametrize("split", ["eval", "test"])
def test_errors_before_and_after_are_those_of_the_reloaded_classifier(single: Run, split: str) -> None:
    logits, truth = single.logits[split].astype(float), single.truth[split]
    for temperature, suffix in ((1.0, "_uncalibrated"), (single.info.temperature, "")):
        scores = softmax(logits / temperature, axis=1)
        expected = error_by_hand(scores.max(1), scores.argmax(1) == truth)
        assert single.metrics[f"{split}_calibration_error{suffix}"] == pytest.approx(expected, abs=2e-4)
    # And `predict` gives the scores whose error that is.
    results = single.classifier.predict(single.texts[split])
    given = np.array([single.info.labels.index(result["label"]) for result in results])
    found = error_by_hand(np.array([result["score"] for result in results]), given == truth)
    assert single.metrics[f"{split}_calibration_error"] == pytest.approx(found, abs=2e-4)
    assert single.metrics[f"{split}_accuracy"] == pytest.approx((given == truth).mean())


def test_a_temperature_makes_the_labels_it_was_fitted_on_likelier_and_decides_nothing(single: Run) -> None:
    logits, truth = single.logits["eval"].astype(float), single.truth["eval"]
    losses = [sk.log_loss(truth, softmax(logits / t, axis=1)) for t in (1.0, single.info.temperature)]
    assert losses[1] < losses[0]
    assert not [name for name in single.metrics if name.endswith("accuracy_uncalibrated")]


@pytest.mark.parametrize("split", ["eval", "test"])
def test_every_metric_in_memory_is_that_of_the_reloaded_adapter(single: Run, multi: Run, split: str) -> None:
    for run in (single, multi):
        measured = measurer(run.info.task, run.info.labels, run.info.calibration)(
            run.logits[split], run.truth[split]
        )
        found = {name: run.metrics[f"{split}_{name}"] for name in measured}
        assert found == pytest.approx(measured, abs=2e-4)


@pytest.mark.parametrize("split", ["eval", "test"])
def test_multi_label_metrics_with_thresholds_and_at_one_half(multi: Run, split: str) -> None:
    logits, truth = multi.logits[split].astype(float), multi.truth[split]
    given = expit(logits / multi.info.temperature) > multi.info.thresholds
    for decided, suffix in ((given, ""), (logits > 0, "_uncalibrated")):
        for average in ("macro", "micro"):
            expected = sk.f1_score(truth, decided, average=average, zero_division=0)
            assert multi.metrics[f"{split}_f1_{average}{suffix}"] == pytest.approx(expected, abs=1e-6)
        assert multi.metrics[f"{split}_accuracy{suffix}"] == pytest.approx(sk.accuracy_score(truth, decided))
    assert multi.metrics[f"{split}_roc_auc"] == pytest.approx(sk.roc_auc_score(truth, logits), abs=1e-3)
    assert f"{split}_roc_auc_uncalibrated" not in multi.metrics
    # Without the adapter it is decided in the same way.
    assert multi.metrics[f"{split}_f1_macro_disabled"] != multi.metrics[f"{split}_f1_macro"]
    results = multi.classifier.predict(multi.texts[split])
    assert [[label in result["label"] for label in multi.info.labels] for result in results] == given.tolist()


def test_thresholds_are_fitted_on_calibrated_scores_of_the_validation_split(multi: Run) -> None:
    expected = task_of(MULTI).calibrate(multi.logits["eval"], multi.truth["eval"]).thresholds
    assert multi.info.thresholds == pytest.approx(expected, abs=1e-3)
    scores = expit(multi.logits["eval"].astype(float) / multi.info.temperature)
    assert set(multi.info.thresholds) != {0.5}
    for column in range(2):
        truth = multi.truth["eval"][:, column]
        chosen = sk.f1_score(truth, scores[:, column] > multi.info.thresholds[column])
        assert chosen >= sk.f1_score(truth, scores[:, column] > 0.5)


def test_the_card_and_the_terminal_tell_it(
    multi: Run, tiny_bert_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (multi.directory / "README.md").read_text()
    before, after = (multi.metrics[f"eval_calibration_error{suffix}"] for suffix in ("_uncalibrated", ""))
    assert f"with a temperature of {multi.info.temperature:.3f}.\n" in text
    assert f"Expected calibration error: {before:.4f} before and {after:.4f} after calibration (val" in text
    assert "Each label has its own threshold." in text
    run = Run(tiny_bert_dir, tmp_path, SINGLE, held_out=19)
    assert run.info.temperature is None and "temperature" not in run.metrics
    assert run.metrics["test_calibration_error"] == run.metrics["test_calibration_error_uncalibrated"]


def test_a_regression_has_no_calibration(tiny_bert_dir: Path, tmp_path: Path) -> None:
    run = Run(tiny_bert_dir, tmp_path, REGRESSION)
    assert run.info.calibration == Calibration()
    assert not [name for name in run.metrics if "calibrat" in name or "temperature" in name]
