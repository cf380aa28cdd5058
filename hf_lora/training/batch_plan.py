"""Which plan of training batches a Trainer's arguments ask for."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from hf_lora.training.batching import GroupByLength, Plan, TokenBudget, token_lengths


def by_length(args: TrainingArguments) -> bool:
    """Whether batches are to hold examples of similar length."""
    budget = getattr(args, "max_tokens_per_batch", None)
    return args.train_sampling_strategy == "group_by_length" or budget is not None


def training_plan(trainer: Any) -> Plan | None:
    """The plan of the batches of a Trainer's training set; None where stock Trainer makes them.

    Raises ValueError for a budget of tokens where the examples' lengths are not known.
    """
    args, data, accelerator = trainer.args, trainer.train_dataset, trainer.accelerator
    if not by_length(args) or data is None:
        return None
    budget = getattr(args, "max_tokens_per_batch", None)
    # Elsewhere a batch is not one process's own: it is sent or cut by accelerate, or read by several.
    one_each = not (accelerator.split_batches or accelerator.dispatch_batches) and (
        trainer.get_tp_size() == trainer.get_cp_size() == trainer.get_sp_size() == 1
    )
    lengths = token_lengths(data) if one_each else None
    if lengths is None:
        if budget is None:
            return None
        raise ValueError(
            f"max_tokens_per_batch needs the lengths of all examples; got {type(data).__name__}; expected a "
            "data set of known size with input_ids, and one batch for each process; set "
            "per_device_train_batch_size instead"
        )
    if budget is None:
        return GroupByLength(lengths, trainer._train_batch_size, args.world_size, args.dataloader_drop_last)
    return TokenBudget(lengths, budget, args.world_size, args.dataloader_drop_last)
