"""From which checkpoint a run goes on, and whether it is this run's.

Every checkpoint holds what its run is: digests of data and base, the labels, and the settings that decide what is
trained. A run that goes on from it compares them with its own, name by name.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from enum import Enum
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.types as kinds
from transformers import Trainer, TrainingArguments

from hf_lora._choices import nearest
from hf_lora._files import MAX_JSON_BYTES, parse_object, read_bytes
from hf_lora._text import shortened
from hf_lora.adapters.directory import adapter_info
from hf_lora.lora.inject import base_parameters, injection
from hf_lora.training._trainer_hooks import chosen_rows
from hf_lora.training.checkpoints import newest_complete, problem

logger = logging.getLogger(__name__)

FILE = "identity.json"
_BATCH = 10_000
# The training arguments that decide what is trained. The others say what is told, measured or kept, or how to compute.
SETTINGS = (
    *("seed", "data_seed", "max_steps", "num_train_epochs", "learning_rate", "warmup_steps", "weight_decay"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "head_learning_rate", "lora_plus_ratio"),
    *("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_tokens_per_batch", "max_grad_norm"),
    *(
        "train_sampling_strategy",
        "dataloader_drop_last",
        "accelerator_config",
        "average_tokens_across_devices",
    ),
    *("label_smoothing_factor", "class_weights", "neftune_noise_alpha", "bf16", "fp16"),
    *("metric_for_best_model", "greater_is_better"),
)
# The others of LoRAConfig show in names, shapes and scalings, which loading the checkpoint compares.
_LORA = ("lora_dropout", "lora_bias", "lora_variant", "train_head")
# What a checkpoint's tensors and states hold: it cannot be changed between two steps.
_KEPT = {
    *("pooling", "lora_init", "head_init", "head_penalty", "optim", "optim_args", "optim_target_modules"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "head_learning_rate", "lora_plus_ratio", *_LORA),
}
ALLOWED = (
    "data",
    "labels",
    "base",
    "precision",
    "processes",
    *(name for name in SETTINGS if name not in _KEPT),
)


def parse_allowed(names: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names in a text with commas or in a list. Raises ValueError, with the nearest known one, for another."""
    words = [names] if isinstance(names, str) else names or ()
    found = tuple(name.strip() for word in words for name in word.split(",") if name.strip())
    for name in found:
        if name not in ALLOWED:
            hint = f"expected some of {', '.join(ALLOWED)}{nearest(name, ALLOWED)}"
            raise ValueError(f"allow_changed names what cannot be changed; got {name!r}; {hint}")
    return found


