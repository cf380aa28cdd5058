"""The private parts of Trainer, and of what lies under it, that `training` touches: here and nowhere else.

`tests/training/test_trainer_hooks.py` fails by name where a new version moves one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer
from transformers import trainer as trainer_module
from transformers.integrations import deepspeed


class TrainerHooks(Trainer):
    """Trainer whose private hooks call public methods, those of CheckpointingTrainer and LoRATrainer."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        self.write_adapter(output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.write_checkpoint(trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.write_optimizer(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.read_checkpoint(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self.read_checkpoint(self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self.push_checkpoint(Path(checkpoint_folder))

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        sampler = self.eval_sampler(eval_dataset)
        return super()._get_eval_sampler(eval_dataset) if sampler is None else sampler

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with loading_without_frozen_weights():
            return super()._prepare_for_training(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # With a limit of one Trainer deletes the newest checkpoint at the end, if another one is the best.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    # What the modules beside this one call.

    @property
    def train_batch_size(self) -> int:
        """The examples of a training batch in one process."""
        return self._train_batch_size

    def prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs on the device that they are needed on."""
        return self._prepare_inputs(inputs)

    def sequential_train_loader(self) -> DataLoaderShard:
        """The training data in their order, in Trainer's own batches."""
        return self._get_dataloader(
            self.train_dataset, "Training", self._train_batch_size, SequentialSampler, is_training=True
        )

    def run_directory(self, trial: Any) -> Path:
        """Where the checkpoints of a run, or of one trial of a search, go."""
        return Path(self._get_output_dir(trial=trial))

    def write_random_states(self, folder: Path) -> None:
        """Write the states of the random generators and of the gradient scaler into a checkpoint."""
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))

    def finish_push(self) -> None:
        """Wait for the push that runs in the background."""
        self._finish_current_push()


def with_batches(loader: DataLoaderShard, batches: Sampler[list[int]]) -> DataLoaderShard:
    """The loader that accelerate prepared, with batches that are divided between processes already.

    accelerate's own division takes batches of one size and repeats examples to fill the last.
    """
    names = (
        *("collate_fn", "in_order", "multiprocessing_context", "num_workers", "persistent_workers"),
        *("pin_memory", "prefetch_factor", "worker_init_fn"),
    )
    options = {name: getattr(loader, name) for name in names}
    return DataLoaderShard(
        loader.dataset,
        device=loader.device,
        batch_sampler=batches,
        _non_blocking=loader._non_blocking,
        **options,
    )


@contextmanager
def trainable_if_quantized(model: nn.Module | None) -> Iterator[None]:
    """Inside, Trainer takes a quantized model, which it refuses unless transformers' own adapters are loaded."""
    quantized: Any = model
    if not getattr(model, "is_quantized", False):
        yield
        return
    quantized._hf_peft_config_loaded = True
    try:
        yield
    finally:
        quantized._hf_peft_config_loaded = False


@contextmanager
def loading_without_frozen_weights() -> Iterator[None]:
    """Inside, Trainer takes a DeepSpeed checkpoint without the frozen weights, as it does for peft's own model class.

    The adapter's tensors are compared one by one, as they are read from their own file.
    """
    strict = trainer_module.deepspeed_load_checkpoint
    trainer_module.deepspeed_load_checkpoint = lambda engine, path, **_: strict(
        engine, path, load_module_strict=False
    )
    try:
        yield
    finally:
        trainer_module.deepspeed_load_checkpoint = strict


@contextmanager
def without_deepspeed_config() -> Iterator[None]:
    """Inside, `from_pretrained` does not know of DeepSpeed."""
    known = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = known


def count_in_store(key: str) -> int:
    """Count this call under `key` among all processes; returns the calls so far. RuntimeError without the store."""
    return dist.distributed_c10d._get_default_store().add(key, 1)


def ignore_in_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Let DistributedDataParallel leave these parameters and buffers alone."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(names))


def set_fsdp(accelerator: Any) -> None:
    """Make FSDP the accelerator's way of distributing, as accelerate does on GPUs with the launcher's settings."""
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def set_wrapped_classes(model: nn.Module, names: Iterable[str]) -> None:
    """Name the classes of the layers that FSDP wraps."""
    model._no_split_modules = sorted(names)  # type: ignore[assignment]


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter in the place of another, without the checks of `setattr`."""
    module._parameters[name] = parameter


def chosen_rows(dataset: Any) -> Any:
    """The rows that a `datasets.Dataset` has of its Arrow table, as an Arrow column; None: all in order."""
    return None if dataset._indices is None else dataset._indices.column(0)
