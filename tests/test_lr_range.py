"""The learning-rate range test: its schedule and losses against plain torch, its rule, and that it leaves no trace."""

import copy
import io
import json
import os
import random
import signal
import sys

import matplotlib.image
import numpy as np
import pytest
import scipy.stats
import torch
from conftest import tiny_batch, tiny_classifier
from datasets import Dataset
from transformers import TrainerCallback

from hf_lora import LoRAConfig, LoRATrainer, LoRATrainingArguments, head_parameters, inject_lora
from hf_lora.lora.inject import injection
from hf_lora.recipe import lr_range as module
from hf_lora.recipe.lr_range import find_learning_rate, run_find_lr
from hf_lora.recipe.lr_range_plot import range_picture
from hf_lora.recipe.lr_rule import LearningRateRange, diverged, line_slopes, schedule, smooth, suggest


def dataset(size=24):
    batch = tiny_batch(size)
    # The first token tells the label, so that there is something to learn.
    batch["input_ids"][:, 0] = 10 + batch["labels"]
    return Dataset.from_dict({name: value.tolist() for name, value in batch.items()})


def injected(dropout=0.1):
    model = tiny_classifier("bert", hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    torch.manual_seed(1)
    inject_lora(model, LoRAConfig(rank=4, dropout=dropout))
    return model


def make(directory, model=None, callbacks=None, optimizers=(None, None), **options):
    defaults = {
        "output_dir": str(directory / "out"),
        "use_cpu": True,
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    return LoRATrainer(
        model=model or injected(),
        args=LoRATrainingArguments(**{**defaults, **options}),
        train_dataset=dataset(),
        callbacks=callbacks,
        optimizers=optimizers,
    )


def by_hand(model, rates, *, accumulated=1, head_rate=None, base_rate=1e-2, plus=None, decay=0.0, clip=1.0):
    """Losses of a plain loop over the rows in order, four a batch."""
    rows = dataset().with_format("torch")
    head = {id(p) for p in head_parameters(model).values()}
    outputs = {f"{placement.layer}.lora_B" for placement in injection(model).placements}
    groups = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = head_rate / base_rate if head_rate and id(parameter) in head else 1.0
            own = plus if plus and name in outputs else own
            is_bias = name.endswith("bias")
            groups.append({"params": [parameter], "own": own, "weight_decay": 0.0 if is_bias else decay})
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    losses, place = [], 0
    model.train()
    for rate in rates:
        total = 0.0
        for _ in range(accumulated):
            inputs = {name: rows[place : place + 4][name] for name in rows.column_names}
            place = (place + 4) % len(rows)
            loss = model(**inputs).loss / accumulated
            loss.backward()
            total += loss.item()
        losses.append(total)
        torch.nn.utils.clip_grad_norm_([g["params"][0] for g in groups], clip)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["own"]
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"head_learning_rate": 5e-2, "weight_decay": 0.1, "max_grad_norm": 0.2},
        {"lora_plus_ratio": 16.0, "head_learning_rate": 1e-3},
    ],
)
def test_rates_and_losses_are_those_of_a_plain_loop(options, tmp_path):
    model = injected(dropout=0.0)
    rates = np.geomspace(2e-3, 5e-2, 20)
    expected = by_hand(
        copy.deepcopy(model),
        rates,
        accumulated=options.get("gradient_accumulation_steps", 1),
        head_rate=options.get("head_learning_rate"),
        plus=options.get("lora_plus_ratio"),
        decay=options.get("weight_decay", 0.0),
        clip=options.get("max_grad_norm", 1.0),
    )
    run = make(
        tmp_path,
        model,
        train_sampling_strategy="sequential",
        warmup_steps=3,
        lr_scheduler_type="cosine",
        **options,
    )
    found = find_learning_rate(run, low=2e-3, high=5e-2, steps=20)
    np.testing.assert_allclose(found.rates, rates, rtol=1e-12)
    np.testing.assert_allclose(found.losses, expected, rtol=1e-4)
    assert max(expected) - min(expected) > 0.02  # the updates count, to a hundred times the tolerance
    assert found.stopped is None and found.asked == (2e-3, 5e-2, 20)
    np.testing.assert_allclose(found.smoothed, smooth(expected), rtol=1e-4)


