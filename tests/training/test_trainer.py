import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from conftest import randomize, tiny_batch, tiny_classifier, tiny_tokenizer
from datasets import Dataset
from helpers_training import arguments, assert_same_tensors, dataset, injected, trainer
from torch.utils.data import RandomSampler, SequentialSampler
from transformers import DataCollatorWithPadding, EarlyStoppingCallback, Trainer, TrainingArguments
from transformers import trainer as trainer_module
from transformers.trainer_utils import BestRun, HPSearchBackend

from hf_lora import (
    LoRAConfig,
    LoRATrainer,
    head_parameters,
    inject_lora,
    lora_disabled,
    lora_parameters,
    merge_lora,
    unmerge_lora,
)
from hf_lora.adapters.directory import read_adapter
from hf_lora.adapters.peft_format import adapter_tensors
from hf_lora.data.collation import QuickPadding


def test_the_optimizer_holds_lora_and_head_and_nothing_else(tmp_path):
    run = trainer(tmp_path)
    held = {id(p) for group in run.create_optimizer().param_groups for p in group["params"]}
    wanted = {**lora_parameters(run.model), **head_parameters(run.model)}
    assert held == {id(p) for p in wanted.values()}


@pytest.mark.parametrize("bias", ["none", "all"])
def test_training_moves_what_is_trained_and_no_bit_of_the_rest(bias, tmp_path):
    model = injected(bias=bias)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer(tmp_path, model).train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trained


def test_the_loss_curve_equals_peft_and_stock_trainer(tmp_path):
    """Same data, seed and factors, no dropout: every logged loss and the final factors agree."""
    ours = tiny_classifier("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    inject_lora(ours, LoRAConfig(rank=4, alpha=8, projections="qv"))
    base = tiny_classifier("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    )
    factors = {
        name: dict(theirs.named_parameters())[f"base_model.model.{name}.default.weight"]
        for name in lora_parameters(ours)
    }
    for name, parameter in lora_parameters(ours).items():
        parameter.data.copy_(factors[name].data)
    run = trainer(tmp_path / "a", ours)
    run.train()
    stock = Trainer(model=theirs, args=arguments(tmp_path / "b", TrainingArguments), train_dataset=dataset())
    stock.train()
    losses = [[entry["loss"] for entry in part.state.log_history if "loss" in entry] for part in (run, stock)]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    for name, parameter in lora_parameters(ours).items():
        torch.testing.assert_close(parameter, factors[name], atol=1e-5, rtol=1e-4)


def test_gradient_accumulation_gives_the_loss_and_gradients_of_the_large_batch(tmp_path):
    """The trap: stock Trainer multiplies both by the number of accumulated steps for these heads."""
    results = []
    for batch_size, steps in ((8, 1), (2, 4)):
        model = injected(dropout=0.0)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        run = trainer(
            tmp_path / str(steps),
            model,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            max_steps=3,
            train_sampling_strategy="sequential",
            optim="sgd",
        )
        run.train()
        entries = [entry for entry in run.state.log_history if "loss" in entry]
        results.append(
            ([e["loss"] for e in entries], [e["grad_norm"] for e in entries], adapter_tensors(model))
        )
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-4)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-3)
    for key, tensor in results[0][2].items():
        torch.testing.assert_close(tensor, results[1][2][key], atol=1e-6, rtol=1e-4)


def mean_of_all(outputs, labels, num_items_in_batch):
    return torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("loss_function", [None, mean_of_all])
def test_batches_of_different_sizes_give_the_mean_over_their_examples(loss_function, tmp_path):
    """Ten examples as 4, 4 and 2, accumulated: the gradients of one batch of ten, not of the mean of three means."""
    gradients = []
    for name, options in (
        ("whole", {"per_device_train_batch_size": 10}),
        ("parts", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}),
    ):
        model = tiny_classifier("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        torch.manual_seed(1)
        inject_lora(model, LoRAConfig(rank=4))
        randomize(model)
        run = LoRATrainer(
            model=model,
            args=arguments(tmp_path / name, max_steps=1, max_grad_norm=0.0, **options),
            train_dataset=dataset(10),
            compute_loss_func=loss_function,
        )
        found = []
        run.create_optimizer().register_step_pre_hook(
            lambda optimizer, *_, found=found, model=model: found.extend(
                p.grad.clone() for p in model.parameters() if p.requires_grad
            )
        )
        run.train()
        gradients.append(found)
    assert len(gradients[0]) == len(gradients[1]) > 0
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-5)


