"""The part of LoRATrainer that saves and goes on: adapter-only checkpoints, whole or not there, also when sharded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from huggingface_hub import CommitInfo, HfApi
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress

from hf_lora.adapters.directory import TENSORS, adapter_info, read_adapter
from hf_lora.adapters.hub import adapter_contents, create_repository, push_contents
from hf_lora.adapters.peft_format import load_tensors
from hf_lora.lora.inject import injection
from hf_lora.training.checkpoints import newest_complete, problem, rotate, writing_checkpoint
from hf_lora.training.distributed import (
    gathered,
    loading_without_frozen_weights,
    on_first,
    shard_on_cpu,
    wait_for_all,
)

logger = logging.getLogger(__name__)

# Where a run's last checkpoint is kept in the repository, as by transformers.
_LAST_CHECKPOINT = "last-checkpoint"


class CheckpointingTrainer(Trainer):
    """Trainer whose checkpoints hold adapter, optimizer, schedule and random states, and no frozen weight.

    What it pushes to the Hub is an adapter directory, and by `hub_strategy` checkpoints.
    """

    hub_model_id: str | None
    push_in_progress: PushInProgress | None

    @cached_property
    def _uploads(self) -> HfApi:
        return HfApi()

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's own; FSDP also where the processes are on CPUs."""
        super().create_accelerator_and_postprocess()
        if shard_on_cpu(self.accelerator):
            self.is_fsdp_enabled = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter directory; every process has to call it, the first one writes."""
        with gathered(self.accelerator.unwrap_model(self.model)):
            self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository and the branch to push to before any time is spent on training.

        Raises ValueError, in one line, in every process.
        """
        args = self.args
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        self.hub_model_id = on_first(
            lambda: create_repository(
                name,
                private=args.hub_private_repo if private is None else private,
                revision=args.hub_revision,
                token=token or args.hub_token,
            )
        )
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo | None] | None:
        """Save the adapter into the output directory and push its own files; every process has to call it.

        Returns the commit, of which the first process knows, or without `blocking` a Future of it. Raises ValueError,
        in one line, where it could not be pushed; it is saved all the same. kwargs: what Trainer's card takes; ours,
        written by `save_model`, is made of what was measured.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        contents = adapter_contents(Path(self.args.output_dir))
        options = {"commit_message": commit_message, "token": token, "revision": revision}
        if not blocking:
            return self._push_later(contents, **options)
        try:
            return self._push(contents, **options)
        except ValueError as error:
            raise ValueError(
                f"the adapter is saved in {self.args.output_dir!r}, but not on the Hub: {error}; "
                "push it with `hf-lora push`"
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the adapter of a checkpoint in the background, and by `hub_strategy` the checkpoint itself.

        A checkpoint is what a run goes on from: these strategies, and nothing else, take optimizer and random states
        to the Hub. All is read before training goes on, since the folder may be deleted for a newer one.
        """
        args, folder = self.args, Path(checkpoint_folder)
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        running = self.push_in_progress
        if running is not None and not running.is_done() and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        contents = adapter_contents(folder)
        place = {HubStrategy.CHECKPOINT: _LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: folder.name}
        if args.hub_strategy in place:
            files = (path for path in sorted(folder.rglob("*")) if path.is_file())
            inside = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
            contents |= {f"{place[args.hub_strategy]}/{name}": content for name, content in inside.items()}
        at = f"step {self.state.global_step}"
        if args.save_strategy == SaveStrategy.EPOCH:
            at = f"epoch {int(self.state.epoch or 0)}"
        job = self._push_later(contents, commit_message=f"Training in progress, {at}")
        if running is None or running.is_done():
            self.push_in_progress = PushInProgress([job])
        else:
            running.jobs.append(job)

    def _push(self, contents: Mapping[str, bytes], **options: Any) -> CommitInfo:
        args = self.args
        options["token"] = options.get("token") or args.hub_token
        options["revision"] = options.get("revision") or args.hub_revision
        assert self.hub_model_id is not None
        return push_contents(contents, self.hub_model_id, **options)

    def _push_later(self, contents: Mapping[str, bytes], **options: Any) -> Future[CommitInfo | None]:
        """One push after the other, in a thread of its own; what hinders one is told and hinders nothing else."""

        def push() -> CommitInfo | None:
            try:
                return self._push(contents, **options)
            except ValueError as error:
                logger.warning("not pushed (%s): %s", options["commit_message"], error)
                return None

        return self._uploads.run_as_future(push)

    def checkpoint_to_resume(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The whole checkpoint that is meant: True is the newest in the output directory.

        Raises ValueError where there is none, or where the one that is named is not whole.
        """
        if not resume_from_checkpoint:
            return None
        return on_first(lambda: self._whole_checkpoint(resume_from_checkpoint))

    def _whole_checkpoint(self, wanted: str | bool) -> str:
        output = Path(self.args.output_dir)
        if wanted is True:
            found, broken = newest_complete(output)
            tell_broken(found, broken)
            if found is None:
                raise ValueError(f"no whole checkpoint to resume from; got {str(output)!r}; start without it")
            return str(found)
        named = Path(str(wanted))
        reason = problem(named) if named.is_dir() else "no such directory"
        if reason is not None:
            raise ValueError(
                f"the checkpoint to resume from is not whole; got {wanted!r}: {reason}; expected one that was written "
                "to its end; give another, or none to take the newest whole one"
            )
        return str(named)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer's own, but whole or not there, and without the frozen weights."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run = Path(self._get_output_dir(trial=trial))
        target = run / f"checkpoint-{self.state.global_step}"
        best = f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best == target.name or (run / best).is_dir()):
            self.state.best_model_checkpoint = str(run / best)
        with writing_checkpoint(target, writes=self.args.should_save, wait=wait_for_all) as folder:
            self.save_model(str(folder), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(folder))
                self._save_scaler(str(folder))
                self._save_rng_state(str(folder))
            if self.args.should_save:
                self._note_callbacks()
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
        if self.args.should_save:
            rotate(run, self.args.save_total_limit, target, self.state.best_model_checkpoint)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # With a limit of one Trainer deletes the newest checkpoint at the end, if another one is the best.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _note_callbacks(self) -> None:
        """Put the state of callbacks that have one into the Trainer's state, as Trainer does before it writes it."""
        for callback in (*self.callback_handler.callbacks, self.control):
            if not isinstance(callback, ExportableState):
                continue
            name, known = type(callback).__name__, self.state.stateful_callbacks
            if isinstance(known[name], list):
                known[name].append(callback.state())
            else:
                known[name] = callback.state()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            # Trainer leaves the frozen weights out for peft's own model class only.
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        elif self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        elif self.args.should_save:
            assert self.optimizer is not None
            torch.save(self.optimizer.state_dict(), Path(output_dir) / OPTIMIZER_NAME)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with loading_without_frozen_weights():
            return super()._prepare_for_training(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_adapter_checkpoint(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_adapter_checkpoint(self.state.best_model_checkpoint)

    def _load_adapter_checkpoint(self, directory: str) -> None:
        model = self.accelerator.unwrap_model(self.model)
        files = read_adapter(directory)
        config = injection(model).config
        for target in injection(model).targets:
            saved, own = files.config.scaling_of(target.name), config.scaling_of(target.name)
            if saved != own:
                raise ValueError(
                    f"the checkpoint {directory!r} has another scaling (alpha / rank) at {target.name!r}; "
                    f"got {saved:g}; expected {own:g}; resume with the rank and alpha it was trained with"
                )
        with gathered(model):
            load_tensors(model, files.tensors, source=str(Path(directory) / TENSORS))

    def _remember_base(self) -> None:
        """Take the digest of the pretrained weights while they are whole: sharded, no process has them all."""
        state = injection(self.model)
        state.info = adapter_info(self.model)


def tell_broken(chosen: Path | None, broken: dict[Path, str]) -> None:
    """Say which newer checkpoints are passed over, and why."""
    for checkpoint, reason in broken.items():
        instead = f"going on from {chosen.name}" if chosen else "there is no whole one before it"
        logger.warning("%s is not whole (%s); %s", checkpoint.name, reason, instead)
