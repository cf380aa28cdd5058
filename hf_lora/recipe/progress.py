"""What a run tells while it goes on: an object that a display overrides, called with the Trainer's events."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from hf_lora.data import ClassificationData

# Of more labels than these the counts are not listed.
_MANY = 8
_NO_SCORE = ("loss", "_runtime", "_per_second", "preparation_time")


class Progress:
    """Told what a run does; every method does nothing, and a display overrides what it shows.

    Only the first process of a run tells anything.
    """

    def fact(self, topic: str, text: str) -> None:
        """Something that was understood or decided, such as ("data", "train 320, validation 80")."""

    def begin(self, stage: str) -> None:
        """A stage begins, such as "features" or "epoch 2/3"; the one before has ended."""

    def advance(self, done: int, total: int) -> None:
        """So many batches of the stage are done, of so many as are known."""

    def end(self) -> None:
        """No stage goes on any more."""

    def evaluated(self, epoch: float, metrics: Mapping[str, float]) -> None:
        """The validation split was evaluated; metrics by name, the training loss as `train_loss`."""


class Lines(Progress):
    """Facts, stages and evaluations as plain lines. write: what takes a line, such as `print`."""

    def __init__(self, write: Callable[[str], Any] = print) -> None:
        self._write = write
        self._told: set[str] = set()

    def fact(self, topic: str, text: str) -> None:
        """One line."""
        self._write(f"{topic}: {text}")

    def begin(self, stage: str) -> None:
        """One line for a kind of stage: not for every epoch, nor for the evaluations between them."""
        kind = stage.split()[0]
        if kind not in self._told | {"validation"}:
            self._write(f"{stage} ...")
        self._told.add(kind)

    def evaluated(self, epoch: float, metrics: Mapping[str, float]) -> None:
        """One line."""
        self._write(evaluation_line(epoch, metrics))


def progress_of(progress: Progress | bool | None) -> Progress:
    """What the argument `progress` of a function means: True: printed lines; False and None: nothing."""
    return Lines() if progress is True else progress or Progress()


def evaluation_line(epoch: float, metrics: Mapping[str, float]) -> str:
    """An evaluation in one line: the losses, then two metrics."""
    losses = [("training loss", "train_loss"), ("validation loss", "loss")]
    shown = [f"{words} {metrics[name]:.4f}" for words, name in losses if name in metrics]
    others = [name for name in metrics if not name.endswith(_NO_SCORE)][:2]
    shown += [f"{name.replace('_', ' ')} {metrics[name]:.4f}" for name in others]
    return f"epoch {epoch:g}: {', '.join(shown)}"


def data_facts(data: ClassificationData) -> Iterator[tuple[str, str]]:
    """What was understood of the data: the task, labels with counts, splits, and what is cut."""
    report = data.report
    counts, columns = report.label_counts.get("train", {}), " and ".join(map(repr, data.text_columns))
    labels = f"; labels {', '.join(f'{name} {count:,}' for name, count in counts.items())}" if counts else ""
    if len(counts) > _MANY:
        labels = f"; {len(counts)} labels of {min(counts.values()):,} to {max(counts.values()):,} examples"
    for words in data.files:
        yield "file", words
    pair = "pairs of " * (len(data.text_columns) > 1)
    yield "task", f"{data.task.words} of {pair}{columns}{labels}"
    if data.why:
        yield "reason", data.why
    splits = [f"{split} {examples:,}" for split, examples in report.examples.items()]
    yield "examples", ", ".join(splits) + "; validation is held out of train" * data.held_out
    longest, cut = max(report.longest.values()), sum(report.truncated.values())
    if cut:
        of_all = f"{cut:,} of {sum(report.examples.values()):,} texts are cut at {data.max_length} tokens"
        yield "lengths", f"{of_all}; the longest has {longest:,}; --max_seq_length sets another limit"
    else:
        yield "lengths", f"at most {longest:,} tokens; none is cut at {data.max_length}"


class _Events(TrainerCallback):
    """Turns the Trainer's events into calls of a Progress. training: a stage that all of a training is, or ""."""

    def __init__(self, progress: Progress, training: str) -> None:
        self._progress, self._training = progress, training
        self._loss: dict[str, float] = {}
        self._trains = False
        self._first = 0
        self.reset(staged=False)

    def reset(self, *, staged: bool) -> None:
        """A stage of predictions begins or ends."""
        self._staged = staged
        self._done = self._total = 0
        self._loader: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trains = True
        if self._training:
            self._progress.begin(self._training)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trains = False
        self._progress.end()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self._training:
            self._first = state.global_step
            self._progress.begin(f"epoch {int(state.epoch or 0) + 1}/{state.num_train_epochs}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        epochs = 1 if self._training else max(1, state.num_train_epochs)
        self._progress.advance(state.global_step - self._first, -(-state.max_steps // epochs))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """The last training loss goes into the next evaluation's line."""
        if logs and "loss" in logs:
            self._loss = {"train_loss": float(logs["loss"])}

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any
    ) -> None:
        """One batch of a pass over a data set more; the passes of a stage add up."""
        if not (self._trains or self._staged):
            return
        if eval_dataloader is not self._loader:
            if self._trains:
                self._progress.begin("validation")
                self._done = 0
            self._loader = eval_dataloader
            self._total = self._done + (len(eval_dataloader) if has_length(eval_dataloader) else 0)
        self._done += 1
        self._progress.advance(self._done, self._total)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        found = {name.removeprefix("eval_"): value for name, value in (metrics or {}).items()}
        found.pop("epoch", None)
        self.reset(staged=False)
        self._progress.evaluated(state.epoch or 0.0, self._loss | found)
        self._loss = {}


def attach(trainer: Trainer, progress: Progress, training: str = "") -> None:
    """Let a trainer tell `progress` in the place of its own bars and printed dictionaries.

    training: the name of the stage that all of its training is; "": every epoch is one.
    """
    for own in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(own)
    trainer.add_callback(_Events(progress, training))


@contextmanager
def stage(progress: Progress, name: str, trainer: Trainer) -> Iterator[None]:
    """Inside, a stage goes on, and the trainer's passes over data sets advance it."""
    events = [entry for entry in trainer.callback_handler.callbacks if isinstance(entry, _Events)]
    for entry in events:
        entry.reset(staged=True)
    progress.begin(name)
    try:
        yield
    finally:
        progress.end()
        for entry in events:
            entry.reset(staged=False)
