"""A run goes on from its own checkpoint alone: what is another is named, and may be meant."""

import json
import logging
from dataclasses import fields

import datasets
import numpy as np
import pytest
import torch
from helpers_training import arguments, assert_same_tensors, dataset, injected, trainer

from hf_lora import LoRATrainingArguments
from hf_lora.adapters.peft_format import adapter_tensors
from hf_lora.training import resuming
from hf_lora.training.checkpoints import CHECKSUMS
from hf_lora.training.resuming import ALLOWED, FILE, SETTINGS, digests, parse_allowed

STEPS = {"save_strategy": "steps", "save_steps": 2}
# The arguments of transformers and ours that do not decide what is trained, by the beginning of their names.
WITHOUT_EFFECT = (
    *(
        "output_dir",
        "per_device_eval",
        "eval_",
        "prediction_loss_only",
        "batch_eval",
        "include_",
        "do_",
        "logging_",
    ),
    *(
        "log_",
        "report_to",
        "run_name",
        "project",
        "trackio",
        "disable_tqdm",
        "save_",
        "load_best",
        "push_to",
        "hub_",
    ),
    *("resume_from", "restore_callback", "ignore_data_skip", "enable_jit", "full_determinism", "skip_memory"),
    *(
        "use_cpu",
        "tf32",
        "bf16_full_eval",
        "fp16_full_eval",
        "activation_",
        "gradient_checkpointing",
        "torch_",
    ),
    *("use_liger", "liger_", "use_cache", "auto_find", "parallelism", "dataloader_num", "dataloader_p"),
    *("dataloader_multi", "dataloader_in", "remove_unused", "label_names", "length_column", "ddp_", "fsdp"),
    *("deepspeed", "debug", "local_rank", "cache_frozen", "frozen_prefix", "allow_changed"),
)


def relabelled(*labels):
    model = injected()
    model.config.id2label = dict(enumerate(labels))
    return model


def other_base():
    model = injected()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.mul_(1.5)
    return model


def with_rows(**changes):
    return datasets.Dataset.from_dict({**dataset().to_dict(), **changes})


