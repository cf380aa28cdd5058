"""Every argument of transformers' Trainer: it works, is refused by its name at the start, or means nothing here."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig
from conftest import tiny_tokenizer
from datasets import Dataset
from helpers_recipe import command, recipe_of
from helpers_training import arguments, dataset, injected, trainer
from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.training_args import OptimizerNames, SchedulerType

from hf_lora import LoRATrainer, LoRATrainingArguments, finetune
from hf_lora.adapters.peft_format import adapter_tensors
from hf_lora.recipe import finetune as finetune_module
from hf_lora.training.options import LoRATrainingOptions

_BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}

# An unusual value of each argument that works, in groups that train together.
WORKS: tuple[dict[str, Any], ...] = (
    {
        "output_dir": "another",
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 5,
        "max_steps": 3,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": '{"num_decay_steps": 1}',
        "warmup_steps": 0.5,
        "weight_decay": 0.1,
        "adam_beta1": 0.8,
        "adam_beta2": 0.99,
        "adam_epsilon": 1e-6,
        "gradient_accumulation_steps": 2,
        "average_tokens_across_devices": False,
        "max_grad_norm": 0.5,
        "label_smoothing_factor": 0.2,
        "bf16": True,
        "tf32": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 7,
        "data_seed": 8,
    },
    {
        "num_train_epochs": 0.5,
        "optim": "rmsprop",
        "optim_args": "alpha=0.9",
        "fp16": True,
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "neftune_noise_alpha": 5.0,
        "torch_empty_cache_steps": 1,
        "include_num_input_tokens_seen": "non_padding",
        "logging_strategy": "steps",
        "logging_steps": 2,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "log_level": "error",
        "log_level_replica": "error",
        "report_to": ["tensorboard"],
        "run_name": "a run",
        "skip_memory_metrics": False,
    },
    {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        **_BEST,
        "eval_delay": 1,
        "eval_on_start": True,
        "eval_use_gather_object": True,
        "eval_accumulation_steps": 1,
        "include_for_metrics": ["inputs", "loss"],
        "save_only_model": True,
        "save_on_each_node": True,
        "save_total_limit": 1,
        "enable_jit_checkpoint": True,
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "greater_is_better": True,
        "full_determinism": True,
        "auto_find_batch_size": True,
    },
    {
        "torch_compile": True,
        "torch_compile_backend": "eager",
        "accelerator_config": {"split_batches": True},
        "dataloader_drop_last": True,
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 3,
        "dataloader_multiprocessing_context": "fork",
        "dataloader_in_order": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "train_sampling_strategy": "sequential",
        "head_learning_rate": 1e-3,
        "lora_plus_ratio": 4.0,
        "class_weights": "balanced",
    },
    {"max_tokens_per_batch": 48, "cache_frozen_prefix": "memory", "frozen_prefix_cache_gb": 0.5},
    {"train_sampling_strategy": "group_by_length", "prediction_loss_only": True, **_BEST},
    {"train_sampling_strategy": "batch_rebalance"},
    {"eval_do_concat_batches": False, **_BEST},
    {"batch_eval_metrics": True, **_BEST},
)
# With which value an argument is refused, and what is said. `only`: by a run that is measured, as `finetune` does.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "optim_target_modules": ({"optim_target_modules": "all-linear"}, "full weights"),
    "bf16_full_eval": ({"bf16_full_eval": True}, "for good"),
    "fp16_full_eval": ({"fp16_full_eval": True}, "for good"),
    "use_liger_kernel": ({"use_liger_kernel": True}, "not installed"),
    "torch_compile_mode": ({"torch_compile_mode": "fast"}, "torch_compile_mode"),
    "parallelism_config": ({"parallelism_config": ParallelismConfig()}, "DDP"),
    "fsdp": ({"fsdp": "full_shard"}, "several processes"),
    "deepspeed": ({"deepspeed": "missing.json"}, "not installed"),
    "debug": ({"debug": "underflow_overflow"}, "masks"),
    "push_to_hub": ({"push_to_hub": True}, "access token"),
}
# More values that are refused, each by the name of its argument.
ALSO_REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("max_steps", {"max_steps": "3"}, "got '3'"),
    ("num_train_epochs", {"num_train_epochs": "2"}, "got '2'"),
    ("num_train_epochs", {"num_train_epochs": float("nan")}, "got nan"),
    ("learning_rate", {"learning_rate": "1e-3"}, "got '1e-3'"),
    ("learning_rate", {"learning_rate": -1.0}, "got -1.0"),
    ("eval_steps", {"eval_steps": "3"}, "got '3'"),
    ("seed", {"seed": "a"}, "got 'a'"),
    ("seed", {"seed": -1}, "got -1"),
    ("bf16", {"bf16": "yes"}, "got 'yes'"),
    ("per_device_train_batch_size", {"per_device_train_batch_size": 0}, "got 0"),
    ("per_device_eval_batch_size", {"per_device_eval_batch_size": -1}, "got -1"),
    ("gradient_accumulation_steps", {"gradient_accumulation_steps": 0}, "got 0"),
    ("gradient_accumulation_steps", {"gradient_accumulation_steps": 1.5}, "got 1.5"),
    ("eval_accumulation_steps", {"eval_accumulation_steps": 0}, "got 0"),
    ("label_smoothing_factor", {"label_smoothing_factor": 1.5}, "got 1.5"),
    ("beta", {"adam_beta1": 2.0}, "optim='adamw_torch"),
    ("weight_decay", {"weight_decay": -1.0}, "got -1.0"),
    ("optim_args", {"optim_args": "alpha=1"}, "takes none"),
    ("optim", {"optim": "fastest"}, "adamw_torch"),
    ("optim", {"optim": "galore_adamw"}, "full weights"),
    ("optim", {"optim": "lomo"}, "full weights"),
    ("bitsandbytes", {"optim": "adamw_bnb_8bit"}, "optim='adamw_bnb_8bit'"),
    ("warmup_stable_decay", {"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps.*"),
    ("cosine_with_min_lr", {"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
    ("lr_scheduler_kwargs", {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}, "cycles"),
    ("lr_scheduler_kwargs", {"lr_scheduler_kwargs": "{bad"}, "JSON"),
    ("reduce_lr_on_plateau", {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "no"}, "eval"),
    ("log_level", {"log_level": "loud"}, "debug, info"),
    ("include_num_input_tokens_seen", {"include_num_input_tokens_seen": "some"}, "non_padding"),
    ("include_for_metrics", {"include_for_metrics": ["texts"]}, "inputs, loss"),
    ("report_to", {"report_to": ["fax"]}, "expected one whose package is installed"),
    ("report_to", {"report_to": "wandb"}, "expected one whose package is installed: .*tensorboard"),
    ("label_names", {"label_names": ["sentiment"]}, "labels"),
    ("train_sampling_strategy", {"train_sampling_strategy": "shuffled"}, "random, group_by_length"),
    ("persistent_workers", {"dataloader_persistent_workers": True}, "num_workers"),
    ("multiprocessing_context", {"dataloader_multiprocessing_context": "spawn"}, "num_workers"),
    ("prefetch_factor", {"dataloader_prefetch_factor": 2}, "num_workers"),
    ("foo", {"accelerator_config": {"foo": 1}}, "AcceleratorConfig"),
    ("debug", {"debug": "everything"}, "underflow_overflow"),
    ("debug", {"debug": "tpu_metrics_debug"}, "TPU"),
    ("torch_compile_backend", {"torch_compile_backend": "gcc"}, "inductor"),
    ("neftune_noise_alpha", {"neftune_noise_alpha": -1.0}, "got -1.0"),
    (
        "neftune_noise_alpha",
        {"neftune_noise_alpha": 1.0, "cache_frozen_prefix": "auto"},
        "cache_frozen_prefix",
    ),
    ("torch_empty_cache_steps", {"torch_empty_cache_steps": 0}, "0"),
    (
        "load_best_model_at_end",
        {"load_best_model_at_end": True, "eval_strategy": "no"},
        "match|eval_strategy",
    ),
    (
        "load_best_model_at_end",
        {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"},
        "eval_strategy epoch or steps",
    ),
    (
        "load_best_model_at_end",
        {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "steps"},
        "match",
    ),
    (
        "save_strategy",
        {"save_strategy": "best", "eval_strategy": "no", "metric_for_best_model": "loss"},
        "eval",
    ),
)
# By a run that is measured alone.
REFUSED_IF_MEASURED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("metric_for_best_model", {"metric_for_best_model": "f1"}, "one of loss, .*accuracy, f1_macro.*rmse"),
    ("metric_for_best_model", {"metric_for_best_model": "eval_f2"}, "one of loss, .*accuracy, f1_macro"),
    ("prediction_loss_only", {"prediction_loss_only": True}, "expected False"),
    ("batch_eval_metrics", {"batch_eval_metrics": True}, "expected False"),
    ("eval_do_concat_batches", {"eval_do_concat_batches": False}, "expected True"),
    ("early_stopping_patience", {"early_stopping_patience": 1, "eval_strategy": "no"}, "eval_strategy epoch"),
    ("early_stopping_patience", {"early_stopping_patience": 0}, "got 0"),
    ("save", {"early_stopping_patience": 1, "save_strategy": "no"}, "match"),
)
# Of one process on a CPU, of a tracker or a Hub that is not used, of a script: they change nothing here.
NO_MEANING = {
    *(
        "do_train",
        "do_eval",
        "do_predict",
        "local_rank",
        "use_cache",
        "length_column_name",
        "log_on_each_node",
    ),
    *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "liger_kernel_config"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
    *("ddp_backend", "ddp_timeout", "fsdp_config"),
}
# tests/adapters/test_push.py and tests/integration/test_hub.py; tests of resuming; the reference of the options.
ELSEWHERE = {
    *("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
    *("ignore_data_skip", "restore_callback_states_from_checkpoint", "resume_from_checkpoint"),
}


def test_the_table_has_every_argument() -> None:
    names = {entry.name for entry in fields(TrainingArguments)}
    known = {name for group in WORKS for name in group} | REFUSED.keys() | NO_MEANING | ELSEWHERE
    assert names - known == set(), "say in this table what becomes of them"
    # What a later option of ours has its own tests.
    assert known - names <= {entry.name for entry in fields(LoRATrainingOptions)}


class Scores:
    """The share of right answers, also batch by batch."""

    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        return {"score": 0.5}


def data_for(options: dict[str, Any]) -> Dataset:
    """Rows of different lengths, where batches are by length."""
    rows = dataset()
    return (
        rows
        if "max_tokens_per_batch" not in options
        else rows.map(
            lambda row, number: {
                name: value[: 5 + number % 6] for name, value in row.items() if name != "labels"
            },
            with_indices=True,
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("group", WORKS, ids=lambda group: next(iter(group)))
def test_what_works_trains_saves_and_is_evaluated(group: dict[str, Any], tmp_path: Path) -> None:
    options = {"max_steps": -1 if "num_train_epochs" in group else 2, **group}
    folder = tmp_path / str(options.pop("output_dir", "run"))
    data = data_for(options)
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        run = LoRATrainer(
            model=injected(layers=(-1,) if "cache_frozen_prefix" in group else None),
            args=arguments(folder, **options),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tiny_tokenizer(),
            compute_metrics=Scores(),
        )
        before = {name: value.clone() for name, value in adapter_tensors(run.model).items()}
        run.train()
        assert run.evaluate()["eval_loss"] > 0
        run.save_model()
    finally:
        torch.use_deterministic_algorithms(deterministic)
    after = adapter_tensors(run.model)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[name], value) for name, value in after.items())
    assert (folder / "adapter_model.safetensors").is_file()


def refused(name: str, options: dict[str, Any], said: str, make: Any) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        make(options)
    message = str(raised.value)
    assert name in message and "\n" not in message


ALL_REFUSED = (*((name, *row) for name, row in REFUSED.items() if name != "push_to_hub"), *ALSO_REFUSED)


@pytest.mark.parametrize(("name", "options", "said"), ALL_REFUSED)
@pytest.mark.parametrize("kind", [LoRATrainingArguments, TrainingArguments])
def test_what_cannot_be_is_refused_before_the_trainer_is_made(
    name: str, options: dict[str, Any], said: str, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.Trainer.__init__", lambda *_, **__: pytest.fail("the trainer was made"))
    made: list[Any] = []
    if kind is TrainingArguments:
        if name == "deepspeed":
            pytest.skip("transformers itself, and leaves half of its configuration behind")
        try:
            made.append(arguments(tmp_path, kind, **{"save_strategy": "steps", **options}))
        except Exception as error:
            pytest.skip(f"transformers itself: {error}")

    def make(_: Any) -> None:
        args = made[0] if made else arguments(tmp_path, **{"save_strategy": "steps", **options})
        LoRATrainer(model=injected(), args=args, train_dataset=dataset())

    refused(name, options, said, make)


@pytest.mark.parametrize(("name", "options", "said"), [*ALL_REFUSED, *REFUSED_IF_MEASURED])
def test_finetune_refuses_before_anything_is_loaded(
    name: str, options: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in ("load_tokenizer", "prepare_data", "load_classifier"):
        monkeypatch.setattr(finetune_module, stage, lambda *_, **__: pytest.fail("something was loaded"))
    settings = {"use_cpu": True, "output_dir": str(tmp_path / "out"), **options}
    refused(name, options, said, lambda _: finetune("a/base", str(tmp_path / "no.csv"), **settings))


def test_a_push_needs_a_token_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_lora.training.arguments.get_token", lambda: None)
    argv = command(Path("base"), tmp_path / "out", "--train_file", "no.csv", "--push_to_hub", "True")
    with pytest.raises(ValueError, match="push_to_hub is not usable; got True; expected an access token"):
        recipe_of(argv)
    assert recipe_of([*argv, "--hub_token", "hf_x"]).args.push_to_hub


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = command(Path("base"), tmp_path / "out", "--train_file", "no.csv", "--report_to", "tensorboard")
    assert recipe_of(argv).args.report_to == ["tensorboard"]
    monkeypatch.setattr("hf_lora.training.arguments.get_available_reporting_integrations", lambda: [])
    with pytest.raises(ValueError, match=r"report_to is not usable; got 'tensorboard'; .*installed: none is"):
        recipe_of(argv)


@pytest.mark.parametrize("value", [None, "none", []])
def test_no_tracker_has_three_spellings(value: Any, tmp_path: Path) -> None:
    assert LoRATrainingArguments(str(tmp_path), report_to=value).report_to == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [each.value for each in OptimizerNames])
def test_an_optimizer_trains_and_resumes_or_is_refused_at_the_start(name: str, tmp_path: Path) -> None:
    options = {"optim": name, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    try:
        run = trainer(tmp_path, **options)
    except ValueError as error:
        assert "optim" in str(error) and "\n" not in str(error)
        return
    run.train()
    again = trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for key, value in adapter_tensors(run.model).items():
        torch.testing.assert_close(adapter_tensors(again.model)[key], value)


@pytest.mark.slow
@pytest.mark.parametrize("name", [each.value for each in SchedulerType])
def test_a_schedule_trains_or_is_refused_at_the_start(name: str, tmp_path: Path) -> None:
    needed = {"warmup_stable_decay": {"num_decay_steps": 1}}
    needed |= {each: {"min_lr": 1e-5} for each in ("cosine_with_min_lr", "cosine_warmup_with_min_lr")}
    options = {"lr_scheduler_type": name, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    if name in needed:
        with pytest.raises(ValueError, match=f"lr_scheduler_type='{name}' cannot be made; .*kwargs"):
            trainer(tmp_path, **options)
    run = trainer(tmp_path, lr_scheduler_kwargs=json.dumps(needed.get(name, {})), **options)
    assert run.train().global_step == 2


def test_a_metric_that_no_evaluation_gives_is_one_line(tmp_path: Path) -> None:
    options = {"metric_for_best_model": "f1", "load_best_model_at_end": True, **_BEST}
    with pytest.raises(
        ValueError, match="metric_for_best_model is not usable; got 'f1'; expected one of loss"
    ):
        trainer(tmp_path, **options)
    run = LoRATrainer(
        model=injected(),
        args=arguments(tmp_path, **options),
        train_dataset=dataset(),
        eval_dataset=dataset(),
        compute_metrics=Scores(),
    )
    with pytest.raises(ValueError, match=r"got 'f1'; expected one of loss, .*score"):
        run.train()


@pytest.mark.parametrize(
    "options", [{}, {"eval_strategy": "steps", "eval_steps": 1}], ids=["no evaluations", "no metric"]
)
def test_early_stopping_that_waits_for_nothing_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="early stopping needs evaluations; got eval_strategy="):
        LoRATrainer(
            model=injected(),
            args=arguments(tmp_path, **options),
            train_dataset=dataset(),
            eval_dataset=dataset(),
            callbacks=[EarlyStoppingCallback(1)],
        )


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_dropping_the_only_batch_is_refused(strategy: str, tmp_path: Path) -> None:
    options = {"dataloader_drop_last": True, "per_device_train_batch_size": 32}
    run = trainer(tmp_path, train_sampling_strategy=strategy, **options)
    with pytest.raises(ValueError, match=r"no batch is left; got 24 examples, .*dataloader_drop_last"):
        run.train()
