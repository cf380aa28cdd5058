"""Sweeps over ranks and projections, and learning curves: grids of runs, trained and summed up."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_lora._files import reserved
from hf_lora.lora.config import LoRAConfig
from hf_lora.lora.inject import inject_lora, remove_lora, trainable_parameter_count
from hf_lora.models.loading import meta_classifier
from hf_lora.recipe.grid import RECORD, TEST, VALIDATION, Grid, Variant
from hf_lora.recipe.progress import Progress, data_facts, progress_of
from hf_lora.recipe.results import METRICS, PREFIXES
from hf_lora.recipe.settings import Recipe, with_data
from hf_lora.recipe.sweep_report import FORMATS, LINES, SIZE, Curve, Report, Sweep, write_report
from hf_lora.tasks import Task

SWEEP, CURVE = "a sweep", "a curve"
# Options that a grid sets itself or cannot give to its runs, and what to do instead.
_INSTEAD = {
    SWEEP: {
        "lora_rank": "use --ranks",
        "lora_projections": "use --projections",
        "lora_target_modules": "use --projections",
    },
    CURVE: {"few_shot": "use --shots", "max_train_samples": "use --shots"},
}


def sweep(
    model: str,
    train: Any = None,
    validation: Any = None,
    test: Any = None,
    *,
    output_dir: str | Path,
    ranks: Sequence[int] = (1, 2, 4, 8),
    projections: Sequence[str] = ("q", "v", "qv", "qkvo"),
    seeds: int = 3,
    metric: str | None = None,
    progress: Progress | bool | None = None,
    **settings: Any,
) -> Sweep:
    """Train every rank with every set of projections and every seed: what `hf-lora sweep` does.

    model, train, validation, test, progress, settings: as of `finetune`; the setting `seed` is the first seed, and
    the one that the data are split with. metric: what is compared on the validation data.
    Runs that are done are used as they are. `finetune(..., **result.smallest.options)` trains what was chosen.
    """
    splits = {"train": train, "validation": validation, "test": test}
    settings, tables = with_data(settings, model, splits, output_dir)
    grid = sweep_grid(settings, ranks, projections, seeds, tables)
    return run_sweep(grid, metric, progress_of(progress))


def learning_curve(
    model: str,
    train: Any = None,
    validation: Any = None,
    test: Any = None,
    *,
    output_dir: str | Path,
    shots: Sequence[int | None] = (8, 32, 128, None),
    seeds: int = 3,
    metric: str | None = None,
    progress: Progress | bool | None = None,
    **settings: Any,
) -> Curve:
    """Train on so many examples of each label (None: on all) with every seed: what `hf-lora curve` does.

    model, train, validation, test, progress, settings: as of `finetune`; the setting `seed` is the first seed. Each
    seed draws examples of its own, unless `split_seed` fixes one draw. All runs are measured on the same test data,
    or validation data; where there are only training data, a test part is held out first.
    """
    splits = {"train": train, "validation": validation, "test": test}
    settings, tables = with_data(settings, model, splits, output_dir)
    grid = curve_grid(settings, shots, seeds, tables)
    return run_curve(grid, metric, progress_of(progress))


def refuse(names: Container[str], what: str) -> None:
    """Raise ValueError for options that `what`, a sweep or a curve, cannot take. names: those that are given."""
    instead = _INSTEAD[what] | {
        "resume_from_checkpoint": f"leave it out: {what} goes on by itself",
        "accelerate_config": f"{what} trains in one process",
        "push_to_hub": "push the adapter you choose with hf-lora push",
    }
    for name, words in instead.items():
        if name in names:
            raise ValueError(f"--{name} is not for {what}; {words}")


def sweep_grid(
    settings: Mapping[str, Any],
    ranks: Sequence[int],
    projections: Sequence[str],
    seeds: int,
    tables: Mapping[str, Any] | None = None,
) -> Grid:
    """The runs of a sweep: every rank with every set of projections."""
    refuse(settings, SWEEP)
    _check_numbers("ranks", ranks, "whole numbers above 0, such as 1,2,4,8")
    letters = [LoRAConfig(projections=word).projections for word in projections]
    _check_once("projections", letters)
    variants = [
        Variant(
            f"rank-{rank}-{word}",
            {"lora_rank": rank, "lora_projections": word},
            {"rank": rank, "projections": word},
        )
        for word in letters
        for rank in ranks
    ]
    return Grid(SWEEP, variants, seeds, settings, tables, draws=False)


def curve_grid(
    settings: Mapping[str, Any],
    shots: Sequence[int | None],
    seeds: int,
    tables: Mapping[str, Any] | None = None,
) -> Grid:
    """The runs of a learning curve, in the order of their sizes; None: all examples."""
    refuse(settings, CURVE)
    _check_numbers("shots", shots, "whole numbers above 0 and 'all', such as 8,32,128,all")
    ordered = sorted(shots, key=lambda number: (number is None, number))
    variants = [
        Variant(f"shots-{number or 'all'}", {"few_shot": number}, {"shots": str(number or "all")})
        for number in ordered
    ]
    return Grid(CURVE, variants, seeds, settings, tables, draws=True)


def _check_numbers(name: str, values: Sequence[Any], expected: str) -> None:
    words = ["all" if value is None else str(value) for value in values]
    usable = [(isinstance(v, int) and v > 0) or (v is None and "all" in expected) for v in values]
    if not usable or not all(usable):
        raise ValueError(f"{name} are not usable; got {','.join(words)!r}; expected {expected}")
    _check_once(name, words)


def _check_once(name: str, words: Sequence[str]) -> None:
    for word in words:
        if words.count(word) > 1:
            raise ValueError(f"{name} has {word} twice; got {','.join(words)!r}; expected each once")


def lora_parameters(grid: Grid) -> dict[str, int]:
    """The parameters of each variant of a sweep without the head, counted on a model without weights.

    Raises ValueError where the model has no such projections.
    """
    model, counts = grid.base.model, {}
    empty = meta_classifier(model.model_name_or_path, **model.place)
    for variant in grid.variants:
        lora = Recipe.from_settings({**grid.settings, **variant.options}, tables=grid.tables).lora
        assert lora is not None
        inject_lora(empty, lora)
        counts[variant.name] = trainable_parameter_count(empty).lora
        remove_lora(empty)
    return counts


def run_sweep(grid: Grid, metric: str | None, progress: Progress) -> Sweep:
    """Train the runs that are not done; write and return what all have measured."""
    return _run(grid, Sweep, metric, progress)


def run_curve(grid: Grid, metric: str | None, progress: Progress, picture: Path | None = None) -> Curve:
    """Train the runs that are not done; write and return what all have measured. picture: where it goes."""
    if picture is not None and picture.suffix.lower() not in FORMATS:
        expected = f"a file ending in {', '.join(FORMATS)}"
        raise ValueError(f"plot is no picture; got {str(picture)!r}; expected {expected}")
    return _run(grid, Curve, metric, progress, picture)


def _run(
    grid: Grid, kind: type[Report], metric: str | None, progress: Progress, picture: Path | None = None
) -> Report:
    # Before anything is trained: a projection that the model does not have is a mistake of the user.
    counts = lora_parameters(grid) if kind is Sweep else {}
    with reserved(grid.output):
        data, config = grid.data_of(grid.runs[0]), grid.base.data
        metric = choose_metric(metric, data.task)
        for topic, text in data_facts(data):
            progress.fact(topic, text)
        split = TEST if kind is Curve and TEST in data.splits else VALIDATION
        key = f"{PREFIXES[split]}_{metric}"
        grid.train_missing(key, progress)
        keys = {VALIDATION: key, TEST: f"test_{metric}"}
        if kind is Curve:
            keys = {name: key + ending for name, ending in LINES.items()}
        points = []
        for variant in grid.variants:
            runs = grid.runs_of(variant)
            facts: dict[str, float]
            if kind is Sweep:
                trainable = runs[0].read(METRICS)[SIZE]
                facts = {"lora_parameters": counts[variant.name], SIZE: trainable}
            else:
                examples = [run.read(RECORD)["examples"] for run in runs]
                held_out = fmean(entry["validation"] * data.held_out for entry in examples)
                facts = {"examples": fmean(entry["train"] for entry in examples) + held_out}
                facts["held_out"] = held_out
            points.append(grid.point(variant, keys, facts))
        found = kind(
            metric=metric,
            split=split,
            measured_on=len(data.splits[split]),
            data=config.dataset_name or "/".join(Path(config.train_file or "").parts[-2:]),
            model=grid.base.model.model_name_or_path,
            seeds=grid.seeds,
            points=points,
        )
        return write_report(found, grid.output, picture)


def choose_metric(wanted: str | None, task: Task) -> str:
    """The metric that is compared. Raises ValueError for one that is not measured for these labels."""
    names = ["loss", *task.metric_names, *["rmse"] * ("mse" in task.metric_names)]
    name = (wanted or task.metric_names[0]).removeprefix("eval_").removeprefix("test_")
    if name not in names:
        raise ValueError(
            f"the metric is not measured for these labels; got {name!r}; expected one of {', '.join(names)}"
        )
    return name
