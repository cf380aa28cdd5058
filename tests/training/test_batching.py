from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from accelerate.data_loader import DataLoaderShard, skip_first_batches
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import EvalPrediction

from hf_lora.training._trainer_hooks import with_batches
from hf_lora.training.batching import (
    EpochBatches,
    GroupByLength,
    LongestFirst,
    Step,
    TokenBudget,
    metrics_in_order,
    order_of,
    restored,
    token_lengths,
)

WORLDS = [1, 2, 3]


def rng(epoch: int = 0) -> np.random.Generator:
    return np.random.default_rng((0, epoch))


def texts(size: int, longest: int = 64) -> np.ndarray:
    """Lengths as texts have them: many short, few long."""
    return np.clip(np.exp(rng().normal(2.8, 0.6, size)), 3, longest).astype(np.int64)


def examples(steps: list[Step]) -> list[int]:
    return [example for step in steps for batch in step for example in batch]


def batches(steps: list[Step]) -> list[list[int]]:
    return [batch for step in steps for batch in step]


def tokens(steps: list[Step], lengths: np.ndarray) -> int:
    """How many tokens all the batches have, padding included."""
    return sum(len(batch) * int(lengths[batch].max()) for batch in batches(steps))


def plans(lengths: np.ndarray, shards: int, drop_last: bool = False) -> list[GroupByLength | TokenBudget]:
    return [GroupByLength(lengths, 4, shards, drop_last), TokenBudget(lengths, 200, shards, drop_last)]


@pytest.mark.parametrize("shards", WORLDS)
@pytest.mark.parametrize("size", [12, 23, 24, 25, 97, 400])
def test_every_example_comes_once_in_every_epoch_and_on_every_process_in_every_step(
    size: int, shards: int
) -> None:
    for plan in plans(texts(size), shards):
        for epoch in range(5):
            steps = plan.draw(rng(epoch))
            assert len(steps) == plan.steps
            assert all(len(step) == shards and all(step) for step in steps)
            assert sorted(examples(steps)) == list(range(size))


@pytest.mark.parametrize("shards", WORLDS)
def test_epochs_have_other_batches_and_follow_from_their_number(shards: int) -> None:
    for plan in plans(texts(200), shards):
        first, second, again = (plan.draw(rng(epoch)) for epoch in (0, 1, 0))
        assert again == first
        # The same company of examples, in whatever order, comes again by chance only.
        companies = [{frozenset(batch) for batch in batches(steps)} for steps in (first, second)]
        assert len(companies[0] & companies[1]) < len(companies[0]) / 4


