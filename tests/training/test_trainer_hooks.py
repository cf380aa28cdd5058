"""The contract with the libraries below: a private part that a new version moves fails by its name."""

import inspect
import re
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from accelerate import PartialState
from accelerate.data_loader import DataLoaderShard
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer
from transformers import trainer as trainer_module
from transformers.integrations import deepspeed

from hf_lora import training
from hf_lora.training import _trainer_hooks as hooks
from hf_lora.training.trainer import LoRATrainer

OVERRIDDEN = {
    "_determine_best_metric": ["metrics", "trial"],
    "_finalize_training": ["trial", "num_train_samples", "start_time"],
    "_get_dataloader": [
        "dataset",
        "description",
        "batch_size",
        "sampler_fn",
        "is_training",
        "dataloader_key",
    ],
    "_get_eval_sampler": ["eval_dataset"],
    "_load_best_model": [],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_prepare_for_training": ["max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_push_from_checkpoint": ["checkpoint_folder"],
    "_save": ["output_dir", "state_dict"],
    "_save_checkpoint": ["model", "trial"],
    "_save_optimizer_and_scheduler": ["output_dir"],
}
CALLED = {
    "_finish_current_push": [],
    "_get_collator_with_removed_columns": ["data_collator", "description"],
    "_get_output_dir": ["trial"],
    "_move_model_to_device": ["model", "device"],
    "_prepare_inputs": ["inputs"],
    "_save_rng_state": ["output_dir"],
    "_save_scaler": ["output_dir"],
}
# Private names beside Trainer's methods: how each is found.
OTHERS = {
    "_get_default_store": lambda: torch.distributed.distributed_c10d._get_default_store,
    "_hf_deepspeed_config_weak_ref": lambda: deepspeed.__dict__["_hf_deepspeed_config_weak_ref"],
    "_hf_peft_config_loaded": lambda: transformers.PreTrainedModel._hf_peft_config_loaded,
    "_indices": lambda: datasets.Dataset.from_dict({"a": [1, 2]}).select([1, 0])._indices.column(0),
    "_last_lr": lambda: torch.optim.lr_scheduler.LambdaLR(
        torch.optim.SGD([nn.Parameter(torch.ones(1))]), lambda step: 1.0
    )._last_lr[0],
    "_no_split_modules": lambda: transformers.PreTrainedModel._no_split_modules,
    "_non_blocking": lambda: DataLoaderShard([1])._non_blocking,
    "_parameters": lambda: nn.Linear(1, 1)._parameters["weight"],
    "_set_params_and_buffers_to_ignore_for_model": lambda: inspect.signature(
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ).bind("module", "names"),
    "_shared_state": lambda: PartialState._shared_state.keys(),
    "_train_batch_size": lambda: inspect.getsource(Trainer.__init__).index("self._train_batch_size ="),
    "deepspeed_load_checkpoint": lambda: inspect.signature(trainer_module.deepspeed_load_checkpoint).bind(
        "engine", "path", load_module_strict=False
    ),
}


@pytest.mark.parametrize(("name", "parameters"), [*OVERRIDDEN.items(), *CALLED.items()])
def test_trainer_has_the_private_method(name, parameters):
    method = getattr(Trainer, name, None)
    assert method is not None, f"transformers {transformers.__version__} has no Trainer.{name}"
    assert list(inspect.signature(method).parameters)[1:] == parameters, (
        f"Trainer.{name} takes other arguments"
    )


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_trainer_still_calls_the_hook(name):
    source = inspect.getsource(trainer_module)
    assert re.search(rf"self\.{name}\b", source), f"Trainer no longer uses {name}"


@pytest.mark.parametrize("name", OTHERS)
def test_the_private_name_is_there(name):
    OTHERS[name]()


def test_the_tables_are_of_all_that_is_used_and_no_other_module_touches_what_is_not_trainers():
    own = {
        name for base in LoRATrainer.__mro__ if base.__module__.startswith("hf_lora") for name in vars(base)
    }
    assert {name for name in own & set(vars(Trainer)) if re.match(r"_[a-z]", name)} == set(OVERRIDDEN)
    others = "|".join(set(OTHERS) - {"_train_batch_size"})
    for path in Path(training.__path__[0]).glob("*.py"):
        text = path.read_text(encoding="utf-8")
        called = {name for name in re.findall(r"\.(_[a-z]\w*)", text) if hasattr(Trainer, name)}
        assert called <= {*OVERRIDDEN, *CALLED}, f"{path.name} uses {called}"
        found = re.findall(rf"\b(?:{others})\b", text)
        assert not found or path.name == "_trainer_hooks.py", f"{path.name} touches {found}"


def test_deepspeed_checkpoints_are_read_without_the_frozen_weights(monkeypatch):
    calls = []
    monkeypatch.setattr(
        trainer_module,
        "deepspeed_load_checkpoint",
        lambda engine, path, load_module_strict=True: calls.append(load_module_strict),
    )
    with hooks.loading_without_frozen_weights():
        trainer_module.deepspeed_load_checkpoint("engine", "path", load_module_strict=True)
    trainer_module.deepspeed_load_checkpoint("engine", "path")
    assert calls == [False, True]


def test_only_a_quantized_model_passes_for_one_with_adapters_while_trainer_looks_at_it():
    model = nn.Linear(1, 1)
    with hooks.trainable_if_quantized(model):
        assert not hasattr(model, "_hf_peft_config_loaded")
    model.is_quantized = True
    with hooks.trainable_if_quantized(model):
        assert model._hf_peft_config_loaded
    assert not model._hf_peft_config_loaded
