"""Batches of examples of similar length: a fixed number of them, or as many as a budget of tokens holds.

The batches of an epoch follow from the lengths, the seed and the epoch alone. Every process draws the same epoch and
takes its own share, so nothing is sent, and a resumed run draws what the interrupted one drew. A step is one batch
for each of the `shards` processes. Evaluation takes the longest examples first and gives rows back in their order.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import EvalPrediction, Trainer, TrainingArguments

from hf_lora.data.collation import is_stream
from hf_lora.training._trainer_hooks import chosen_rows

Step = list[list[int]]  # for each process the indices of its batch

# Padding hardly falls further when more batches than these are sorted together, and randomness does.
_SORTED_TOGETHER = 50


class GroupByLength:
    """Batches of `batch_size` examples of similar length: `steps` of them, of other examples in each epoch.

    A random permutation is cut into parts, each part is sorted by length and cut into steps, and all steps are
    shuffled: sorted steps would pull the weights towards long examples first, then short ones. The last step may be
    smaller. Every example comes once; with `drop_last`, those that fill no step are left out, others in each epoch.
    With a `batch_size` of 1, or fewer examples than processes, a few come twice: every process needs a batch.
    """

    def __init__(
        self, lengths: np.ndarray, batch_size: int, shards: int = 1, drop_last: bool = False
    ) -> None:
        self.lengths, self._shards = lengths, shards
        full, rest = divmod(len(lengths), batch_size * shards)
        sizes = [batch_size * shards] * full
        if rest and not drop_last:
            # Too few for one example on each process: the step before gives some away.
            if rest < shards and full and batch_size > 1:
                sizes[-1] -= shards - rest
            sizes.append(max(rest, shards))
        self._sizes = np.array(sizes, dtype=np.int64)
        self.steps = len(sizes)

    def draw(self, rng: np.random.Generator) -> list[Step]:
        """The steps of one epoch, in a random order."""
        order = np.resize(rng.permutation(len(self.lengths)), self._sizes.sum())
        steps: list[np.ndarray] = []
        # In a random order, so that the smaller step may be of any length.
        for sizes in np.array_split(rng.permutation(self._sizes), _parts(self.steps)):
            part, order = np.split(order, [sizes.sum()])
            # Stable, so that the random permutation decides between equal lengths.
            part = part[np.argsort(-self.lengths[part], kind="stable")]
            steps += np.split(part, np.cumsum(sizes)[:-1])
        drawn = (steps[index] for index in rng.permutation(self.steps))
        return [[step[rank :: self._shards].tolist() for rank in range(self._shards)] for step in drawn]


class TokenBudget:
    """Batches whose rows times the longest row are at most `budget` tokens, always in the same number.

    The examples sorted by length are dealt like cards: of each run of as many neighbours as there are parts, every
    part gets a random one. So all parts have nearly the same lengths in every epoch, and one partition, made for the
    longest that each place can get, fits them all. The number of batches, and so the schedule of the learning rate,
    is fixed, while an example meets others in each epoch. Where a batch begins varies as well, see `_cuts`.

    Each process takes one part. Every example comes once. Only where not even two short examples fit into a batch may
    too few be left for a step of all processes: they are left out with `drop_last`, and otherwise a few come twice.
    Raises ValueError for an example longer than the budget.
    """

    def __init__(self, lengths: np.ndarray, budget: int, shards: int = 1, drop_last: bool = False) -> None:
        # An empty example is no reason to divide by zero.
        ordered = np.sort(np.maximum(lengths, 1))[::-1]
        if ordered[0] > budget:
            raise ValueError(
                f"max_tokens_per_batch is too small; got {budget}; expected at least {ordered[0]}, the tokens of "
                "the longest example; raise it, or cut the texts shorter (max_seq_length)"
            )
        self.lengths, self._shards = lengths, shards
        self._parts = shards * _parts(math.ceil(len(_starts(ordered, budget)) / shards))
        # The longest example that a part can have at each of its places.
        self._bounds = ordered[:: self._parts]
        count = len(_starts(self._bounds, budget))
        lowest = bisect_left(
            range(budget + 1), -count, lo=ordered[0], key=lambda b: -len(_starts(self._bounds, b))
        )
        self._dealt, self.steps = len(lengths), self._parts // shards * count
        left = len(lengths) % self._parts
        pair = 2 * int(self._bounds[-2]) if len(self._bounds) > 1 else math.inf
        # Some parts lack the last place: where two places fit into a batch, the last batch gets two.
        self._last_pair = left > 0 and pair <= budget
        if self._last_pair:
            lowest = max(lowest, int(pair))
        elif left:
            # Every batch is one example, and the parts that lack the last place have a batch less.
            given = left - left % shards if drop_last else left + -left % shards
            self._dealt += given - left
            self.steps -= (self._parts - given) // shards
        self._budgets = (lowest, (lowest + budget) // 2)

    def draw(self, rng: np.random.Generator) -> list[Step]:
        """The steps of one epoch, in a random order."""
        groups = np.split(self._deal(rng), self._parts // self._shards, axis=1)
        batches = [batch for parts in groups for batch in np.split(parts, self._cuts(rng))]
        steps = [[column[column >= 0].tolist() for column in batch.T] for batch in batches]
        steps = [step for step in steps if step[0]]
        return [steps[index] for index in rng.permutation(len(steps))]

    def _deal(self, rng: np.random.Generator) -> np.ndarray:
        """The examples `(places, parts)`, the longest first; -1 where a part has no example."""
        size = len(self.lengths)
        order = np.lexsort((rng.random(size), -self.lengths))  # equal lengths in a random order
        if self._dealt < size:
            order = order[np.sort(rng.permutation(size)[: self._dealt])]
        order = np.append(order, np.resize(rng.permutation(order), max(0, self._dealt - size)))
        whole = len(order) - len(order) % self._parts
        dealt = np.full((len(self._bounds), self._parts), -1)
        dealt[: whole // self._parts] = rng.permuted(order[:whole].reshape(-1, self._parts), axis=1)
        dealt[-1, : len(order) - whole] = rng.permutation(order[whole:])
        return dealt

    def _cuts(self, rng: np.random.Generator) -> list[int]:
        """Where the batches of a part begin, without the first: random, and always as many.

        Every budget from the smallest that needs no more batches up to the given one gives as many. The smallest fills
        all batches equally, the given one leaves a small batch at the end: the draw is from the lower half.
        """
        low, high = self._budgets
        cuts = _starts(self._bounds, int(rng.integers(low, high + 1)))[1:]
        if cuts and self._last_pair:
            cuts[-1] = min(cuts[-1], len(self._bounds) - 2)
        return cuts


class EpochBatches(Sampler[list[int]]):
    """A batch sampler: the batches of one process, drawn from a plan by seed and epoch."""

    def __init__(self, plan: GroupByLength | TokenBudget, seed: int, rank: int = 0) -> None:
        self.plan, self.seed, self.rank, self.epoch = plan, seed, rank, 0

    @property
    def sampler(self) -> EpochBatches:
        """Itself: here accelerate looks for `set_epoch` when it skips the first batches of a resumed epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Draw the batches of this epoch, from 0, from now on; Trainer and accelerate call it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.plan.steps

    def __iter__(self) -> Iterator[list[int]]:
        steps = self.plan.draw(np.random.default_rng((self.seed, self.epoch)))
        if steps and self.epoch == 0:
            # The longest batch comes first of all: if memory runs out, it does so at once.
            longest = [max(self.plan.lengths[batch].max() for batch in step) for step in steps]
            steps.insert(0, steps.pop(int(np.argmax(longest))))
        return (step[self.rank] for step in steps)