def test_smoothing_is_the_exponential_mean_without_its_bias():
    got = smooth([1.0, 3.0, 2.0])
    expected = [1.0, (0.09 * 1 + 0.1 * 3) / 0.19, (0.081 * 1 + 0.09 * 3 + 0.1 * 2) / 0.271]
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    np.testing.assert_allclose(smooth([0.5] * 40), 0.5, rtol=1e-12)


def test_slopes_and_their_errors_are_those_of_linear_regression():
    losses = np.random.default_rng(0).normal(size=30)
    slopes, errors = line_slopes(losses.tolist(), 9)
    fits = [scipy.stats.linregress(np.arange(9), losses[at : at + 9]) for at in range(22)]
    np.testing.assert_allclose(slopes, [fit.slope for fit in fits], rtol=1e-10)
    np.testing.assert_allclose(errors, [fit.stderr for fit in fits], rtol=1e-10)


def state_of(run):
    model = run.model
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "buffers": {name: value.clone() for name, value in model.named_buffers()},
        "gradients": {
            name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
        },
        "modes": {name: part.training for name, part in model.named_modules()},
        "classes": {name: type(part) for name, part in model.named_modules()},
        "attention": model.config._attn_implementation,
        "trainer": dict(vars(run)),
        "arguments": run.args.to_dict(),
        "model": dict(vars(model)),
        "callbacks": list(run.callback_handler.callbacks),
        "loaders": list(run.accelerator.gradient_state.dataloader_references),
        "held": (list(run.accelerator._models), list(run.accelerator._optimizers)),
    }


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def assert_same(before, after):
    for key in ("tensors", "buffers", "gradients"):
        assert before[key].keys() == after[key].keys()
        for name, value in before[key].items():
            same = value is after[key][name] if value is None else torch.equal(value, after[key][name])
            assert same, (key, name)
    for key in ("trainer", "model"):
        assert before[key].keys() == after[key].keys()
        assert all(value is after[key][name] for name, value in before[key].items()), key
    for key in ("modes", "classes", "attention", "arguments", "callbacks", "loaders", "held"):
        assert before[key] == after[key], key


class Breaking:
    """A collator that raises in the middle of the test."""

    def __init__(self, own, error):
        self.own, self.error, self.calls = own, error, 0

    def __call__(self, rows):
        self.calls += 1
        if self.calls == 8:
            self.error()
        return self.own(rows)


class Listening(TrainerCallback):
    def __init__(self):
        self.heard = 0

    def on_log(self, *_, **__):
        self.heard += 1

    on_step_end = on_train_begin = on_log


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"train_sampling_strategy": "group_by_length"}])
def test_everything_is_as_it_was(options, tmp_path):
    listening = Listening()
    run = make(tmp_path, callbacks=[listening], save_strategy="steps", save_steps=1, **options)
    run.model.eval()
    next(iter(run.model.modules())).training = True
    for number, parameter in enumerate(run.model.parameters()):
        if parameter.requires_grad and number % 2:
            parameter.grad = torch.full_like(parameter, number)
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(7)
    states, before = random_states(), state_of(run)
    found = find_learning_rate(run, low=1e-4, high=1e-1, steps=20)
    assert len(set(found.losses)) > 10
    assert random_states() == states
    assert_same(before, state_of(run))
    assert not listening.heard and not any((tmp_path / "out").iterdir())


def test_an_error_in_the_middle_leaves_everything_as_it_was_too(tmp_path):
    run = make(tmp_path)

    def fail():
        raise RuntimeError("out of luck")

    run.data_collator = Breaking(run.data_collator, fail)
    before, states = state_of(run), random_states()
    with pytest.raises(RuntimeError, match="out of luck"):
        find_learning_rate(run, steps=20)
    assert run.data_collator.calls == 8
    assert_same(before, state_of(run))
    assert random_states() == states