IDS = dataset()["input_ids"][:]
CHANGES = [
    (lambda: {"learning_rate": 1e-3}, "got learning_rate=0.001 (it has 0.01); expected"),
    (lambda: {"seed": 3}, "got seed=3 (it has 0); expected"),
    (lambda: {"max_steps": 8}, "got max_steps=8 (it has 6); expected"),
    (lambda: {"max_steps": -1, "num_train_epochs": 2}, "max_steps=-1 (it has 6)"),
    (lambda: {"per_device_train_batch_size": 2}, "per_device_train_batch_size=2 (it has 4)"),
    (lambda: {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 (it has 1)"),
    (lambda: {"class_weights": "1,2,3"}, "class_weights='1,2,3' (it has None)"),
    (
        lambda: {"train": dataset(23)},
        "got data: 23 training rows (it has 24), 23 validation rows (it has 24)",
    ),
    (
        lambda: {"train": dataset().select(range(23, -1, -1))},
        "data: other attention_mask and input_ids and labels in",
    ),
    (
        lambda: {"train": with_rows(input_ids=[IDS[1], IDS[0], *IDS[2:]])},
        "data: other input_ids in the training rows",
    ),
    (
        lambda: {"model": relabelled("a", "b", "c")},
        "labels: ['a', 'b', 'c'] (it has ['LABEL_0', 'LABEL_1', 'LABEL_2'])",
    ),
    (lambda: {"model": other_base()}, "got base: weights with "),
]
FIXED = [
    (lambda: {"optim": "sgd"}, "optim cannot change within a run"),
    (lambda: {"lr_scheduler_type": "cosine"}, "lr_scheduler_type cannot change within a run"),
    (lambda: {"head_learning_rate": 1e-4}, "head_learning_rate cannot change within a run"),
    (lambda: {"model": injected(dropout=0.3)}, "lora_dropout cannot change within a run"),
    (lambda: {"model": injected(variant="lora_fa")}, "lora_variant cannot change within a run"),
    (lambda: {"model": relabelled("LABEL_1", "LABEL_0", "LABEL_2")}, "labels cannot change within a run"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run of six steps, and its adapter."""
    directory = tmp_path_factory.mktemp("run")
    first = trainer(directory, **STEPS)
    first.train()
    return directory, adapter_tensors(first.model)


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_what_is_another_is_named_in_one_line_and_may_be_meant(change, words, run, tmp_path, caplog):
    again = trainer(tmp_path, **{**STEPS, **change()})
    checkpoint = str(run[0] / "checkpoint-4")
    with pytest.raises(ValueError) as refused:
        again.train(resume_from_checkpoint=checkpoint)
    message = str(refused.value)
    assert words in message and "checkpoint-4' is of another run; got " in message and "\n" not in message
    # The line gives the words that let it pass.
    allowed = message.rpartition("--allow_changed ")[2]
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=checkpoint, allow_changed=allowed)
    assert "going on from checkpoint-4 with " in caplog.text
    assert again.state.global_step == again.state.max_steps


@pytest.mark.parametrize(("change", "words"), FIXED)
def test_what_cannot_change_between_two_steps_is_never_allowed(change, words, run, tmp_path):
    again = trainer(tmp_path, **{**STEPS, "allow_changed": ",".join(ALLOWED), **change()})
    with pytest.raises(ValueError, match=words) as refused:
        again.train(resume_from_checkpoint=str(run[0] / "checkpoint-4"))
    assert "--allow_changed" not in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {
            "logging_steps": 3,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_total_limit": 1,
            "report_to": "none",
        },
    ],
)
def test_what_decides_nothing_may_differ(change, run, tmp_path, caplog):
    again = trainer(tmp_path, **{**STEPS, **change})
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=str(run[0] / "checkpoint-4"))
    assert "hf_lora" not in caplog.text
    assert_same_tensors(adapter_tensors(again.model), run[1])


def test_a_changed_rate_and_decay_act_and_the_schedule_goes_on(run, tmp_path):
    changed = {"learning_rate": 5e-3, "weight_decay": 0.1, "allow_changed": "learning_rate, weight_decay"}
    again = trainer(tmp_path, **STEPS, **changed)
    again.train(resume_from_checkpoint=str(run[0] / "checkpoint-4"))
    # Linear from the start to zero after six steps: 2/6 and 1/6 of the rate are left at the last two.
    rates = [
        entry["learning_rate"]
        for entry in again.state.log_history
        if entry.get("step", 0) > 4 and "loss" in entry
    ]
    assert rates == pytest.approx([5e-3 * 2 / 6, 5e-3 * 1 / 6])
    assert {group["weight_decay"] for group in again.optimizer.param_groups} == {0.0, 0.1}


def test_a_checkpoint_of_an_earlier_version_is_used_with_one_warning(run, tmp_path, caplog):
    first = trainer(tmp_path, **STEPS)
    first.train()
    checkpoint = tmp_path / "checkpoint-4"
    listed = json.loads((checkpoint / CHECKSUMS).read_text())
    del listed["files"][FILE]
    (checkpoint / CHECKSUMS).write_text(json.dumps(listed))
    (checkpoint / FILE).unlink()
    again = trainer(tmp_path / "again", **STEPS, seed=0)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=str(checkpoint))
    assert caplog.text.count("does not say which data, base and settings") == 1
    assert_same_tensors(adapter_tensors(again.model), run[1])


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        ("learning_rates", "did you mean 'learning_rate'?"),
        (["data", "optim"], "got 'optim'; expected some of data, labels"),
    ],
)
def test_a_name_that_cannot_be_allowed_is_refused_at_once(names, hint, tmp_path):
    with pytest.raises(ValueError, match="allow_changed names what cannot be changed") as refused:
        arguments(tmp_path, allow_changed=names)
    assert hint in str(refused.value)
    assert parse_allowed("data, seed,") == parse_allowed(["data", "seed"]) == ("data", "seed")


def test_every_training_argument_is_compared_or_decides_nothing():
    names = {entry.name for entry in fields(LoRATrainingArguments)}
    assert set(SETTINGS) <= names
    both = [name for name in SETTINGS if name.startswith(WITHOUT_EFFECT)]
    neither = [name for name in names - set(SETTINGS) if not name.startswith(WITHOUT_EFFECT)]
    assert (both, neither) == ([], [])


COLUMNS = {
    "input_ids": [[1, 2], [3], [], [4, 5, 6]],
    "labels": [0, 1, 2, 1],
    "scores": [0.5, 1.5, float("nan"), 2.0],
    "text": ["a", "", None, "日"],
    "flags": [[True], [], [False, True], [None]],
    "targets": [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]],
}


def test_digests_do_not_depend_on_how_rows_are_stored(monkeypatch):
    monkeypatch.setattr(resuming, "_BATCH", 3)
    plain = datasets.Dataset.from_dict(COLUMNS)
    turned = plain.select([3, 2, 1, 0])
    forms = [
        datasets.concatenate_datasets([plain.select(range(1)), plain.select(range(1, 4))]),
        turned.select([3, 2, 1, 0]),
        plain.with_format("torch", columns=["labels"]),
        datasets.concatenate_datasets([plain, plain]).select(range(4, 8)).flatten_indices(),
    ]
    assert [digests(form) == digests(plain) for form in forms] == [True] * 4
    assert digests(plain)["rows"] == 4 and len(set(digests(plain)["columns"].values())) == len(COLUMNS)


@pytest.mark.parametrize("name", list(COLUMNS))
def test_a_digest_sees_a_value_its_place_and_the_end_of_a_row(name):
    plain = datasets.Dataset.from_dict(COLUMNS)
    values = COLUMNS[name]
    others = [values[:2] + values[:1] + values[3:], values[::-1]]
    if name == "input_ids":
        others.append([[1], [2, 3], [], [4, 5, 6]])
    for other in others:
        found = digests(datasets.Dataset.from_dict({**COLUMNS, name: other}, features=plain.features))
        differ = {
            column
            for column, digest in found["columns"].items()
            if digest != digests(plain)["columns"][column]
        }
        assert differ == {name}


def test_lists_are_digested_and_other_data_are_counted():
    rows = [{"input_ids": [1, 2], "labels": 0}, {"input_ids": torch.tensor([3]), "labels": np.int64(1)}]
    assert digests(rows) == digests([rows[0], {"input_ids": [3], "labels": 1}])
    assert digests(rows) != digests(rows[::-1])
    made = torch.utils.data.TensorDataset(torch.zeros(3, 2))
    assert digests(made) == {"rows": 3, "columns": {}}
    assert digests(iter(rows)) == {"rows": None, "columns": {}}
