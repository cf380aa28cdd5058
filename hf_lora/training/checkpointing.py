"""The part of LoRATrainer that saves, pushes and resumes: checkpoints of the adapter alone, also when sharded."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from huggingface_hub import CommitInfo, HfApi
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress

from hf_lora._files import write_text
from hf_lora.adapters.card import CURVE, READS, RunSummary, of_log, render_card, training_curve
from hf_lora.adapters.directory import TENSORS, adapter_info, read_adapter, save_adapter
from hf_lora.adapters.hub import adapter_contents, create_repository, push_contents
from hf_lora.adapters.loading import load_tensors
from hf_lora.lora.inject import injection, trainable_parameter_count
from hf_lora.training import _trainer_hooks as hooks
from hf_lora.training import resuming
from hf_lora.training.checkpoints import rotate, writing_checkpoint
from hf_lora.training.distributed import gathered, on_first, shard_on_cpu, wait_for_all

logger = logging.getLogger(__name__)


class CheckpointingTrainer(Trainer):
    """Trainer whose checkpoints hold adapter, optimizer, schedule and random states, and no frozen weight.

    It pushes adapter directories to the Hub, and by `hub_strategy` checkpoints.
    """

    facts: RunSummary
    # How the run started, by the names of options: compared with a checkpoint's when a run goes on from it.
    start_options: Mapping[str, Any] = {}
    _own_identity: Mapping[str, Any] | None = None
    _changed: Mapping[str, str] = {}
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

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the adapter directory with its card; the factors have to be whole."""
        if not self.args.should_save:
            return
        # The curve belongs to a finished run, whose results are known, and not to each checkpoint.
        curve = training_curve(self.state.log_history) if self.facts.metrics else None
        files: dict[str, str | bytes] = {"README.md": self._card(curve=CURVE if curve else None)}
        tokenizer = self.processing_class
        save_adapter(
            self.accelerator.unwrap_model(self.model),
            output_dir or self.args.output_dir,
            tokenizer=tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None,
            metrics=self.facts.metrics,
            files=files if curve is None else files | {CURVE: curve},
        )

    def create_model_card(self, **_: Any) -> None:
        """Write `README.md` into the output directory from what was measured."""
        if self.is_world_process_zero():
            write_text(Path(self.args.output_dir) / "README.md", self._card())

    def _card(self, curve: str | None = None) -> str:
        model = self.accelerator.unwrap_model(self.model)
        facts = (adapter_info(model), injection(model).config, trainable_parameter_count(model))
        best = self.args.load_best_model_at_end and not self.is_in_train
        reads = READS.get(getattr(model, "main_input_name", "input_ids"), "")
        run = replace(self.facts, metrics=self.facts.metrics or of_log(self.state, best), reads=reads)
        log = self.state.log_history
        return render_card(*facts, run=run, args=self.args, log_history=log, curve=curve)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository to push to before time is spent on training. Raises ValueError in every process."""
        args = self.args
        create = partial(
            create_repository,
            args.hub_model_id or Path(args.output_dir).absolute().name,
            private=args.hub_private_repo if private is None else private,
            revision=args.hub_revision,
            token=token or args.hub_token,
        )
        self.hub_model_id, self.push_in_progress = on_first(create), None

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

        Returns the commit in the first process, or without `blocking` a Future of it. Raises ValueError, in one line,
        where it could not be pushed; it is saved all the same. kwargs: of Trainer's own card, unused.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        contents = adapter_contents(Path(self.args.output_dir))
        if not blocking:
            return self._push_later(contents, commit_message, token, revision)
        try:
            return self._push(contents, commit_message, token, revision)
        except ValueError as error:
            raise ValueError(
                f"the adapter is saved in {self.args.output_dir!r}, but not on the Hub: {error}; "
                "push it with `hf-lora push`"
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the adapter of a checkpoint in the background, and by `hub_strategy` the checkpoint itself.

        All is read before training goes on, since the folder may be deleted for a newer one.
        """
        args, running, folder = self.args, self.push_in_progress, Path(checkpoint_folder)
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if running is not None and not running.is_done() and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        contents = adapter_contents(folder)
        # The folder's name in the repository, as with transformers.
        places = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        if place := places.get(args.hub_strategy):
            files = (path for path in sorted(folder.rglob("*")) if path.is_file())
            contents |= {
                f"{place}/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in files
            }
        by_epoch = args.save_strategy == SaveStrategy.EPOCH
        at = f"epoch {int(self.state.epoch or 0)}" if by_epoch else f"step {self.state.global_step}"
        job = self._push_later(contents, f"Training in progress, {at}")
        if running is None or running.is_done():
            self.push_in_progress = PushInProgress([job])
        else:
            running.jobs.append(job)

    def _push(
        self,
        contents: Mapping[str, bytes],
        message: str | None,
        token: str | None = None,
        revision: str | None = None,
    ) -> CommitInfo:
        assert self.hub_model_id is not None
        token, revision = token or self.args.hub_token, revision or self.args.hub_revision
        return push_contents(
            contents, self.hub_model_id, commit_message=message, token=token, revision=revision
        )

    def _push_later(
        self, contents: Mapping[str, bytes], message: str | None, *options: str | None
    ) -> Future[CommitInfo | None]:
        """Push in a thread, one push after the other; an error is logged and ends nothing."""

        def push() -> CommitInfo | None:
            try:
                return self._push(contents, message, *options)
            except ValueError as error:
                logger.warning("not pushed (%s): %s", message, error)
                return None

        return self._uploads.run_as_future(push)

    def checkpoint_to_resume(self, wanted: str | bool | None) -> str | None:
        """The checkpoint that is named, or with True the newest whole one. Raises ValueError if it is not whole."""
        return (
            on_first(partial(resuming.whole_checkpoint, wanted, Path(self.args.output_dir)))
            if wanted
            else None
        )

    def compare_with(self, checkpoint: str | None, allow_changed: str | Sequence[str] | None = None) -> None:
        """Compare this run with that of a checkpoint. Raises ValueError naming what differs and is not allowed."""
        self._own_identity, self._changed = None, {}
        if checkpoint is None:
            return
        given = (allow_changed, getattr(self.args, "allow_changed", None))
        allowed = [name for names in given for name in resuming.parse_allowed(names)]
        found = on_first(lambda: resuming.changes(Path(checkpoint), self._identity(), allowed))
        if self.is_world_process_zero():
            resuming.tell(Path(checkpoint), found)
        self._changed = found or {}

    def _identity(self) -> dict[str, Any]:
        # The settings may be those of a trial, which are set when the training has begun.
        self._own_identity = self._own_identity or resuming.identity_of(self)
        return {**self._own_identity, **self.start_options, **resuming.settings_of(self.args)}

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
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
                (folder / resuming.FILE).write_text(json.dumps(self._identity(), indent=2), encoding="utf-8")
                self._note_callbacks()
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
        if self.args.should_save:
            rotate(run, self.args.save_total_limit, target, self.state.best_model_checkpoint)

    def _note_callbacks(self) -> None:
        """Put the state of callbacks that have one into the Trainer's state, as Trainer does before it writes it."""
        known = self.state.stateful_callbacks
        for callback in (*self.callback_handler.callbacks, self.control):
            name = type(callback).__name__
            if isinstance(callback, ExportableState) and isinstance(known[name], list):
                known[name].append(callback.state())
            elif isinstance(callback, ExportableState):
                known[name] = callback.state()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the states of optimizer and schedule, sharded or whole; every process has to call it."""
        if self.is_deepspeed_enabled:
            # Trainer leaves the frozen weights out for peft's own model class only.
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        elif self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        elif self.args.should_save:
            torch.save(self.optimizer.state_dict(), Path(output_dir, OPTIMIZER_NAME))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's own; settings that were changed on purpose stay changed."""
        with hooks.keeping_rates(self) if checkpoint and self._changed else nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the adapter of a checkpoint. Raises ValueError if it was trained with another rank, alpha or head."""
        model = self.accelerator.unwrap_model(self.model)
        files, own = read_adapter(resume_from_checkpoint), injection(model)
        for name in (target.name for target in own.targets):
            saved, expected = files.config.scaling_of(name), own.config.scaling_of(name)
            if saved != expected:
                raise ValueError(
                    f"the checkpoint {resume_from_checkpoint!r} has another scaling (alpha / rank) at {name!r}; "
                    f"got {saved:g}; expected {expected:g}; resume with the rank and alpha it was trained with"
                )
        with gathered(model):
            load_tensors(model, files.tensors, source=str(Path(resume_from_checkpoint, TENSORS)))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with hooks.loading_without_frozen_weights():
            return super()._prepare_for_training(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # With a limit of one Trainer deletes the newest checkpoint at the end, if another one is the best.
        with hooks.replaced(self.args, "save_total_limit", None):
            return super()._finalize_training(*args, **kwargs)