def test_checkpoints_hold_the_adapter_and_no_base_weight(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=3)
    run.train()
    checkpoint = tmp_path / "checkpoint-3"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "hf_lora.json", "trainer_state.json"} <= names
    assert not names & {"model.safetensors", "pytorch_model.bin", "config.json", "training_args.bin"}
    assert set(read_adapter(checkpoint).tensors) == set(adapter_tensors(run.model))


def test_a_resumed_run_ends_exactly_like_an_undisturbed_one(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same_tensors(adapter_tensors(resumed.model), adapter_tensors(whole.model))
    rates = [entry["learning_rate"] for entry in whole.state.log_history if "learning_rate" in entry]
    assert [e["learning_rate"] for e in resumed.state.log_history if "learning_rate" in e] == rates
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 6


def test_resuming_with_another_alpha_is_refused(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=3).train()
    with pytest.raises(
        ValueError, match=r"another scaling .* got 4; expected 8; resume with the rank and alpha"
    ):
        trainer(tmp_path, injected(alpha=32.0)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_resuming_with_another_rank_is_refused(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=3).train()
    with pytest.raises(ValueError, match="does not fit the model"):
        trainer(tmp_path, injected(rank=2, alpha=8.0)).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-3")
        )


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    scores = iter([0.1, 0.9, 0.5])
    run = LoRATrainer(
        model=injected(),
        args=arguments(
            tmp_path,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=True,
        ),
        train_dataset=dataset(),
        eval_dataset=dataset(),
        compute_metrics=lambda _: {"score": next(scores)},
    )
    run.train()
    assert Path(run.state.best_model_checkpoint).name == "checkpoint-4"
    best = read_adapter(tmp_path / "checkpoint-4").tensors
    last = read_adapter(tmp_path / "checkpoint-6").tensors
    assert_same_tensors(adapter_tensors(run.model), dict(best))
    assert any(not torch.equal(best[key], last[key]) for key in best)


def test_early_stopping_stops(tmp_path):
    run = LoRATrainer(
        model=injected(),
        args=arguments(
            tmp_path,
            max_steps=20,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=True,
        ),
        train_dataset=dataset(),
        eval_dataset=dataset(),
        compute_metrics=lambda _: {"score": 0.5},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    run.train()
    assert run.state.global_step == 6


def test_head_rate_and_lora_plus_give_each_parameter_its_rate(tmp_path):
    run = trainer(tmp_path, head_learning_rate=5e-4, lora_plus_ratio=16.0, weight_decay=0.1)
    rates = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in run.create_optimizer().param_groups
        for parameter in group["params"]
    }
    for name, parameter in lora_parameters(run.model).items():
        assert rates[id(parameter)] == (pytest.approx(16 * 1e-2 if name.endswith("lora_B") else 1e-2), 0.1)
    head = head_parameters(run.model)
    assert rates[id(head["classifier.weight"])] == (5e-4, 0.1)
    assert rates[id(head["classifier.bias"])] == (5e-4, 0.0)
    assert len(rates) == len(lora_parameters(run.model)) + len(head)


@pytest.mark.parametrize("name", ["head_learning_rate", "lora_plus_ratio"])
def test_unusable_rates_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} is not usable; got -1"):
        arguments(tmp_path, **{name: -1.0})


def test_plain_training_arguments_are_enough(tmp_path):
    run = LoRATrainer(model=injected(), args=arguments(tmp_path, TrainingArguments), train_dataset=dataset())
    assert run.train().global_step == 6


@pytest.mark.parametrize("weights", [None, "1,2,0.5"])
def test_the_loss_is_weighted_by_example_and_smoothed_in_training_alone(weights, tmp_path):
    run = trainer(tmp_path, class_weights=weights, label_smoothing_factor=0.1)
    for module in run.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = tiny_batch()
    logits = run.model.eval()(batch["input_ids"], batch["attention_mask"]).logits
    for training, smoothing in ((True, 0.1), (False, 0.0)):
        losses = torch.nn.functional.cross_entropy(
            logits, batch["labels"], label_smoothing=smoothing, reduction="none"
        )
        importance = torch.tensor([1.0, 2.0, 0.5] if weights else [1.0] * 3)[batch["labels"]]
        # Over the examples, not over their weights: a rare example must not rule the batch that it is in.
        expected = (importance * losses).mean()
        torch.testing.assert_close(run.compute_loss(run.model.train(training), dict(batch)), expected)