def test_sigterm_ends_the_program_and_saves_no_checkpoint(tmp_path):
    run = make(tmp_path)
    run.data_collator = Breaking(run.data_collator, lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = state_of(run)
    with pytest.raises(SystemExit) as ended:
        find_learning_rate(run, steps=20)
    assert ended.value.code == 143
    assert_same(before, state_of(run))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not any((tmp_path / "out").iterdir())


def trained(run):
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    rates = [entry["learning_rate"] for entry in run.state.log_history if "loss" in entry]
    return losses, rates, {name: value.clone() for name, value in run.model.state_dict().items()}


def own_optimizer(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_training_afterwards_gives_what_it_would_have_given(strategy, given, tmp_path):
    results = []
    for tested in (False, True):
        model = injected()
        optimizers = own_optimizer(model) if given else (None, None)
        run = make(tmp_path, model, train_sampling_strategy=strategy, optimizers=optimizers)
        torch.manual_seed(5)
        if tested:
            # Below the rates at which SGD would end the test early.
            assert len(find_learning_rate(run, low=1e-4, high=1e-2, steps=20).losses) == 20
        results.append(trained(run))
    (losses, rates, left), (again, rates_again, right) = results
    assert losses == again and rates == rates_again and len(losses) == 5
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_an_optimizer_of_ones_own_is_tested_at_the_rates(tmp_path):
    """Its first group has the rates of the test, whatever its own rate and the arguments' are."""
    model = injected(dropout=0.0)
    plain = copy.deepcopy(model)
    run = make(tmp_path, model, optimizers=own_optimizer(model), train_sampling_strategy="sequential")
    found = find_learning_rate(run, low=1e-3, high=1.0, steps=20)
    optimizer, _ = own_optimizer(plain)
    rows, losses = dataset().with_format("torch"), []
    plain.train()
    for step, rate in enumerate(np.geomspace(1e-3, 1.0, 20)[: len(found.losses)]):
        first = step * 4 % 24
        loss = plain(**{name: rows[first : first + 4][name] for name in rows.column_names}).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    np.testing.assert_allclose(found.losses, losses, rtol=1e-4)


def test_a_test_after_training_keeps_the_optimizers_state(tmp_path):
    run = make(tmp_path)
    run.train()
    before = copy.deepcopy(run.optimizer.state_dict())
    find_learning_rate(run, low=1e-5, high=1e-2, steps=20)
    after = run.optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys() and before["state"]
    for index, values in before["state"].items():
        assert all(torch.equal(value, after["state"][index][name]) for name, value in values.items())


def test_a_diverging_loss_ends_the_test(tmp_path):
    run = make(tmp_path)
    found = find_learning_rate(run, low=1e-3, high=1e4, steps=60)
    assert 10 < len(found.losses) < 60 and "diverging loss at" in found.stopped
    assert len(found.rates) == len(found.smoothed) == len(found.losses)
    assert found.smoothed[-1] > 2 * min(found.smoothed[9:]) and found.smoothed[-1] > max(found.losses[:10])


def test_divergence_is_twice_the_lowest_and_above_the_first_losses():
    assert not diverged([1.0] * 9 + [9.0], [1.0] * 9 + [9.0])
    calm = [1.0] * 12
    assert diverged([*calm, 9.0], [*calm, 2.1])
    assert not diverged([*calm, 9.0], [*calm, 1.9])
    # A single early loss above it is as much as noise can do.
    assert not diverged([3.0, *calm, 9.0], [1.0, *calm, 2.1])
    # What the mean was while it was one of few losses does not count.
    assert not diverged([1.0] * 20, [0.1] * 8 + [1.0] * 12)


@pytest.mark.parametrize("step, match", [(0, "not finite at the first step"), (14, None)])
def test_a_loss_that_is_not_finite_ends_the_test(step, match, tmp_path, monkeypatch):
    run = make(tmp_path)
    own, calls = run.compute_loss, []

    def broken(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs) * (float("nan") if len(calls) == step + 1 else 1.0)

    monkeypatch.setattr(run, "compute_loss", broken)
    if match:
        with pytest.raises(ValueError, match=match):
            find_learning_rate(run, steps=20)
        return
    found = find_learning_rate(run, low=1e-5, high=1e-4, steps=20)
    assert len(found.losses) == len(calls) - 1 == 14 and np.isfinite(found.losses).all()
    assert found.stopped == f"a loss of nan at {np.geomspace(1e-5, 1e-4, 20)[14]:.2g}"


def measured(level, *, noise=0.05, steps=100, seed=0, low=1e-5, high=1.0):
    """A test whose loss is a function of log10 of the rate, with noise, ended as ours is."""
    rng = np.random.default_rng(seed)
    losses, stopped = [], None
    for rate in schedule(low, high, steps):
        losses.append(max(1e-3, float(level(np.log10(rate)) + noise * rng.normal())))
        if diverged(losses, smooth(losses)):
            stopped = "a diverging loss"
            break
    rates = tuple(schedule(low, high, steps)[: len(losses)].tolist())
    return LearningRateRange(rates, tuple(losses), tuple(smooth(losses)), stopped, (low, high, steps))


def cold(x):
    """Falls from 0.7 to 0.3 around 10^-2.8, and rises steeply from 10^-1.3."""
    return 0.7 - 0.4 / (1 + np.exp(-(x + 2.8) / 0.3)) + 4 * max(0.0, x + 1.3) ** 2


def warm(x):
    """A head that was fitted before: hardly anything to gain; rises from 10^-1.8."""
    return 0.3 - 0.01 / (1 + np.exp(-(x + 2.8) / 0.3)) + 4 * max(0.0, x + 1.8) ** 2


@pytest.mark.parametrize("steps", [60, 100, 200])
@pytest.mark.parametrize("seed", range(5))
def test_a_fresh_head_gets_the_rate_of_the_steepest_fall(steps, seed):
    suggestion = suggest(measured(cold, steps=steps, seed=seed))
    assert suggestion.rule == "where the loss falls steepest"
    assert suggestion.steepest == pytest.approx(10**-2.8, rel=2.0)
    assert 10**-3.3 < suggestion.learning_rate < 10**-2.3
    assert suggestion.learning_rate == float(f"{suggestion.steepest:.2g}")
    assert 10**-2.2 < suggestion.lowest < 10**-0.9 < 1
    assert suggestion.steepest < suggestion.below_rise


def test_the_steepest_fall_is_exact_where_there_is_no_noise():
    suggestion = suggest(measured(lambda x: 1 / (1 + np.exp((x + 3) / 0.2)), noise=0.0, high=1e-1, steps=81))
    # 20 steps a decade: the middle of the fall is a step of the test.
    assert suggestion.steepest == pytest.approx(1e-3)
    assert suggestion.below_rise is None


@pytest.mark.parametrize("steps", [60, 100, 200])
@pytest.mark.parametrize("seed", range(5))
def test_a_fitted_head_gets_a_rate_a_decade_below_the_rise(steps, seed):
    suggestion = suggest(measured(warm, steps=steps, seed=seed))
    assert suggestion.steepest is None and suggestion.rule == "a decade below where the loss rises"
    assert suggestion.learning_rate == float(f"{suggestion.below_rise:.2g}")
    assert 10**-3.2 < suggestion.learning_rate < 10**-1.8


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_that_neither_falls_nor_rises_gets_no_suggestion(seed):
    with pytest.raises(
        ValueError, match="neither falls nor rises between 1e-05 and 1; try a higher last rate"
    ):
        suggest(measured(lambda x: 0.7, seed=seed))


def test_a_loss_that_rises_from_the_start_gets_no_suggestion():
    with pytest.raises(ValueError, match="never falls and rises from 1e-05 on; try a lower first rate"):
        suggest(measured(lambda x: 1 + 0.2 * (x + 5), noise=0.01))


def test_a_test_that_ended_at_once_gets_no_suggestion():
    rates = tuple(schedule(1e-5, 1.0, 100)[:5].tolist())
    found = LearningRateRange(rates, (1.0,) * 5, (1.0,) * 5, "a loss of nan at 2e-05", (1e-5, 1.0, 100))
    with pytest.raises(ValueError, match="got a loss of nan at 2e-05 after 5 steps"):
        suggest(found)


def test_a_leap_at_the_end_counts_as_a_rise():
    rng = np.random.default_rng(0)
    losses = (*(0.3 + 0.05 * rng.normal(size=79)).tolist(), 30.0)
    rates = tuple(schedule(1e-5, 1.0, 100)[:80].tolist())
    found = LearningRateRange(rates, losses, tuple(smooth(losses)), "a diverging loss", (1e-5, 1.0, 100))
    assert suggest(found).below_rise == rates[80 - 21]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"low": 0.0}, "got 0.0 to 1.0"),
        ({"low": -1e-3}, "got -0.001 to 1.0"),
        ({"low": float("nan")}, "got nan to 1.0"),
        ({"high": float("inf")}, "got 1e-05 to inf"),
        ({"low": 1e-2, "high": 1e-3}, "got 0.01 to 0.001"),
        ({"low": 1e-2, "high": 5e-2}, "at least ten times the first"),
        ({"steps": 19}, "got 19; expected a whole number of at least 20"),
        ({"steps": 50.0}, "got 50.0"),
        ({"steps": True}, "got True"),
    ],
)
def test_bad_ranges_are_errors_before_anything_runs(options, match, tmp_path, monkeypatch):
    run = make(tmp_path)
    monkeypatch.setattr(run, "train", lambda: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=match) as caught:
        find_learning_rate(run, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spoil, match",
    [
        (lambda run, patch: patch.setattr(run, "is_fsdp_enabled", True), "with FSDP"),
        (lambda run, patch: patch.setattr(run, "is_deepspeed_enabled", True), "with DeepSpeed"),
        (lambda run, patch: patch.setattr(module, "process_count", lambda: 2), "with several processes"),
        (lambda run, patch: patch.setattr(run.args, "optim", "adalomo"), "inside the backward pass"),
        (lambda run, patch: patch.setattr(run.args, "learning_rate", 0.0), "a learning_rate of 0"),
    ],
)
def test_what_it_cannot_do_is_refused(spoil, match, tmp_path, monkeypatch):
    run = make(tmp_path)
    spoil(run, monkeypatch)
    monkeypatch.setattr(run, "train", lambda: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=match) as caught:
        find_learning_rate(run)
    assert "\n" not in str(caught.value)