@pytest.mark.parametrize("shards", WORLDS)
def test_grouping_makes_the_number_of_steps_that_the_batch_size_tells(shards: int) -> None:
    for size in range(shards, 60):
        assert GroupByLength(texts(size), 4, shards).steps == -(-size // (4 * shards))
        assert GroupByLength(texts(size), 4, shards, drop_last=True).steps == size // (4 * shards)


@pytest.mark.parametrize("shards", WORLDS)
def test_dropping_the_last_batch_leaves_full_ones_and_other_examples_out_each_epoch(shards: int) -> None:
    plan = GroupByLength(texts(59), 4, shards, drop_last=True)
    left_out = set()
    for epoch in range(20):
        steps = plan.draw(rng(epoch))
        assert all(len(batch) == 4 for batch in batches(steps))
        missing = set(range(59)) - set(examples(steps))
        assert len(examples(steps)) + len(missing) == 59 and len(missing) == 59 % (4 * shards)
        left_out |= missing
    # 20 epochs leave out 3, 3 and 11 of 59 examples each.
    assert len(left_out) > 25


def test_a_budget_drops_nothing_in_one_process() -> None:
    assert sorted(examples(TokenBudget(texts(59), 200, drop_last=True).draw(rng()))) == list(range(59))


def test_groups_hold_little_padding() -> None:
    """1,000 lengths, 63 batches of 16: random ones have more padding than tokens, grouped ones a sixth."""
    lengths = texts(1000)
    shuffled = [[part.tolist()] for part in np.array_split(rng().permutation(1000), 63)]
    assert tokens(shuffled, lengths) > 2 * lengths.sum()
    assert tokens(GroupByLength(lengths, 16).draw(rng()), lengths) < 7 / 6 * lengths.sum()


@pytest.mark.parametrize("plan", [GroupByLength(texts(3200), 16), TokenBudget(texts(3200), 320)])
def test_the_order_of_the_batches_is_random(plan: GroupByLength | TokenBudget) -> None:
    """Parts that are sorted fall nearly everywhere; in a random order, every other batch is longer."""
    longest = [plan.lengths[batch].max() for batch in batches(plan.draw(rng()))]
    rises = np.diff(longest) > 0
    assert len(longest) > 150 and 0.4 < rises.mean() < 0.6


@pytest.mark.parametrize("plan", [GroupByLength, TokenBudget])
def test_no_two_examples_stay_together(plan: type) -> None:
    """All lengths differ, so that chance decides nothing but who is dealt with whom: four parts, one in four."""
    lengths = rng().permutation(np.arange(10, 410))
    made = plan(lengths, {GroupByLength: 16, TokenBudget: 3000}[plan])
    pairs = [
        {pair for batch in batches(made.draw(rng(epoch))) for pair in combinations(sorted(batch), 2)}
        for epoch in range(2)
    ]
    assert len(pairs[0] & pairs[1]) < 0.35 * len(pairs[0])


@pytest.mark.parametrize("shards", [2, 3])
def test_processes_have_equal_work_in_every_step(shards: int) -> None:
    # No two examples are equally long, so that the order by length is known.
    lengths = rng().permutation(np.arange(1, 401))
    for step in GroupByLength(lengths, 4, shards).draw(rng()):
        ordered = [sorted(lengths[batch], reverse=True) for batch in step]
        assert max(map(len, ordered)) - min(map(len, ordered)) <= 1
        # They take turns: the longest of each is longer than the second longest of all others.
        seconds = [batch[1] for batch in ordered if len(batch) > 1]
        assert not seconds or min(batch[0] for batch in ordered) > max(seconds)
    plan = TokenBudget(texts(400), 200, shards)
    for step in plan.draw(rng()):
        assert max(map(len, step)) - min(map(len, step)) <= 1
        longest = [plan.lengths[batch].max() for batch in step]
        # Cards of one deal: neighbours in the sorted list of which each process gets one.
        assert max(longest) <= 1.2 * min(longest) + 2


@pytest.mark.parametrize("shards", WORLDS)
@pytest.mark.parametrize("budget", [64, 100, 128, 500, 100_000])
def test_no_batch_is_above_the_budget(budget: int, shards: int) -> None:
    lengths = texts(300)
    plan = TokenBudget(lengths, budget, shards)
    for epoch in range(5):
        steps = plan.draw(rng(epoch))
        assert len(steps) == plan.steps
        assert all(len(batch) * lengths[batch].max() <= budget for batch in batches(steps))


@pytest.mark.parametrize("shards", WORLDS)
def test_sets_and_budgets_of_any_size_fit(shards: int) -> None:
    """Twice the longest example and more: nothing is left over, whatever the rest of the division by parts."""
    generator = rng()
    for size in range(3 * shards, 90):
        lengths = generator.integers(1, generator.integers(2, 40), size)
        budget = int(lengths.max() * generator.integers(2, 7))
        plan = TokenBudget(lengths, budget, shards)
        for epoch in range(3):
            steps = plan.draw(rng(epoch))
            assert len(steps) == plan.steps and all(all(step) for step in steps)
            assert sorted(examples(steps)) == list(range(size))
            assert all(len(batch) * lengths[batch].max() <= budget for batch in batches(steps))


def test_a_budget_is_filled() -> None:
    # 40 examples of 4 tokens and a budget of 40 tokens: ten examples a batch.
    steps = TokenBudget(np.full(40, 4), 40).draw(rng())
    assert [len(batch) for batch in batches(steps)] == [10, 10, 10, 10]
    # Texts of 17 tokens in the mean cannot do with fewer than all tokens over the budget.
    lengths = texts(5000)
    plan = TokenBudget(lengths, 1024)
    assert lengths.sum() / 1024 < plan.steps < 1.2 * lengths.sum() / 1024
    assert tokens(plan.draw(rng()), lengths) < 1.1 * lengths.sum()


def test_where_batches_begin_varies_with_the_epoch() -> None:
    """The sizes vary with the epoch, within the same number of batches."""
    plan = TokenBudget(texts(5000), 1024)
    sizes = [sorted(map(len, batches(plan.draw(rng(epoch))))) for epoch in range(2)]
    assert len(sizes[0]) == len(sizes[1]) and sizes[0] != sizes[1]


def test_a_budget_below_the_longest_example_is_refused() -> None:
    with pytest.raises(ValueError, match=r"too small; got 8; expected at least 9, .*; raise it, or cut"):
        TokenBudget(np.array([3, 9, 4]), 8)


def test_an_example_as_long_as_the_budget_is_a_batch() -> None:
    steps = TokenBudget(np.array([3, 9, 4, 4]), 9).draw(rng())
    assert [1] in batches(steps) and sorted(examples(steps)) == [0, 1, 2, 3]


@pytest.mark.parametrize("plan", [GroupByLength, TokenBudget])
@pytest.mark.parametrize(("size", "shards"), [(7, 2), (8, 3), (1, 3), (2, 3)])
def test_single_examples_that_fill_no_step_come_twice_or_are_dropped(
    plan: type, size: int, shards: int
) -> None:
    """Batches of one example: all processes take part in each step, as many as are needed twice."""
    lengths = np.full(size, 5)
    limit = {GroupByLength: 1, TokenBudget: 5}[plan]
    repeated = plan(lengths, limit, shards).draw(rng())
    assert set(examples(repeated)) == set(range(size))
    assert len(examples(repeated)) == size + -size % shards == shards * len(repeated)
    dropped = plan(lengths, limit, shards, drop_last=True)
    kept = examples(dropped.draw(rng()))
    assert len(kept) == len(set(kept)) == size - size % shards == shards * dropped.steps


def test_few_left_over_are_joined_by_examples_of_the_step_before() -> None:
    # Two processes, batches of 4, 9 examples: 8 and 1 would leave a process without a batch.
    sizes = sorted(tuple(map(len, step)) for step in GroupByLength(texts(9), 4, 2).draw(rng()))
    assert sizes == [(1, 1), (4, 3)]


@pytest.mark.parametrize("shards", WORLDS)
def test_the_samplers_of_all_processes_together_give_the_epoch(shards: int) -> None:
    for plan in plans(texts(97), shards):
        samplers = [EpochBatches(plan, seed=3, rank=rank) for rank in range(shards)]
        seen = []
        for epoch in (0, 1, 4):
            for sampler in samplers:
                sampler.set_epoch(epoch)
            drawn = [list(sampler) for sampler in samplers]
            assert (
                [len(part) for part in drawn]
                == [len(sampler) for sampler in samplers]
                == [plan.steps] * shards
            )
            counts = Counter(example for part in drawn for batch in part for example in batch)
            assert counts == dict.fromkeys(range(97), 1)
            assert drawn == [list(sampler) for sampler in samplers]
            seen.append(drawn)
        assert seen[0] != seen[1] != seen[2]


def test_the_epoch_arrives_through_a_loader_that_skips_batches() -> None:
    sampler = EpochBatches(GroupByLength(texts(97), 4), seed=3)
    sampler.set_epoch(2)
    expected = list(sampler)[5:]
    loader = with_batches(DataLoaderShard(range(97), collate_fn=list), EpochBatches(sampler.plan, seed=3))
    skipping = skip_first_batches(loader, 5)
    skipping.set_epoch(2)
    assert list(skipping) == expected
    assert len(loader) == 25 and list(loader) != list(sampler)
    loader.set_epoch(2)
    assert list(loader) == list(sampler)


def test_another_seed_gives_other_batches() -> None:
    plan = GroupByLength(texts(97), 4)
    assert list(EpochBatches(plan, seed=3)) != list(EpochBatches(plan, seed=4))


def test_the_longest_batch_is_the_very_first() -> None:
    lengths = texts(97)
    for plan in plans(lengths, 1):
        sampler = EpochBatches(plan, seed=3)
        assert lengths[next(iter(sampler))].max() == lengths.max()
        places = []
        for epoch in range(1, 9):
            sampler.set_epoch(epoch)
            longest = [lengths[batch].max() for batch in sampler]
            places.append(longest.index(lengths.max()))
        assert len(set(places)) > 2


TOKENS = [[7] * length for length in (3, 1, 4, 1, 5)]


class Rows:
    """A data set that is not of `datasets`."""

    def __init__(self, name: str = "input_ids") -> None:
        self.name = name

    def __len__(self) -> int:
        return len(TOKENS)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {self.name: TOKENS[index]}


def test_lengths_are_read_from_arrow_and_from_rows() -> None:
    dataset = Dataset.from_dict({"input_ids": TOKENS, "labels": [0] * 5})
    for source, expected in [
        (dataset, [3, 1, 4, 1, 5]),
        (dataset.select([4, 0, 0]), [5, 3, 3]),
        (dataset.shuffle(seed=1), None),
        (dataset.with_format("torch"), [3, 1, 4, 1, 5]),
        (dataset.with_format("numpy", columns=["labels"]), [3, 1, 4, 1, 5]),
        (
            dataset.with_transform(lambda rows: {"input_ids": [ids[:2] for ids in rows["input_ids"]]}),
            [2, 1, 2, 1, 2],
        ),
        (Rows(), [3, 1, 4, 1, 5]),
    ]:
        lengths = token_lengths(source)
        assert lengths is not None and lengths.dtype == np.int64
        assert lengths.tolist() == (expected or [len(row["input_ids"]) for row in source])


def test_lengths_over_several_pieces_of_arrow_keep_the_order() -> None:
    dataset = Dataset.from_dict({"input_ids": [[0] * (row % 7) for row in range(25_000)]})
    lengths = token_lengths(dataset)
    assert lengths is not None
    assert np.array_equal(lengths, np.arange(25_000) % 7)


def test_data_without_tokens_or_size_has_no_lengths() -> None:
    dataset = Dataset.from_dict({"input_ids": TOKENS})
    for source in (
        dataset.rename_column("input_ids", "pixel_values"),
        dataset.to_iterable_dataset(),
        dataset.select([]),
        Rows("pixel_values"),
        [1, 2, 3],
        None,
    ):
        assert token_lengths(source) is None


LENGTHS = np.array([2, 9, 4, 9, 1])
# By falling length, equal ones as they come: examples 1, 3, 2, 0, 4.
ORDER = np.array([1, 3, 2, 0, 4])


def test_the_longest_come_first() -> None:
    sampler = LongestFirst(LENGTHS)
    assert list(sampler) == ORDER.tolist() and len(sampler) == 5


def test_the_order_of_a_loader_is_found() -> None:
    sampler = LongestFirst(LENGTHS)
    order = order_of(DataLoader(list(range(5)), batch_size=2, sampler=sampler))
    assert order is not None and np.array_equal(order, ORDER)
    assert order_of(DataLoader(list(range(5)), batch_size=2)) is None


def test_rows_come_back_in_the_order_of_the_data_set() -> None:
    values = np.array([[10.0], [30.0], [20.0], [0.0], [40.0]])
    nested = restored({"a": (values, [values[:, 0], None])}, ORDER)
    np.testing.assert_array_equal(nested["a"][0], [[0.0], [10.0], [20.0], [30.0], [40.0]])
    np.testing.assert_array_equal(nested["a"][1][0], [0.0, 10.0, 20.0, 30.0, 40.0])
    assert nested["a"][1][1] is None and isinstance(nested["a"], tuple)


def test_metrics_see_the_order_of_the_data_set() -> None:
    seen = {}

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        for name in ("predictions", "label_ids", "inputs", "losses"):
            seen[name] = getattr(prediction, name)
        return {"rows": 5.0}

    compute_in_order = metrics_in_order(compute, ORDER)
    assert compute_in_order is not None
    rows = ORDER.copy()
    assert compute_in_order(EvalPrediction(predictions=rows, label_ids=10 * rows, losses=rows / 2)) == {
        "rows": 5.0
    }
    for name, factor in (("predictions", 1), ("label_ids", 10), ("losses", 0.5)):
        np.testing.assert_array_equal(seen[name], factor * np.arange(5))
    assert seen["inputs"] is None
    assert metrics_in_order(None, ORDER) is None
