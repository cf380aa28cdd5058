"""Sweeps over ranks and projections, and learning curves: grids of runs, trained and summed up."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_lora._choices import unknown
from hf_lora._files import reserved
from hf_lora.lora.config import LoRAConfig
from hf_lora.lora.inject import inject_lora, remove_lora, trainable_parameter_count
from hf_lora.models.loading import meta_classifier
from hf_lora.recipe.grid import RECORD, TEST, VALIDATION, Grid, Point
from hf_lora.recipe.progress import Progress, data_facts, progress_of
from hf_lora.recipe.results import METRICS, PREFIXES
from hf_lora.recipe.settings import Recipe, with_data
from hf_lora.recipe.sweep_report import FORMATS, LINES, SIZE, Curve, Report, Sweep, write_report
from hf_lora.tasks import Task
from hf_lora.training.arguments import result_names

# Options that a grid sets itself or cannot give to its runs, and what to do instead.
_INSTEAD = {
    Sweep: {
        "lora_rank": "use --ranks",
        "lora_projections": "use --projections",
        "lora_target_modules": "use --projections",
    },
    Curve: {"few_shot": "use --shots", "max_train_samples": "use --shots"},
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
    settings, tables = with_data(settings, model, output_dir, train=train, validation=validation, test=test)
    grid = sweep_grid(settings, ranks, projections, seeds, tables)
    return train_grid(grid, metric, progress_of(progress))


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
    settings, tables = with_data(settings, model, output_dir, train=train, validation=validation, test=test)
    grid = curve_grid(settings, shots, seeds, tables)
    return train_grid(grid, metric, progress_of(progress))


def refuse(names: Container[str], kind: type[Sweep | Curve]) -> None:
    """Raise ValueError for options that a sweep or a curve cannot take. names: those that are given."""
    what = f"a {kind.__name__.lower()}"
    instead = _INSTEAD[kind] | {
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
) -> Grid[Sweep]:
    """The runs of a sweep: every rank with every set of projections."""
    refuse(settings, Sweep)
    _check("ranks", ranks, "whole numbers above 0, such as 1,2,4,8")
    letters = [LoRAConfig(projections=word).projections for word in projections]
    _check("projections", letters)
    points = [
        Point(
            f"rank-{rank}-{word}",
            {"lora_rank": rank, "lora_projections": word},
            {"rank": rank, "projections": word},
        )
        for word in letters
        for rank in ranks
    ]
    return Grid(Sweep, points, seeds, settings, tables, draws=False)


def curve_grid(
    settings: Mapping[str, Any],
    shots: Sequence[int | None],
    seeds: int,
    tables: Mapping[str, Any] | None = None,
) -> Grid[Curve]:
    """The runs of a learning curve, in the order of their sizes; None: all examples."""
    refuse(settings, Curve)
    _check("shots", shots, "whole numbers above 0 and 'all', such as 8,32,128,all")
    points = [
        Point(f"shots-{number or 'all'}", {"few_shot": number}, {"shots": str(number or "all")})
        for number in sorted(shots, key=lambda number: (number is None, number))
    ]
    return Grid(Curve, points, seeds, settings, tables, draws=True)


def _check(name: str, values: Sequence[Any], expected: str = "") -> None:
    """Raise ValueError for a value that stands twice, and for one that is none of the numbers expected, if any are."""
    words = ["all" if value is None else str(value) for value in values]
    usable = [(isinstance(v, int) and v > 0) or (v is None and "all" in expected) for v in values]
    if expected and not (usable and all(usable)):
        raise ValueError(f"{name} are not usable; got {','.join(words)!r}; expected {expected}")
    for word in words:
        if words.count(word) > 1:
            raise ValueError(f"{name} has {word} twice; got {','.join(words)!r}; expected each once")


def lora_parameters(grid: Grid[Any]) -> dict[str, int]:
    """The parameters of each point of a sweep without the head, counted on a model without weights.

    Raises ValueError where the model has no such projections.
    """
    model, counts = grid.base.model, {}
    empty = meta_classifier(model.model_name_or_path, **model.place)
    for point in grid.points:
        lora = Recipe.from_settings({**grid.settings, **point.options}, tables=grid.tables).lora
        assert lora is not None
        inject_lora(empty, lora)
        counts[point.name] = trainable_parameter_count(empty).lora
        remove_lora(empty)
    return counts


def train_grid(
    grid: Grid[Report], metric: str | None, progress: Progress, picture: Path | None = None
) -> Report:
    """Train the runs that are not done; write and return what all have measured. picture: where it goes."""
    if picture is not None and picture.suffix.lower() not in FORMATS:
        expected = f"a file ending in {', '.join(FORMATS)}"
        raise ValueError(f"plot is no picture; got {str(picture)!r}; expected {expected}")
    is_sweep = grid.kind is Sweep
    # Before anything is trained: a projection that the model does not have is a mistake of the user.
    counts = lora_parameters(grid) if is_sweep else {}
    with reserved(grid.output):
        data, config = grid.data_of(grid.runs[0]), grid.base.data
        metric = choose_metric(metric, data.task)
        for topic, text in data_facts(data):
            progress.fact(topic, text)
        split = TEST if not is_sweep and TEST in data.splits else VALIDATION
        key = f"{PREFIXES[split]}_{metric}"
        grid.train_missing(key, progress)
        keys = {name: key + ending for name, ending in LINES.items()}
        if is_sweep:
            keys = {VALIDATION: key, TEST: f"test_{metric}"}
        points = []
        for point in grid.points:
            runs = [run for run in grid.runs if run.point is point]
            examples = [run.read(RECORD)["examples"] for run in runs]
            held_out = fmean(entry["validation"] * data.held_out for entry in examples)
            facts = {"examples": fmean(entry["train"] for entry in examples) + held_out, "held_out": held_out}
            if is_sweep:
                facts = {"lora_parameters": counts[point.name], SIZE: runs[0].read(METRICS)[SIZE]}
            points.append(grid.measured(point, keys, facts))
        found = grid.kind(
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
    names = ["loss", *result_names(task)]
    name = (wanted or task.metric_names[0]).removeprefix("eval_").removeprefix("test_")
    if name not in names:
        raise unknown("metric for these labels", name, names)
    return name