def test_the_run_writes_what_it_measured_and_says_what_next(tmp_path, capsys):
    run = make(tmp_path, injected(dropout=0.0), head_learning_rate=2e-2)
    output = tmp_path / "out"
    result = run_find_lr(run, output, low=1e-4, high=10.0, steps=40)
    assert sorted(path.name for path in output.iterdir()) == ["lr_range.json", "lr_range.png"]
    assert json.loads((output / "lr_range.json").read_text()) == result
    again = find_learning_rate(run, low=1e-4, high=10.0, steps=40)
    assert result["losses"] == list(again.losses) and result["rates"] == list(again.rates)
    assert result["smoothed"] == list(again.smoothed) and result["stopped"] == again.stopped
    rate = result["suggestion"]["learning_rate"]
    assert rate == suggest(again).learning_rate
    head = float(f"{2 * rate:.2g}")
    assert result["suggestion"]["head_learning_rate"] == head
    assert result["settings"]["training"]["per_device_train_batch_size"] == 4
    assert result["settings"]["training"]["train_sampling_strategy"] == run.args.train_sampling_strategy
    assert result["settings"]["lora"]["rank"] == 4 and result["settings"]["examples"] == 24
    shown = capsys.readouterr().out
    assert f"with --learning_rate {rate:g} --head_learning_rate {head:g}\n" in shown
    assert f"suggestion: {rate:g}, {result['suggestion']['rule']}" in shown
    picture = range_picture(again.rates, again.losses, again.smoothed, rate)
    assert (output / "lr_range.png").read_bytes() == picture


