from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit, softmax
from scipy.stats import t as student
from sklearn.metrics import f1_score, log_loss, precision_recall_curve

from hf_lora.tasks import MULTI, REGRESSION, SINGLE, task_of
from hf_lora.tasks.calibration import (
    FLATTER,
    HIGHEST,
    LOWEST,
    PRIOR,
    SHARPER,
    Calibration,
    fit_thresholds,
    reliability,
)


def fit_temperature(logits: np.ndarray, references: np.ndarray, problem_type: str) -> float | None:
    return task_of(problem_type).calibrate(logits, references).temperature


def single(
    seed: int, sharpness: float, examples: int = 300, labels: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Logits `sharpness` times too large for the chances that the references are drawn with."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(examples, labels)) * 2
    references = [generator.choice(labels, p=row) for row in softmax(logits, axis=1)]
    return (sharpness * logits).astype(np.float32), np.array(references)


def multi(seed: int, sharpness: float, examples: int = 300, labels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    logits = generator.normal(-1, 2, size=(examples, labels))
    references = (generator.random((examples, labels)) < expit(logits)).astype(np.float32)
    return (sharpness * logits).astype(np.float32), references


# scipy's solver, on scikit-learn's loss and scipy's Student distribution.
def best_by_scipy(logits: np.ndarray, references: np.ndarray, problem_type: str) -> float:
    def cost(log_temperature: float) -> float:
        scaled = logits.astype(np.float64) / math.exp(log_temperature)
        spread = FLATTER if log_temperature > 0 else SHARPER
        prior = student.logpdf(log_temperature / spread, 3) - student.logpdf(0, 3)
        if problem_type == SINGLE:
            loss = log_loss(
                references, softmax(scaled, axis=1), labels=range(logits.shape[1]), normalize=False
            )
        else:
            loss = log_loss(references.ravel(), expit(scaled).ravel(), normalize=False)
        return loss - prior

    sides = [(math.log(LOWEST), 0.0), (0.0, math.log(HIGHEST))]
    found = [minimize_scalar(cost, bounds=side, options={"xatol": 1e-10}) for side in sides]
    return math.exp(min(found, key=lambda each: each.fun).x)


@pytest.mark.parametrize("sharpness", [0.2, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("problem_type", "draw"), [(SINGLE, single), (MULTI, multi)])
def test_temperature_is_the_likeliest_by_scipy_and_sklearn(problem_type, draw, seed, sharpness):
    logits, references = draw(seed, sharpness)
    found = fit_temperature(logits, references, problem_type)
    assert found == pytest.approx(best_by_scipy(logits, references, problem_type), rel=1e-4)
    # What the logits were multiplied by, as well as some hundred examples tell.
    assert 0.7 * sharpness < found < 1.4 * sharpness


@pytest.mark.parametrize(("seed", "sharpness"), [(0, 0.5), (1, 4.0)])
def test_many_examples_give_sklearns_temperature(seed, sharpness):
    scaling = getattr(pytest.importorskip("sklearn.calibration"), "_TemperatureScaling", None)
    if scaling is None:
        pytest.skip("this scikit-learn has no temperature scaling")
    logits, references = single(seed, sharpness, examples=20_000)
    expected = 1 / scaling().fit(logits.astype(np.float64), references).beta_
    assert fit_temperature(logits, references, SINGLE) == pytest.approx(expected, rel=2e-3)


def test_few_examples_change_little():
    # Three of four are right, each by a logit of 3: alone they would give 3/4 = sigmoid(3 / T), so that T = 2.73.
    logits = np.tile([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [0.0, 3.0]], (250, 1))
    found = [fit_temperature(logits[:count], np.zeros(count, int), SINGLE) for count in (20, 40, 200, 1000)]
    assert 1.0 < found[0] < found[1] < found[2] < found[3] < 3 / math.log(3)
    assert found[3] == pytest.approx(3 / math.log(3), rel=0.02)
    # All right: alone they would give certainty, T = 0.
    sure = np.tile([2.0, 0.0], (200, 1))
    found = [fit_temperature(sure[:count], np.zeros(count, int), SINGLE) for count in (20, 200)]
    assert 0.95 < found[0] < 1.0 and found[1] < found[0]


def test_bounds_and_guards():
    logits, references = single(3, 1.0)
    # Never right: the flatter, the better.
    wrong = (logits.argmax(1) + 1) % 4
    assert fit_temperature(3 * logits, wrong, SINGLE) == pytest.approx(HIGHEST)
    many = np.tile(logits / 100, (100, 1)), np.tile(references, 100)
    assert fit_temperature(*many, SINGLE) == pytest.approx(LOWEST)
    assert fit_temperature(np.zeros((30, 4)), references[:30], SINGLE) == 1.0
    # 19 are too few, 20 are not.
    assert fit_temperature(3 * logits[:19], references[:19], SINGLE) is None
    assert fit_temperature(3 * logits[:20], references[:20], SINGLE) > 1.2
    assert fit_temperature(np.zeros((30, 1)), np.linspace(0, 1, 30), REGRESSION) is None


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    labels=st.integers(1, 6),
    examples=st.integers(1, 60),
    scale=st.sampled_from([0.0, 1e-4, 0.1, 1.0, 30.0, 1e4]),
    problem_type=st.sampled_from([SINGLE, MULTI]),
)
def test_any_temperature_is_in_its_range_and_never_worse(seed, labels, examples, scale, problem_type):
    generator = np.random.default_rng(seed)
    logits = (scale * generator.normal(size=(examples, labels))).astype(np.float32)
    if problem_type == SINGLE:
        references = generator.integers(0, labels, examples)
    else:
        references = generator.integers(0, 2, (examples, labels))
    found = fit_temperature(logits, references, problem_type)
    assert (found is None) == (examples < 20)
    if found is None:
        return
    assert LOWEST * 0.999999 <= found <= HIGHEST * 1.000001

    def loss(temperature):
        if problem_type == SINGLE:
            scaled = logits / np.float64(temperature)
            chosen = np.take_along_axis(scaled, references[:, None], 1)[:, 0]
            return (np.logaddexp.reduce(scaled, axis=1) - chosen).mean()
        return np.logaddexp(0, np.where(references > 0, -logits, logits) / np.float64(temperature)).mean()

    assert loss(found) <= loss(1.0) * (1 + 1e-12)
    if problem_type == SINGLE:
        # Not even by rounding does a temperature change a label.
        assert Calibration(found).decision_outputs(logits) is logits


def brute_force(scores: np.ndarray, truth: np.ndarray) -> float:
    """The best F1 over all thresholds, from scikit-learn's curve; a threshold of its is among those given."""
    precision, recall, _ = precision_recall_curve(truth, scores)
    sums = precision + recall
    return float(np.max(2 * precision * recall / np.where(sums > 0, sums, 1)))


@pytest.mark.parametrize("seed", range(8))
def test_thresholds_give_the_best_f1_of_sklearn(seed):
    logits, references = multi(seed, 1.0, examples=120)
    scores = expit(logits.astype(np.float64))
    if seed % 2:
        scores = scores.round(1)  # with many equal scores
    thresholds = fit_thresholds(scores, references, prior=0)
    assert len(thresholds) == 3
    for column, threshold in enumerate(thresholds):
        score, truth = scores[:, column], references[:, column]
        best = brute_force(score, truth)
        assert f1_score(truth, score > threshold) == pytest.approx(best)
        # It stands in the middle between two scores (or 0), or where it did before.
        below, above = max([0.0, *score[score < threshold]]), min(score[score > threshold])
        assert threshold == 0.5 or threshold == pytest.approx((below + above) / 2, abs=1e-6)
        if f1_score(truth, score > 0.5) == best:
            assert threshold == 0.5
    assert set(thresholds) != {0.5}


def expected_f1(scores: np.ndarray, truth: np.ndarray, threshold: float, prior: float) -> float:
    """F1 of a threshold with each example having the label in part as it was seen and in part by its score."""
    share = sum(truth) / (sum(truth) + prior)
    with_label = [share * bool(true) + (1 - share) * score for score, true in zip(scores, truth, strict=True)]
    given = [score > threshold for score in scores]
    hits = sum(part for part, is_given in zip(with_label, given, strict=True) if is_given)
    return 2 * hits / (sum(given) + sum(with_label))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("prior", [5.0, PRIOR])
def test_thresholds_are_the_best_for_what_was_seen_and_what_the_probabilities_expect(seed, prior):
    logits, references = multi(seed, 1.0, examples=120)
    scores = expit(logits.astype(np.float64)).round(2 if seed % 2 else 6)
    for column, threshold in enumerate(fit_thresholds(scores, references, prior=prior)):
        score, truth = scores[:, column], references[:, column]
        candidates = [*np.unique(score)[:-1], 0.0, 0.5]
        best = max(expected_f1(score, truth, candidate, prior) for candidate in candidates)
        assert expected_f1(score, truth, threshold, prior) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("examples", [100, 200, 400])
def test_thresholds_of_few_examples_do_no_harm_to_others(examples):
    """Probabilities that are right already have little to gain from a cut, and much to lose from a chance one."""
    rng = np.random.default_rng(examples)
    rate = rng.uniform(0.05, 0.2, 40)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        truth = rng.random((count, 40)) < rate
        # A normal feature with mean 1 or -1 and spread 0.7: its log odds by Bayes, so that they are calibrated.
        feature = rng.normal(np.where(truth, 1.0, -1.0), 0.7)
        return expit(2 * feature / 0.49 + np.log(rate / (1 - rate))), truth.astype(int)

    few = draw(examples)
    scores, references = draw(20_000)
    score = f1_score(references, scores > fit_thresholds(*few), average="macro")
    chance = f1_score(references, scores > fit_thresholds(*few, prior=0), average="macro")
    half = f1_score(references, scores > 0.5, average="macro")
    assert half - score < 0.003
    assert half - score < (half - chance) / 2


def test_thresholds_by_hand():
    # Cut below 0.3, all five with the label are found beside one without: F1 = 10/11. Below 0.7: 8/9.
    scores = np.array([0.9, 0.8, 0.75, 0.7, 0.4, 0.3, 0.2, 0.1, 0.05, 0.04])
    truth = np.array([1, 1, 1, 1, 0, 1, 0, 0, 0, 0])
    assert fit_thresholds(scores[:, None], truth[:, None], prior=0) == (pytest.approx(0.25),)
    # 0.4 and 0.6 for the label are equally good by F1; so is one half between them.
    parted = np.where(truth, 0.6, 0.4)
    assert fit_thresholds(parted[:, None], truth[:, None], prior=0) == (0.5,)
    # All of those above 0.6 are right: the cut nearest to one half is the one below the lowest of them.
    shifted = np.where(truth, 0.9, 0.6)
    assert fit_thresholds(shifted[:, None], truth[:, None], prior=0) == (pytest.approx(0.75),)
    # Four with the label, or four without it, are too few.
    for few in (np.arange(10) < 4, np.arange(10) < 6):
        assert fit_thresholds(shifted[:, None], few[:, None]) == (0.5,)


def test_no_threshold_between_scores_that_rounding_may_exchange():
    scores = np.full(40, 0.3) + np.arange(40) * 1e-9
    truth = np.arange(40) >= 20
    (threshold,) = fit_thresholds(scores[:, None], truth[:, None])
    assert threshold == pytest.approx(0.15)  # below all, as if they were equal


def test_thresholds_are_inside_the_open_interval():
    truth = np.arange(20) % 2
    for scores in (np.zeros(20), np.ones(20), np.where(truth, 1.0, 0.0), np.where(truth, 1e-6, 0.0)):
        (threshold,) = fit_thresholds(scores[:, None], truth[:, None])
        assert 0 < threshold < 1


def test_a_task_fits_what_it_has():
    logits, references = multi(5, 3.0)
    made = task_of(MULTI).calibrate(logits, references)
    assert made.temperature is not None
    assert made.thresholds == fit_thresholds(expit(logits.astype(float) / made.temperature), references)
    assert task_of(MULTI).calibrate(logits[:19], references[:19]) == Calibration()
    assert task_of(SINGLE).calibrate(*single(6, 3.0)).thresholds is None
    assert task_of(REGRESSION).calibrate(np.zeros((30, 1)), np.linspace(0, 1, 30)) == Calibration()


def test_decision_outputs_are_positive_where_the_calibrated_score_is_above_its_threshold():
    logits, _ = multi(7, 3.0)
    made = Calibration(2.5, (0.03, 0.5, 0.9))
    scores = expit(logits.astype(float) / 2.5)
    outputs = made.decision_outputs(logits)
    np.testing.assert_array_equal(outputs > 0, scores > made.thresholds)
    assert outputs.dtype == logits.dtype
    # By hand: 2.5 * log(0.9 / 0.1) less; and nothing less at one half.
    np.testing.assert_allclose(logits[:, 2] - outputs[:, 2], 2.5 * math.log(9), rtol=1e-5)
    np.testing.assert_array_equal(logits[:, 1], outputs[:, 1])
    assert Calibration().decision_outputs(logits) is logits
    assert made.scale == 2.5 and Calibration().scale == 1.0


def test_bins_are_closed_above():
    found = reliability(np.array([0.0, 0.5, 0.5, 0.51, 1.0]), np.array([0, 1, 0, 1, 1], bool), bins=2)
    assert [(entry.low, entry.high, entry.count) for entry in found.bins] == [(0.0, 0.5, 3), (0.5, 1.0, 2)]
    assert found.bins[0].accuracy == pytest.approx(1 / 3) and found.bins[0].confidence == pytest.approx(1 / 3)
    # 3 of 5 are calibrated exactly; the other 2 are 1 - 0.755 apart.
    assert found.error == pytest.approx(2 / 5 * 0.245)