def token_lengths(dataset: Any) -> np.ndarray | None:
    """The number of `input_ids` of each example; None for data without them, of unknown size or empty."""
    if is_stream(dataset) or not len(dataset):
        return None
    # A transform that runs at reading may change what the column holds.
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom":
        if "input_ids" not in dataset.column_names:
            return None
        lengths = pc.list_value_length(dataset.data.column("input_ids"))
        # A selection or a shuffle lies beside the columns; read through it, a row costs ten microseconds.
        if (chosen := chosen_rows(dataset)) is not None:
            lengths = lengths.take(chosen)
        return lengths.to_numpy().astype(np.int64)
    found = []
    rows: Any = dataset
    for row in map(rows.__getitem__, range(len(dataset))):
        if not isinstance(row, Mapping) or "input_ids" not in row:
            return None
        found.append(len(row["input_ids"]))
    return np.array(found, dtype=np.int64)


def _parts(steps: int) -> int:
    """Into how many parts, each sorted by itself, an epoch of so many steps is cut."""
    # A small set has at least two (or its batches would never change), four if these are of four steps or more.
    return max(1, min(steps, max(2, min(4, steps // 4), math.ceil(steps / _SORTED_TOGETHER))))


def _starts(ordered: np.ndarray, budget: int) -> list[int]:
    """Where the batches begin if each takes as many examples of falling length as fit: the fewest batches."""
    starts = [0]
    while (following := starts[-1] + budget // int(ordered[starts[-1]])) < len(ordered):
        starts.append(following)
    return starts


def by_length(args: TrainingArguments) -> bool:
    """Whether batches are to hold examples of similar length."""
    has_budget = getattr(args, "max_tokens_per_batch", None) is not None
    return has_budget or args.train_sampling_strategy == "group_by_length"


def training_plan(trainer: Trainer) -> GroupByLength | TokenBudget | None:
    """The plan of a Trainer's batches; None where stock Trainer makes them. ValueError: a budget but no lengths."""
    args, data, accelerator = trainer.args, trainer.train_dataset, trainer.accelerator
    budget = getattr(args, "max_tokens_per_batch", None)
    if not by_length(args) or data is None:
        return None
    # Otherwise a batch is not one process's own: accelerate sends or cuts it, or several processes read it.
    one_each = not (accelerator.split_batches or accelerator.dispatch_batches) and (
        trainer.get_tp_size() == trainer.get_cp_size() == trainer.get_sp_size() == 1
    )
    lengths, options = token_lengths(data) if one_each else None, (args.world_size, args.dataloader_drop_last)
    if budget is None:
        return None if lengths is None else GroupByLength(lengths, trainer._train_batch_size, *options)
    if lengths is None:
        raise ValueError(
            f"max_tokens_per_batch needs the lengths of all examples; got {type(data).__name__}; expected a data set "
            "of known size with input_ids, and one batch for each process; set per_device_train_batch_size instead"
        )
    return TokenBudget(lengths, budget, *options)


class LongestFirst(Sampler[int]):
    """A sampler of all examples by falling length; `order` holds their indices."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.order = np.argsort(-lengths, kind="stable")

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order.tolist())


def order_of(loader: DataLoader[Any]) -> np.ndarray | None:
    """The order in which a loader prepared by accelerate reads its data set, if a `LongestFirst` gives it."""
    batches = getattr(loader, "batch_sampler", None)
    # With several processes, accelerate wraps it in its own.
    sampler = getattr(getattr(batches, "batch_sampler", batches), "sampler", None)
    return sampler.order if isinstance(sampler, LongestFirst) else None


def restored(values: Any, order: np.ndarray) -> Any:
    """Arrays (or nested tuples, lists and dicts of them) whose rows come in `order`, in the data set's order."""

    def in_order(rows: np.ndarray) -> np.ndarray:
        return rows[np.argsort(order)]

    return recursively_apply(in_order, values, test_type=lambda value: isinstance(value, np.ndarray))


def metrics_in_order(
    compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None, order: np.ndarray
) -> Callable[[EvalPrediction], dict[str, Any]] | None:
    """`compute_metrics` on rows in the data set's order: it may look up what else it knows of a row."""
    if compute_metrics is None:
        return None

    def compute(prediction: EvalPrediction) -> dict[str, Any]:
        names = ("predictions", "label_ids", "inputs", "losses")
        values = {name: getattr(prediction, name) for name in names}
        return compute_metrics(EvalPrediction(**restored(values, order)))

    return compute


def weighted_loss(
    model: nn.Module, inputs: dict[str, Any], weights: Tensor, smoothing: float
) -> tuple[Tensor, Any]:
    """The mean over the examples of weight times loss, and the model's outputs; single labels are smoothed."""
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    logits = outputs["logits"].float()
    weights = weights.to(logits.device, torch.float32)
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels.float(), weight=weights), outputs
    losses = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    # torch's own weight= divides by the weights in the batch: a rare example would rule the batch it is in.
    return (weights[labels] * losses).mean(), outputs