@pytest.mark.parametrize("weights", ["1,2", "1,2,x", "1,2,-3", "0,0,0", "equal"])
def test_unusable_class_weights_are_refused(weights, tmp_path):
    with pytest.raises(ValueError, match="class_weights is not usable"):
        trainer(tmp_path, class_weights=weights)


OTHER_LABELS = {
    "regression": [float(row % 5) for row in range(24)],
    "multi_label_classification": [[1.0, 0.0, float(row % 2)] for row in range(24)],
}


@pytest.mark.parametrize(("problem_type", "labels"), OTHER_LABELS.items())
def test_other_problem_types_train_and_save(problem_type, labels, tmp_path):
    model = tiny_classifier(
        "bert", num_labels=1 if problem_type == "regression" else 3, problem_type=problem_type
    )
    inject_lora(model, LoRAConfig(rank=4))
    run = trainer(tmp_path, model, dataset(labels=labels))
    run.train()
    run.save_model()
    assert json.loads((tmp_path / "hf_lora.json").read_text())["problem_type"] == problem_type
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_a_model_without_lora_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no LoRA layers; .* call inject_lora"):
        LoRATrainer(model=tiny_classifier("bert"), args=arguments(tmp_path), train_dataset=dataset())


def test_a_merged_or_disabled_adapter_is_not_trained(tmp_path):
    """The update in a merged weight gets no gradient: the head alone would be trained, without a word."""
    model = injected()
    merge_lora(model)
    with pytest.raises(
        ValueError, match=r"^cannot train a merged .* got 8 such layers, .* unmerge_lora first"
    ):
        trainer(tmp_path, model)
    unmerge_lora(model)
    run = trainer(tmp_path, model)
    merge_lora(model)
    with pytest.raises(ValueError, match="cannot train a merged"):
        run.train()
    unmerge_lora(model)
    with lora_disabled(model), pytest.raises(ValueError, match="outside lora_disabled"):
        run.train()
    run.train()


def test_a_saved_model_has_a_card_and_no_pickle(tmp_path):
    model = injected()
    randomize(model)
    trainer(tmp_path / "out", model).save_model()
    assert "LoRA" in (tmp_path / "out" / "README.md").read_text()
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02"), path


def ragged(size=50, num_labels=3):
    """Examples of 3 to 20 tokens; the second token is a number that no other example has."""
    generator = torch.Generator().manual_seed(4)
    rows = [[2, 5 + row, *([9] * int(torch.randint(1, 19, (), generator=generator)))] for row in range(size)]
    return Dataset.from_dict({"input_ids": rows, "labels": [row % num_labels for row in range(size)]})