def test_without_matplotlib_there_is_a_line_instead_of_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run_find_lr(make(tmp_path), tmp_path / "out", low=1e-4, high=10.0, steps=40)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lr_range.json"]
    assert "pip install 'hf-lora[plots]'" in capsys.readouterr().out


def test_what_was_measured_is_kept_where_nothing_can_be_suggested(tmp_path):
    run = make(tmp_path)
    with pytest.raises(ValueError, match=r"no learning rate can be suggested.*lr_range\.png") as caught:
        run_find_lr(run, tmp_path / "out", low=1e-12, high=1e-9, steps=20)
    assert "\n" not in str(caught.value)
    result = json.loads((tmp_path / "out" / "lr_range.json").read_text())
    assert result["suggestion"] is None and result["refusal"] in str(caught.value)
    assert len(result["losses"]) == 20


def test_a_trained_model_still_gets_a_sensible_rate(tmp_path):
    """The loss is near zero at the start, so that there is nothing to gain."""
    run = make(tmp_path, injected(dropout=0.0), max_steps=80, logging_steps=80, lr_scheduler_type="constant")
    run.train()
    run.optimizer = run.lr_scheduler = None
    found = find_learning_rate(run, low=1e-4, high=10.0, steps=40)
    assert max(found.losses[:10]) < 0.2
    suggestion = suggest(found)
    after = found.smoothed[np.searchsorted(found.rates, suggestion.learning_rate)]
    assert 1e-4 < suggestion.learning_rate < 1 and after < 0.3


