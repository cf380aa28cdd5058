"""The output directory of a training run: is it free, and which checkpoint in it is the newest complete one?"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from hf_lora.arguments import RunArguments
from hf_lora.checkpoint import CONFIG
from hf_lora.training_arguments import LoRATrainingArguments

logger = logging.getLogger(__name__)

LAST = "last"
"""The value of `resume_from_checkpoint` that means the newest complete checkpoint."""


def prepare_output(args: LoRATrainingArguments, run_args: RunArguments) -> str | None:
    """The checkpoint to resume from, if any. Raises ValueError rather than mix two runs in one directory."""
    output = Path(args.output_dir)
    resume = args.resume_from_checkpoint
    last = last_complete_checkpoint(output)
    if resume == LAST:
        if last is None:
            logger.warning("no checkpoint in %s to resume from; starting from the beginning", output)
        return last
    if resume is not None:
        return str(resume)
    if run_args.overwrite_output_dir:
        if args.process_index == 0:
            for checkpoint in checkpoints(output):
                shutil.rmtree(checkpoint)
    elif last or (output / CONFIG).is_file():
        raise ValueError(
            f"output_dir is in use; got {str(output)!r} with {'checkpoints' if last else 'an adapter'} of an earlier "
            "run; pass --resume_from_checkpoint to go on, --overwrite_output_dir to replace it, or another directory"
        )
    return None


def checkpoints(output: Path) -> list[Path]:
    """The checkpoint directories of a run, oldest first."""
    found = [path for path in output.glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def last_complete_checkpoint(output: Path) -> str | None:
    """The newest checkpoint that was written to its end: the Trainer's state is the last file of it."""
    complete = [path for path in checkpoints(output) if (path / TRAINER_STATE_NAME).is_file()]
    return str(complete[-1]) if complete else None
