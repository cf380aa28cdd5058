"""The output directory of a training run: is it free, and which checkpoint in it is to be gone on from?"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hf_lora._files import writing
from hf_lora.adapters.directory import CONFIG
from hf_lora.training.arguments import LoRATrainingArguments
from hf_lora.training.checkpointing import tell_broken
from hf_lora.training.checkpoints import checkpoints, clear_leftovers, delete, newest_complete

logger = logging.getLogger(__name__)

LAST = "last"
"""The value of `resume_from_checkpoint` that means the newest complete checkpoint."""
LOCK = ".hf_lora.lock"


@contextmanager
def reserved(output: Path) -> Iterator[None]:
    """Inside, the directory belongs to this process, until it ends, however it ends.

    Raises ValueError where another process has it, and OSError where nothing can be written.
    """
    lock = FileLock(output / LOCK)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"output_dir is in use by another run at this moment; got {str(output)!r}; expected a directory of "
                "its own for every run; wait for that run to end, or give another --output_dir"
            ) from None
    try:
        yield
    finally:
        (output / LOCK).unlink(missing_ok=True)
        lock.release()
        # A run that was refused before it wrote anything leaves nothing behind.
        if not any(output.iterdir()):
            output.rmdir()


def prepare_output(args: LoRATrainingArguments, *, overwrite: bool = False) -> str | None:
    """The checkpoint to resume from, if any. Raises ValueError rather than mix two runs in one directory."""
    output = Path(args.output_dir)
    clear_leftovers(output)
    resume = args.resume_from_checkpoint
    if resume == LAST:
        last, broken = newest_complete(output)
        tell_broken(last, broken)
        if last is None:
            logger.warning("no checkpoint in %s to resume from; starting from the beginning", output)
            return None
        return str(last)
    if resume is not None:
        return str(resume)
    found = checkpoints(output)
    if overwrite:
        for checkpoint in found:
            delete(checkpoint)
    elif found or (output / CONFIG).is_file():
        raise ValueError(
            f"output_dir is in use; got {str(output)!r} with {'checkpoints' if found else 'an adapter'} of an earlier "
            "run; pass --resume_from_checkpoint to go on, --overwrite_output_dir to replace it, or another directory"
        )
    return None