def test_the_picture_shows_both_curves_and_the_suggestion():
    found = measured(cold)
    picture = range_picture(found.rates, found.losses, found.smoothed, 0.0016)
    assert picture == range_picture(found.rates, found.losses, found.smoothed, 0.0016)
    plain = range_picture(found.rates, found.losses, found.smoothed, None)

    def has(data, colour):
        pixels = matplotlib.image.imread(io.BytesIO(data), format="png")[..., :3]
        return (np.rint(255 * pixels) == colour).all(axis=-1).any()

    accent, curve = (0xC1, 0x66, 0x6B), (0x4A, 0x6F, 0xA5)
    assert has(picture, curve) and has(picture, accent)
    assert has(plain, curve) and not has(plain, accent)


def with_losses(losses, steps=100):
    rates = tuple(schedule(1e-5, 1.0, steps)[: len(losses)].tolist())
    return LearningRateRange(rates, tuple(losses), tuple(smooth(losses)), None, (1e-5, 1.0, steps))


def noisy(level, seed=0):
    return (level + 0.01 * np.random.default_rng(seed).normal(size=100)).tolist()


def test_one_outlier_is_neither_a_fall_nor_a_rise():
    losses = noisy(np.full(100, 0.7))
    losses[60] = 0.2
    with pytest.raises(ValueError, match="neither falls nor rises"):
        suggest(with_losses(losses))
    losses[60] = 1.2
    with pytest.raises(ValueError, match="neither falls nor rises"):
        suggest(with_losses(losses[:62]))


def test_a_rise_that_does_not_stay_is_none():
    """Of two clear rises the first comes back to what was before it: the second counts."""
    level = np.full(100, 0.7)
    level[:3] += 0.1
    level[45:55] += 0.1
    level[85:] += 0.05 * np.arange(1, 16)
    found = with_losses(noisy(level))
    slopes, errors = line_slopes(found.losses, 21)
    assert (slopes[30:36] > np.maximum(4 * np.median(errors[:30]), 2 * errors[30:36])).any()
    assert suggest(found).below_rise > found.rates[60]


def test_a_recovery_after_the_lowest_loss_is_not_the_fall():
    places = np.arange(100)
    level = 0.7 - 0.3 / (1 + np.exp(-(places - 40) / 4)) + 0.6 * np.exp(-0.5 * ((places - 75) / 4.0) ** 2)
    suggestion = suggest(with_losses(noisy(level)))
    assert 30 <= np.searchsorted(schedule(1e-5, 1.0, 100), suggestion.steepest) <= 50


def test_another_batch_size_starts_the_test_again(tmp_path):
    run = make(tmp_path, auto_find_batch_size=True)

    def fail():
        raise RuntimeError("CUDA out of memory.")

    run.data_collator = Breaking(run.data_collator, fail)
    before = state_of(run)
    found = find_learning_rate(run, low=1e-5, high=1e-3, steps=20)
    assert run.data_collator.calls >= 28 - 1 and len(found.losses) == 20
    assert_same(before, state_of(run))
