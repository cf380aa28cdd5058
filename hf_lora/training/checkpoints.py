"""The checkpoints of a run on the disk: written whole, verified, found again, deleted; and SIGTERM, which asks for one.

A checkpoint is staged in a hidden folder, gets a list of its files with their sizes and sha256, is synced to the disk,
and appears under its name by one rename. A killed process leaves a whole checkpoint or a hidden folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer import TRAINER_STATE_NAME

from hf_lora._files import synced, writing
from hf_lora.adapters.directory import TENSORS
from hf_lora.training.distributed import any_process

logger = logging.getLogger(__name__)

EXIT_CODE = 128 + signal.SIGTERM  # what a shell reports of a process that SIGTERM has ended

CHECKSUMS = "checksums.json"
_NAME = re.compile(r"checkpoint-[0-9]+")
_STAGED, _REPLACED, _DELETED = ".partial", ".replaced", ".deleted"


@contextmanager
def writing_checkpoint(
    target: Path, *, writes: bool = True, wait: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yield the folder in which the files of the checkpoint `target` are written; then it appears whole.

    writes: whether this process makes and names the folder; others only add files to it. wait: returns when all
    processes have called it. Raises OSError, in one line, where the files cannot be written.
    """
    folder = _hidden(target, _STAGED)
    with writing(target):
        if writes:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        wait()
        try:
            yield folder
            wait()
            if writes:
                # Without a line break at the end, so that a file without its last byte is never whole.
                listed = {"format_version": 1, "files": _checksums(folder)}
                (folder / CHECKSUMS).write_text(json.dumps(listed, indent=2), encoding="utf-8")
                synced(folder)
                _put_in_place(folder, target)
        finally:
            if writes:
                shutil.rmtree(folder, ignore_errors=True)
        wait()


def problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None for one that is as it was written."""
    try:
        listed = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{CHECKSUMS} cannot be read"
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"{CHECKSUMS} names a file outside"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
        if _sha256(path) != digest:
            return f"{name} was changed: its sha256 is another"
    unlisted = [name for name in (TENSORS, TRAINER_STATE_NAME) if name not in expected]
    return f"{CHECKSUMS} does not list {unlisted[0]}" if unlisted else None


def checkpoints(output: Path) -> list[Path]:
    """The checkpoint directories of a run by their names, the oldest step first."""
    return sorted((path for path in output.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def newest_complete(output: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that is whole, and what is wrong with each that is newer."""
    broken: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints(output)):
        reason = problem(checkpoint)
        if reason is None:
            return checkpoint, broken
        broken[checkpoint] = reason
    return None, broken


def rotate(output: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """Delete the oldest checkpoints until `limit` are left, those after `newest`, of a run given up, before the others.

    Never `newest`, just written, and never the best.
    """
    if not limit or limit < 1:
        return
    found = checkpoints(output)
    kept = {newest.name} | ({Path(best).name} if best else set())
    later = [path for path in found if step_of(path) > step_of(newest)]
    candidates = [path for path in (*later, *found) if path.name not in kept]
    for path in list(dict.fromkeys(candidates))[: max(0, len(found) - max(limit, len(kept)))]:
        delete(path)


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint: from its name at once, then its files."""
    doomed = _hidden(checkpoint, _DELETED)
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_leftovers(output: Path) -> None:
    """Remove what a killed run left half-made; a checkpoint that was about to be replaced comes back."""
    for path in output.glob(".checkpoint-*"):
        place = output / path.stem.lstrip(".")
        if not _NAME.fullmatch(place.name) or path.suffix not in (_STAGED, _REPLACED, _DELETED):
            continue
        if path.suffix == _REPLACED and not place.exists():
            path.rename(place)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _put_in_place(folder: Path, target: Path) -> None:
    replaced = _hidden(target, _REPLACED)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    folder.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)
    synced(target.parent, inside=False)


def _hidden(checkpoint: Path, suffix: str) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}{suffix}")


def _checksums(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != CHECKSUMS
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        """Called after each optimizer step, before logging, evaluation and saving."""
        if any_process(self.received, args.device):
            self.stopping = control.should_training_stop = control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        """Called where the epoch was left too: what is due at an epoch's end is not due in its middle."""
        if self.stopping:
            control.should_save = control.should_evaluate = control.should_log = False


@dataclass(frozen=True)
class EndOnSigterm:
    """A handler of SIGTERM that raises Preempted(step) at once. gives_way: another of ours may take its place."""

    step: int
    gives_way: bool

    def __call__(self, number: int, frame: Any) -> None:
        logger.warning("SIGTERM: ended; --resume_from_checkpoint goes on from the last saved checkpoint")
        raise Preempted(self.step)


@contextmanager
def ending_on_sigterm(step: int = 0, *, gives_way: bool = False) -> Iterator[None]:
    """Inside, SIGTERM raises Preempted(step) at once: a resumed run does the work again. Another handler stays.

    gives_way: `saving_on_sigterm` inside does what it does without this.
    """
    with _handling_sigterm(EndOnSigterm(step, gives_way)):
        yield


@contextmanager
def saving_on_sigterm(trainer: Trainer) -> Iterator[None]:
    """Inside, SIGTERM makes `trainer` save a checkpoint and stop; then raises Preempted at the end of the block.

    Another handler of the program stays, and so does transformers' own (`enable_jit_checkpoint`).
    """
    if not _is_unhandled():
        yield
        return
    callback = SaveOnSigterm()
    trainer.add_callback(callback)
    try:
        with _handling_sigterm(callback.receive):
            yield
    finally:
        trainer.remove_callback(callback)
    step = trainer.state.global_step
    if callback.stopping and trainer.is_world_process_zero():
        place = (step, trainer.args.output_dir)
        logger.warning("SIGTERM: saved checkpoint-%d in %s; go on with --resume_from_checkpoint", *place)
    if callback.received or callback.stopping:
        # After the last step nothing more is saved: nothing is lost by ending now.
        raise Preempted(step)


@contextmanager
def _handling_sigterm(handler: Callable[[int, Any], None]) -> Iterator[None]:
    if not _is_unhandled():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_unhandled() -> bool:
    """Whether SIGTERM may get a handler here: signals reach the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        return False
    handler = signal.getsignal(signal.SIGTERM)
    return handler is signal.SIG_DFL or getattr(handler, "gives_way", False)
