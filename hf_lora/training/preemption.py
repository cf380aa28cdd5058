"""SIGTERM, as a cluster sends it to a job it takes the machine from: save a checkpoint and end."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lora.training.distributed import any_process

logger = logging.getLogger(__name__)

EXIT_CODE = 128 + signal.SIGTERM  # what a shell reports of a process that SIGTERM has ended


class Preempted(SystemExit):
    """Training was ended by SIGTERM after a checkpoint was saved; exits with `EXIT_CODE`, 143, if not caught."""

    def __init__(self, step: int) -> None:
        super().__init__(EXIT_CODE)
        self.step = step


class SaveOnSigterm(TrainerCallback):
    """After the step in which any process gets SIGTERM, saves a checkpoint and stops all of them."""

    def __init__(self) -> None:
        self.received = False
        self.stopping = False
        self._process = os.getpid()

    def receive(self, number: int, frame: Any) -> None:
        """The signal's handler. A process forked from this one, such as a data loader's, ends as by default."""
        if os.getpid() != self._process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Called after each optimizer step, before logging, evaluation and saving."""
        if any_process(self.received, args.device):
            self.stopping = control.should_training_stop = control.should_save = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Called where the epoch was left too: what is due at an epoch's end is not due in its middle."""
        if self.stopping:
            control.should_save = control.should_evaluate = control.should_log = False


@contextmanager
def ending_on_sigterm(step: int) -> Iterator[None]:
    """Inside, SIGTERM raises Preempted at once: what is under way is not saved, but done again on resuming.

    step: of the training before. As with `saving_on_sigterm` another handler stays.
    """

    def end(number: int, frame: Any) -> None:
        logger.warning(
            "SIGTERM: ended; --resume_from_checkpoint goes on from the last checkpoint that was saved"
        )
        raise Preempted(step)

    with handling_sigterm(end):
        yield


@contextmanager
def handling_sigterm(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Inside, SIGTERM calls `handler`; another handler stays, and outside the main thread nothing is changed."""
    if not _is_unhandled():
        yield
        return
    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def saving_on_sigterm(trainer: Any) -> Iterator[None]:
    """Inside, SIGTERM makes `trainer` save a checkpoint and stop; then raises Preempted at the end of the block.

    A handler that the program has installed for SIGTERM stays, and so does transformers' own
    (`enable_jit_checkpoint`). Signals reach the main thread only: in another one nothing is changed.
    """
    if not _is_unhandled():
        yield
        return
    callback = SaveOnSigterm()
    trainer.add_callback(callback)
    signal.signal(signal.SIGTERM, callback.receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        trainer.remove_callback(callback)
    if callback.stopping:
        if trainer.is_world_process_zero():
            logger.warning(
                "SIGTERM: saved checkpoint-%d in %s; go on with --resume_from_checkpoint",
                trainer.state.global_step,
                trainer.args.output_dir,
            )
        raise Preempted(trainer.state.global_step)
    if callback.received:
        os.kill(
            os.getpid(), signal.SIGTERM
        )  # it came when the last step was done: nothing is lost by ending now


def _is_unhandled() -> bool:
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