def settings_of(args: TrainingArguments) -> dict[str, Any]:
    """The settings that decide what is trained, as JSON has them."""
    found = {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
    if args.max_steps > 0:
        del found["num_train_epochs"]  # it has no effect
    return {**{name: _plain(value) for name, value in found.items()}, "processes": args.world_size}


def data_of(train: Any, validation: Any = None) -> dict[str, Any]:
    """The rows and digests of the data sets of a run, by the part that they play."""
    several = validation if isinstance(validation, Mapping) else {"validation": validation}
    parts = {"training": train, **several}
    return {name: digests(dataset) for name, dataset in parts.items() if dataset is not None}


def digests(dataset: Any) -> dict[str, Any]:
    """The number of rows and a sha256 of each column; for data that is made when it is read, the number alone.

    They do not depend on how the rows are stored. 100,000 texts take a tenth of a second.
    """
    rows = len(dataset) if isinstance(dataset, Sized) else None
    sums: dict[str, Any] = {}
    if isinstance(dataset, datasets.Dataset):
        for name in dataset.column_names:
            column = dataset.data.column(name)
            sums[name] = hashlib.sha256(str(column.type).encode())
            for batch in _batches(column, chosen_rows(dataset)):
                _add(sums[name].update, batch)
    elif isinstance(dataset, list | tuple):
        for name, value in (
            (name, value) for row in dataset if isinstance(row, Mapping) for name, value in row.items()
        ):
            sums.setdefault(name, hashlib.sha256()).update(repr(np.asarray(value).tolist()).encode())
    return {"rows": rows, "columns": {name: found.hexdigest() for name, found in sorted(sums.items())}}


def _batches(column: pa.ChunkedArray, chosen: pa.ChunkedArray | None) -> Iterator[Any]:
    """A column's values in order, a number at a time."""
    if chosen is not None:
        column = column.combine_chunks()  # rows are taken from one piece many times faster
    rows = len(column if chosen is None else chosen)
    for start in range(0, rows, _BATCH):
        part = (column if chosen is None else chosen).slice(start, _BATCH)
        part = part if chosen is None else column.take(part)
        yield part.combine_chunks() if isinstance(part, pa.ChunkedArray) else part


def _add(update: Callable[[bytes], None], column: Any) -> None:
    """Add the values of an Arrow array to a digest, whatever the buffers around them."""
    if isinstance(column, pa.ChunkedArray):
        for chunk in column.chunks:
            _add(update, chunk)
    elif kinds.is_list(column.type) or kinds.is_large_list(column.type):
        update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
        _add(update, column.flatten())
    elif (kinds.is_integer(column.type) or kinds.is_floating(column.type)) and not column.null_count:
        update(column.to_numpy(zero_copy_only=False).tobytes())
    else:
        update(repr(column.to_pylist()).encode())


def identity_of(trainer: Trainer) -> dict[str, Any]:
    """Everything by its name: `data`, `labels`, `base`, `pooling`, `precision`, LoRA's fields and the settings."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    info, lora = adapter_info(model), injection(model).config.to_dict()
    types = sorted({str(p.dtype).removeprefix("torch.") for p in base_parameters(model).values()})
    return {
        "data": data_of(trainer.train_dataset, trainer.eval_dataset),
        "labels": list(info.labels),
        "base": info.base_model.fingerprint,
        "pooling": info.pooling,
        "precision": ", ".join(types),
        **{name: lora[name.removeprefix("lora_")] for name in _LORA},
        **settings_of(trainer.args),
    }


def changes(checkpoint: Path, now: Mapping[str, Any], allowed: Iterable[str]) -> dict[str, str] | None:
    """What is another than in the run of a checkpoint, by name in words; None for a checkpoint that does not say.

    now: all of `identity_of` or a part. Raises ValueError for a change that is not among the allowed.
    """
    if not (checkpoint / FILE).is_file():
        return None
    place = str(checkpoint / FILE)
    was = parse_object(read_bytes(checkpoint, FILE, limit=MAX_JSON_BYTES), place)
    found = {name: words for name in now if name in was for words in _difference(name, was[name], now[name])}
    fixed = [name for name in found if name in _KEPT or (name == "labels" and _moved(was[name], now[name]))]
    refused = [name for name in found if name in fixed or name not in set(allowed)]
    if refused:
        advice = f"say that it is meant with --allow_changed {','.join(found)}"
        if fixed:
            advice = f"start without --resume_from_checkpoint: {', '.join(fixed)} cannot change within a run"
        raise ValueError(
            f"the checkpoint {str(checkpoint)!r} is of another run; got {'; '.join(found[name] for name in refused)}; "
            f"expected the same; go on with what it was trained with, or {advice}"
        )
    return found


def tell(checkpoint: Path, found: Mapping[str, str] | None) -> None:
    """Say that a checkpoint cannot be compared, or what has changed since, as was allowed."""
    if found is None:
        logger.warning(
            "%s does not say which data, base and settings it is of: not compared", checkpoint.name
        )
    elif found:
        logger.warning("going on from %s with %s", checkpoint.name, "; ".join(found.values()))


def _difference(name: str, was: Any, now: Any) -> Iterator[str]:
    """The difference in words, if there is one."""
    if name == "data":
        words = [text for part in now if part in was for text in _rows(part, was[part], now[part])]
        if words:
            yield f"data: {', '.join(words)}"
    elif was == now:
        return
    elif name == "base":
        yield f"base: weights with {str(now)[-12:]} (it has {str(was)[-12:]})"
    elif name == "labels":
        yield f"labels: {shortened(now)} (it has {shortened(was)})"
    else:
        yield f"{name}={shortened(now)} (it has {shortened(was)})"


def _rows(part: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if was["rows"] != now["rows"]:
        yield f"{now['rows']} {part} rows (it has {was['rows']})"
    elif was["columns"] != now["columns"]:
        names = sorted(set(was["columns"]) ^ set(now["columns"]))
        names = names or [name for name in now["columns"] if was["columns"][name] != now["columns"][name]]
        yield f"other {' and '.join(names)} in the {part} rows"


def _moved(was: Sequence[str], now: Sequence[str]) -> bool:
    """Whether outputs of the head would mean other labels than those that they were trained for."""
    same = [index for index, label in enumerate(now) if index < len(was) and was[index] == label]
    return len(was) != len(now) or len(same) < len(set(was) & set(now))


def _plain(value: Any) -> Any:
    """The value as JSON gives it back."""
    if isinstance(value, Enum):
        value = value.value
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def whole_checkpoint(wanted: str | bool, output: Path) -> str:
    """The checkpoint that is named, or with True the newest whole one of a run. Raises ValueError if there is none."""
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


def tell_broken(chosen: Path | None, broken: dict[Path, str]) -> None:
    """Say which newer checkpoints are passed over, and why."""
    for checkpoint, reason in broken.items():
        instead = f"going on from {chosen.name}" if chosen else "there is no whole one before it"
        logger.warning("%s is not whole (%s); %s", checkpoint.name, reason, instead)
