"""The part of LoRATrainer that saves, pushes and resumes: checkpoints of the adapter alone, also when sharded."""

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
from transformers import PreTrainedTokenizerBase
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress

from hf_lora._files import write_text
from hf_lora.adapters.card import CURVE, RunSummary, render_card, training_curve
from hf_lora.adapters.directory import TENSORS, adapter_info, read_adapter, save_adapter
from hf_lora.adapters.hub import adapter_contents, create_repository, push_contents
from hf_lora.adapters.peft_format import load_tensors
from hf_lora.lora.inject import injection, trainable_parameter_count
from hf_lora.training._trainer_hooks import TrainerHooks
from hf_lora.training.checkpoints import newest_complete, problem, rotate, writing_checkpoint
from hf_lora.training.distributed import gathered, on_first, shard_on_cpu, wait_for_all

logger = logging.getLogger(__name__)

# Where a run's last checkpoint is kept in the repository, as by transformers.
_LAST_CHECKPOINT = "last-checkpoint"


class CheckpointingTrainer(TrainerHooks):
    """Trainer whose checkpoints hold adapter, optimizer, schedule and random states, and no frozen weight.

    It pushes adapter directories to the Hub, and by `hub_strategy` checkpoints.
    """

    facts: RunSummary
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
            self.write_adapter(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def write_adapter(self, output_dir: str | None = None) -> None:
        """Write the adapter directory with its card; the factors have to be whole. The first process writes."""
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
        return render_card(
            adapter_info(model),
            injection(model).config,
            trainable_parameter_count(model),
            run=self.facts,
            args=self.args,
            log_history=self.state.log_history,
            curve=curve,
        )

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

        Returns the commit in the first process, or without `blocking` a Future of it. Raises ValueError, in one line,
        where it could not be pushed; it is saved all the same. kwargs: of Trainer's own card, unused.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        if not self.is_world_process_zero():
            return None
        self.finish_push()
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

    def push_checkpoint(self, folder: Path) -> None:
        """Push the adapter of a checkpoint in the background, and by `hub_strategy` the checkpoint itself.

        All is read before training goes on, since the folder may be deleted for a newer one.
        """
        args = self.args
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
            parent = place[args.hub_strategy]
            contents |= {
                f"{parent}/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in files
            }
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
        """Push in a thread, one push after the other; an error is logged and ends nothing."""

        def push() -> CommitInfo | None:
            try:
                return self._push(contents, **options)
            except ValueError as error:
                logger.warning("not pushed (%s): %s", options["commit_message"], error)
                return None

        return self._uploads.run_as_future(push)

    def checkpoint_to_resume(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The checkpoint that is named, or with True the newest whole one. Raises ValueError if it is not whole."""
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

    def write_checkpoint(self, trial: Any = None) -> None:
        """As Trainer's own, but whole or not there, and without the frozen weights."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run = self.run_directory(trial)
        target = run / f"checkpoint-{self.state.global_step}"
        best = f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best == target.name or (run / best).is_dir()):
            self.state.best_model_checkpoint = str(run / best)
        with writing_checkpoint(target, writes=self.args.should_save, wait=wait_for_all) as folder:
            self.save_model(str(folder), _internal_call=True)
            if not self.args.save_only_model:
                self.write_optimizer(folder)
                self.write_random_states(folder)
            if self.args.should_save:
                self._note_callbacks()
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        if self.args.push_to_hub:
            self.push_checkpoint(target)
        if self.args.should_save:
            rotate(run, self.args.save_total_limit, target, self.state.best_model_checkpoint)

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

    def write_optimizer(self, folder: Path) -> None:
        """Write the states of optimizer and schedule, sharded or whole; every process has to call it."""
        if self.is_deepspeed_enabled:
            # Trainer leaves the frozen weights out for peft's own model class only.
            self.model_wrapped.save_checkpoint(str(folder), exclude_frozen_parameters=True)
        elif self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, str(folder))
        elif self.args.should_save:
            torch.save(self.optimizer.state_dict(), folder / OPTIMIZER_NAME)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)

    def read_checkpoint(self, directory: str) -> None:
        """Load the adapter of a checkpoint. Raises ValueError if it was trained with another rank, alpha or head."""
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


def tell_broken(chosen: Path | None, broken: dict[Path, str]) -> None:
    """Say which newer checkpoints are passed over, and why."""
    for checkpoint, reason in broken.items():
        instead = f"going on from {chosen.name}" if chosen else "there is no whole one before it"
        logger.warning("%s is not whole (%s); %s", checkpoint.name, reason, instead)