class Recorder(LoRATrainer):
    """Keeps the numbers of the examples of every training batch, and the batches' shapes."""

    def __init__(self, *args, **kwargs):
        self.seen, self.shapes = [], []
        super().__init__(*args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen.append((inputs["input_ids"][:, 1] - 5).tolist())
        self.shapes.append(tuple(inputs["input_ids"].shape))
        return super().training_step(model, inputs, *args, **kwargs)


def recorder(directory, train=None, **options):
    return Recorder(
        model=injected(),
        args=arguments(directory, **{"max_steps": -1, "num_train_epochs": 3, **options}),
        train_dataset=ragged() if train is None else train,
        processing_class=tiny_tokenizer(),
    )


BY_LENGTH = {
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "budget": {"max_tokens_per_batch": 64},
}


@pytest.mark.parametrize("options", BY_LENGTH.values(), ids=BY_LENGTH)
def test_every_epoch_has_every_example_once_in_other_batches(options, tmp_path):
    run = recorder(tmp_path, **options)
    run.train()
    steps = run.state.max_steps // 3
    assert run.state.global_step == len(run.seen) == 3 * steps
    epochs = [run.seen[start : start + steps] for start in range(0, 3 * steps, steps)]
    for epoch in epochs:
        assert sorted(number for batch in epoch for number in batch) == list(range(50))
    assert not {frozenset(batch) for batch in epochs[0]} & {frozenset(batch) for batch in epochs[1]}


def test_grouped_batches_have_the_size_of_the_arguments(tmp_path):
    run = recorder(tmp_path, **BY_LENGTH["group_by_length"], num_train_epochs=1)
    run.train()
    assert sorted(len(batch) for batch in run.seen) == [2] + [4] * 12


def test_no_batch_is_above_the_budget_and_the_longest_comes_first(tmp_path):
    run = recorder(tmp_path, **BY_LENGTH["budget"], num_train_epochs=1)
    run.train()
    assert all(rows * longest <= 64 for rows, longest in run.shapes)
    assert run.shapes[0][1] == max(longest for _, longest in run.shapes)
    # Less than a quarter of the budget is left over.
    assert sum(rows * longest for rows, longest in run.shapes) > 0.75 * 64 * len(run.shapes)


@pytest.mark.slow
@pytest.mark.parametrize("options", BY_LENGTH.values(), ids=BY_LENGTH)
def test_an_interrupted_run_by_length_ends_exactly_like_an_undisturbed_one(options, tmp_path):
    """Resumed in the middle of the second epoch, from where it goes on to the third."""
    interrupted = len(recorder(tmp_path, **options).get_train_dataloader()) + 3
    options = {**options, "save_strategy": "steps", "save_steps": interrupted}
    whole = recorder(tmp_path, **options)
    whole.train()
    resumed = recorder(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{interrupted}"))
    assert resumed.seen == whole.seen[interrupted:]
    assert_same_tensors(adapter_tensors(resumed.model), adapter_tensors(whole.model))


@pytest.mark.parametrize("options", BY_LENGTH.values(), ids=BY_LENGTH)
def test_gradients_accumulate_over_batches_by_length(options, tmp_path):
    run = recorder(tmp_path, **options, gradient_accumulation_steps=3, num_train_epochs=2)
    run.train()
    batches = len(run.seen) // 2
    assert run.state.global_step == 2 * -(-batches // 3)
    assert sorted(number for batch in run.seen[:batches] for number in batch) == list(range(50))


@pytest.mark.parametrize(
    ("strategy", "sampler"), [("random", RandomSampler), ("sequential", SequentialSampler)]
)
def test_other_strategies_are_transformers_own(strategy, sampler, tmp_path):
    run = recorder(tmp_path, train_sampling_strategy=strategy)
    assert type(run.get_train_dataloader().batch_sampler.sampler) in (sampler, SeedableRandomSampler)
    assert type(run.get_eval_dataloader(ragged()).batch_sampler.sampler) is SequentialSampler


@pytest.mark.parametrize("budget", [0, -5, 2.5])
def test_an_unusable_budget_is_refused(budget, tmp_path):
    with pytest.raises(ValueError, match=f"max_tokens_per_batch is not usable; got {budget}; expected"):
        arguments(tmp_path, max_tokens_per_batch=budget)


@pytest.mark.parametrize(
    "option", [{"train_sampling_strategy": "sequential"}, {"auto_find_batch_size": True}]
)
def test_a_budget_and_what_contradicts_it_are_refused(option, tmp_path):
    with pytest.raises(ValueError, match=f"max_tokens_per_batch .*{next(iter(option))}.*; expected .*one"):
        arguments(tmp_path, max_tokens_per_batch=64, **option)


def test_a_budget_below_the_longest_example_is_refused_before_training(tmp_path):
    longest = max(map(len, ragged()["input_ids"]))
    with pytest.raises(
        ValueError, match=f"max_tokens_per_batch is too small; got 8; expected at least {longest}"
    ):
        recorder(tmp_path, max_tokens_per_batch=8).train()


def test_a_budget_needs_lengths_and_grouping_does_without(tmp_path):
    data = ragged().to_iterable_dataset()
    with pytest.raises(ValueError, match=r"needs the lengths of all .*; got IterableDataset; expected"):
        recorder(tmp_path, data, max_tokens_per_batch=64, max_steps=2).train()
    run = recorder(tmp_path, data, train_sampling_strategy="group_by_length", max_steps=2)
    run.train()
    assert run.seen == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.slow
@pytest.mark.parametrize("options", BY_LENGTH.values(), ids=BY_LENGTH)
@pytest.mark.parametrize("drop_last", [False, True])
def test_predictions_by_length_are_those_of_the_data_sets_order(drop_last, options, tmp_path):
    """50 examples in batches of 16: the last has two, which `drop_last` leaves out of training alone."""
    model = injected()
    randomize(model)
    data = ragged()
    results = []
    for chosen in ({}, options):
        seen = []
        run = LoRATrainer(
            model=model,
            args=arguments(tmp_path, per_device_eval_batch_size=16, dataloader_drop_last=drop_last, **chosen),
            eval_dataset=data,
            processing_class=tiny_tokenizer(),
            compute_metrics=lambda prediction, seen=seen: seen.append(prediction) or {},
        )
        output = run.predict(data)
        assert run.evaluate()["eval_loss"] > 0
        for prediction in seen:
            np.testing.assert_array_equal(prediction.predictions, output.predictions)
            np.testing.assert_array_equal(prediction.label_ids, output.label_ids)
        results.append(output)
    plain, sorted_ = results
    assert len(np.unique(plain.predictions[:, 0])) > 40
    np.testing.assert_allclose(sorted_.predictions, plain.predictions, atol=1e-5)
    np.testing.assert_array_equal(sorted_.label_ids, np.array(data["labels"]))
    assert sorted_.metrics["test_loss"] == pytest.approx(plain.metrics["test_loss"], rel=1e-4)


def test_evaluation_by_length_reads_the_longest_first(tmp_path):
    run = recorder(tmp_path, train_sampling_strategy="group_by_length", per_device_eval_batch_size=16)
    widths = [batch["input_ids"].shape[1] for batch in run.get_eval_dataloader(ragged())]
    assert widths == sorted(widths, reverse=True) and widths[0] == 20 > widths[-1]


@pytest.mark.parametrize("option", ["batch_eval_metrics", "eval_do_concat_batches"])
def test_evaluation_by_batches_keeps_the_order_of_the_data_set(option, tmp_path):
    options = {option: option == "batch_eval_metrics"}
    run = recorder(tmp_path, train_sampling_strategy="group_by_length", **options)
    numbers = [
        n for batch in run.get_eval_dataloader(ragged()) for n in (batch["input_ids"][:, 1] - 5).tolist()
    ]
    assert numbers == list(range(50))


def test_the_users_own_collator_is_kept(tmp_path):
    assert type(recorder(tmp_path).data_collator) is QuickPadding
    own = DataCollatorWithPadding(tiny_tokenizer())
    run = LoRATrainer(model=injected(), args=arguments(tmp_path), data_collator=own, train_dataset=ragged())
    assert run.data_collator is own


def test_a_search_over_hyperparameters_makes_and_trains_a_model_for_each_trial(tmp_path, monkeypatch):
    """A stand-in for a library that searches: trials one after the other, each released before the next is made."""
    seen = []

    def search(run, n_trials, direction, **_):
        for number in range(n_trials):
            run.train(trial=SimpleNamespace(number=number, params={"learning_rate": 10.0**-number}))
            seen.append((run.args.learning_rate, run.model, adapter_tensors(run.model)))
            run.model_wrapped = run.model = None
            run.accelerator.clear()
        return BestRun("0", 0.0, {})

    backend = SimpleNamespace(ensure_available=lambda: None, default_hp_space=lambda t: t.params, run=search)
    monkeypatch.setitem(
        trainer_module.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, lambda: backend
    )
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    run = LoRATrainer(
        model_init=lambda: injected(),
        args=arguments(tmp_path, max_steps=2),
        train_dataset=dataset(),
        eval_dataset=dataset(),
    )
    run.hyperparameter_search(backend="optuna", n_trials=3)
    assert [rate for rate, *_ in seen] == [1.0, 0.1, 0.01]
    assert len({id(model) for _, model, _ in seen}) == 3
    # Each is what a trainer of its own makes with that rate.
    for rate, _, tensors in seen:
        args = arguments(tmp_path, max_steps=2, learning_rate=rate)
        alone = LoRATrainer(model_init=lambda: injected(), args=args, train_dataset=dataset())
        alone.train()
        assert_same_tensors(tensors, adapter_tensors(alone.model))


@pytest.mark.slow
def test_optuna_searches(tmp_path):
    pytest.importorskip("optuna")
    run = LoRATrainer(
        model_init=lambda trial: injected(rank=trial.suggest_int("rank", 1, 4) if trial else 2),
        args=arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1),
        train_dataset=dataset(),
        eval_dataset=dataset(),
    )
    space = lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)}  # noqa: E731
    best = run.hyperparameter_search(backend="optuna", n_trials=3, hp_space=space, direction="minimize")
    assert set(best.hyperparameters) == {"rank", "learning_rate"} and best.objective > 0
