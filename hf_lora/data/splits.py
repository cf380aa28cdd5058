"""Which examples belong to which split: loading, holding out, and cutting to size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_lora._choices import unknown
from hf_lora.data.config import DataConfig
from hf_lora.data.files import read_path, read_table
from hf_lora.data.records import check_delimited
from hf_lora.tasks.labels import LabelScheme, are_hidden

ENCODED = "__labels__"  # the column of encoded labels, while the raw label column is still there

# How much is held out where nobody says how much.
ENOUGH_HELD_OUT, LEAST_HELD_OUT, MOST_HELD_OUT = 200, 0.1, 0.2
# Up to so many examples, train and validation, a fifth is held out.
FEW_EXAMPLES = round(ENOUGH_HELD_OUT / MOST_HELD_OUT)

# What the splits of Hub datasets are called, best name first (MNLI has two validation splits).
SPLIT_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "validation_matched", "dev"),
    "test": ("test",),
}


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Inside, `datasets` shows no progress bars; who calls us shows progress."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def load_splits(config: DataConfig, tables: Mapping[str, Any] | None = None) -> datasets.DatasetDict:
    """Return the raw splits that the data has, as `read_splits`."""
    return read_splits(config, tables)[0]


@without_progress_bars()
def read_splits(
    config: DataConfig, tables: Mapping[str, Any] | None = None
) -> tuple[datasets.DatasetDict, tuple[str, ...]]:
    """Return the raw splits under the names "train", "validation" and "test", and how each file was understood.

    tables: by those names, data in memory or paths, in place of the configuration's files. A DatasetDict under
    "train" brings all its splits; those that are given by themselves replace them.
    Raises ValueError: a file, table or data set cannot be read, has no examples or no split of the expected name.
    """
    sources, told = _sources(config, tables or {}), list[str]()
    if config.dataset_name:
        found = _load_from_hub(config)
    elif "train" in sources:
        found = _read(sources.pop("train"), "train", config, told)
    elif "test" in sources:
        found = datasets.DatasetDict()
    else:
        raise ValueError("no data given; expected a dataset_name, a train_file or a test_file")
    splits = _known_splits(found) if isinstance(found, dict) else datasets.DatasetDict(train=found)
    for split, source in sources.items():
        splits[split] = _one_split(_read(source, split, config, told), split, source)
    for split, dataset in splits.items():
        if len(dataset) == 0:
            raise ValueError(f"the {split} split is empty; expected at least one example")
    return splits, tuple(told)


def _sources(config: DataConfig, tables: Mapping[str, Any]) -> dict[str, Any]:
    """The file or the table of each split that has one."""
    files = {"train": config.train_file, "validation": config.validation_file, "test": config.test_file}
    sources: dict[str, Any] = {split: path for split, path in files.items() if path}
    for split, table in tables.items():
        if split not in files:
            raise unknown("split", split, files)
        other = sources.get(split) or (config.dataset_name if split == "train" else None)
        if other:
            raise ValueError(
                f"two sources of the {split} data; got {other!r} and a {type(table).__name__}; expected one"
            )
        sources[split] = table
    check_delimited(config.reading, [source for source in sources.values() if isinstance(source, str | Path)])
    return sources


def _load_from_hub(config: DataConfig) -> datasets.DatasetDict:
    try:
        return datasets.load_dataset(
            config.dataset_name,
            config.dataset_config_name,
            revision=config.dataset_revision,
            token=config.token,
            cache_dir=config.cache_dir,
        )
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"cannot load the dataset {config.dataset_name!r}: {reason}") from error


def _read(
    source: Any, split: str, config: DataConfig, told: list[str]
) -> datasets.Dataset | datasets.DatasetDict:
    if not isinstance(source, str | Path):
        return read_table(source, split)
    found, words = read_path(str(source), config.reading, cache_dir=config.cache_dir)
    told.append(words)
    return found


def _known_splits(found: Mapping[str, datasets.Dataset]) -> datasets.DatasetDict:
    best = {split: [name for name in names if name in found][:1] for split, names in SPLIT_NAMES.items()}
    return datasets.DatasetDict({split: found[name] for split, names in best.items() for name in names})


def _one_split(found: datasets.Dataset | datasets.DatasetDict, split: str, source: Any) -> datasets.Dataset:
    if isinstance(found, datasets.Dataset):
        return found
    known = _known_splits(found)
    if split in known:
        return known[split]
    if len(found) == 1:
        return next(iter(found.values()))
    name = source if isinstance(source, str | Path) else f"the {split} data"
    raise ValueError(f"{name} has no {split} split; its splits are {', '.join(found)}")


def without_hidden_test(
    raw: datasets.DatasetDict, label: str, *, asked_for: bool
) -> tuple[datasets.DatasetDict, tuple[str, ...]]:
    """Return the splits without a test split whose labels are all hidden, unless it was asked for, and a warning."""
    test = raw.get("test")
    if test is None or asked_for or label not in test.column_names or not are_hidden(test, label):
        return raw, ()
    kept = datasets.DatasetDict({split: dataset for split, dataset in raw.items() if split != "test"})
    return kept, (f"test: all {len(test):,} labels are hidden (-1); the split is left out",)


def held_out_fraction(config: DataConfig, examples: int, labels: int) -> float:
    """The share that is held out: what was asked for, or what is enough to choose and to calibrate by.

    That is 200 examples, between a tenth and a fifth of them all, and one of each label where there are many.
    """
    if config.validation_fraction is not None:
        return config.validation_fraction
    share = min(max(ENOUGH_HELD_OUT / max(1, examples), LEAST_HELD_OUT), MOST_HELD_OUT)
    return max(share, labels / max(1, examples)) if 2 * labels <= examples else share


def hold_out(
    dataset: datasets.Dataset, scheme: LabelScheme, config: DataConfig
) -> tuple[datasets.Dataset, datasets.Dataset, tuple[str, ...]]:
    """Return train, validation and warnings; single labels are stratified.

    The only example of a label stays in train.
    Raises ValueError: a part would be too small to hold every label.
    """
    if not scheme.task.one_label:
        fraction = held_out_fraction(config, len(dataset), 1)
        return *_split(dataset, config, fraction, by=None), ()
    encoded = np.asarray(dataset[ENCODED][:])
    counts = np.bincount(encoded, minlength=len(scheme.names))
    single, several = (np.flatnonzero(of_one) for of_one in (counts[encoded] == 1, counts[encoded] > 1))
    labels = int((counts > 1).sum())
    fraction = held_out_fraction(config, len(several), labels)
    held_out = math.ceil(fraction * len(several))
    if min(held_out, len(several) - held_out) < max(labels, 1):
        raise ValueError(
            f"validation_fraction {fraction} splits {len(several):,} examples into {len(several) - held_out:,} and "
            f"{held_out:,}; expected one or more for each of {labels:,} labels in both; change the "
            "fraction or give a validation_file"
        )
    splittable = dataset.select(several) if len(single) else dataset
    train, validation = _split(splittable, config, fraction, by=ENCODED)
    if not len(single):
        return train, validation, ()
    names = ", ".join(repr(scheme.names[index]) for index in np.flatnonzero(counts == 1)[:5])
    warning = f"train: {len(single):,} labels have a single example, not held out for validation: {names}"
    return datasets.concatenate_datasets([train, dataset.select(single)]), validation, (warning,)


def _split(
    dataset: datasets.Dataset, config: DataConfig, fraction: float, *, by: str | None
) -> tuple[Any, Any]:
    """Train and validation, stratified by a column."""
    if len(dataset) < 2:
        raise ValueError("the train split has one example; expected two or more, or a validation_file")
    held_out = math.ceil(fraction * len(dataset))
    parts = dataset.train_test_split(held_out, seed=config.split_seed, stratify_by_column=by)
    return parts["train"], parts["test"]


def subset(dataset: datasets.Dataset, split: str, config: DataConfig) -> datasets.Dataset:
    """Return the first examples up to the split's limit; those of the training split after a shuffle."""
    name = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_test_samples"}[split]
    limit = getattr(config, name)
    if limit is None or limit >= len(dataset):
        return dataset
    return (dataset.shuffle(seed=config.split_seed) if split == "train" else dataset).select(range(limit))
