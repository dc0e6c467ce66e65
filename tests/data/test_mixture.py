"""Batches of several sets mixed by odds."""

import hashlib
import tracemalloc
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointalign.config import DataSet
from pointalign.data.mixture import MixtureBatchSampler
from pointalign.errors import ConfigError

SETS = [
    DataSet(types=["detailed_description"], odds=2, batch_size=6),
    DataSet(types=["single_round"], odds=3, batch_size=10),
    DataSet(types=["multi_round"], odds=3, batch_size=4),
]
INDICES = [range(50), range(50, 90), range(90, 201)]


def test_sets_are_drawn_by_odds_with_their_batch_sizes():
    batches = list(MixtureBatchSampler(INDICES, SETS, 8000, seed=42))
    drawn = Counter()
    for batch in batches:
        number = next(n for n, members in enumerate(INDICES) if batch[0] in members)
        assert set(batch) <= set(INDICES[number])
        assert len(batch) == SETS[number].batch_size
        drawn[number] += 1
    for number, share in enumerate((2 / 8, 3 / 8, 3 / 8)):
        assert abs(drawn[number] / 8000 - share) < 4 * (share * (1 - share) / 8000) ** 0.5


@given(st.integers(0, 1000), st.lists(st.tuples(st.integers(1, 30), st.integers(1, 7)), min_size=1, max_size=3))
def test_every_conversation_comes_once_before_any_comes_twice(seed, sizes):
    start, indices, sets = 0, [], []
    for count, batch_size in sizes:
        indices.append(list(range(start, start + count)))
        sets.append(DataSet(odds=1, batch_size=batch_size))
        start += count
    seen = [[] for _ in sizes]
    for batch in MixtureBatchSampler(indices, sets, 60, seed):
        number = next(n for n, members in enumerate(indices) if batch[0] in members)
        seen[number] += batch
    for members, order in zip(indices, seen, strict=True):
        for first in range(0, len(order), len(members)):
            one_pass = order[first : first + len(members)]
            assert len(set(one_pass)) == len(one_pass)


def test_passes_and_seeds_have_different_orders():
    sets = [DataSet(batch_size=20)]
    first, second = list(MixtureBatchSampler([range(20)], sets, 2, seed=1))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert first != list(range(20))
    assert next(iter(MixtureBatchSampler([range(20)], sets, 2, seed=2))) != first


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_the_batches_of_one(world):
    alone = list(MixtureBatchSampler(INDICES, SETS, 40, seed=42))
    ranks = [list(MixtureBatchSampler(INDICES, SETS, 40, 42, rank, world)) for rank in range(world)]
    for number, batch in enumerate(alone):
        parts = [rank[number] for rank in ranks]
        assert all(parts)
        assert sorted(index for part in parts for index in part) == sorted(batch)


def test_skipping_gives_the_batches_of_a_run_that_was_never_stopped():
    sampler = MixtureBatchSampler(INDICES, SETS, 50, seed=42)
    whole = list(sampler)
    assert len(sampler) == len(whole) == 50
    assert list(islice(iter(sampler), 23, None)) == whole[23:]
    from accelerate.data_loader import SkipBatchSampler

    assert list(SkipBatchSampler(sampler, skip_batches=23)) == whole[23:]


def test_sets_that_cannot_be_drawn():
    with pytest.raises(ConfigError, match="no conversation of types single_round"):
        MixtureBatchSampler([[1], [], [2]], SETS, 1, 0)
    with pytest.raises(ConfigError, match="a batch of 4 cannot be split over 5 processes"):
        MixtureBatchSampler(INDICES, SETS, 1, 0, 0, 5)


@pytest.mark.parametrize("odds", [[0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0]])
def test_odds_that_mean_nothing_are_refused(odds):
    sets = [DataSet(odds=o, batch_size=1) for o in odds]
    with pytest.raises(ConfigError, match="odds"):
        next(iter(MixtureBatchSampler([[1], [2]], sets, 3, 0)))


def test_a_batch_size_of_zero_is_refused():
    with pytest.raises(ConfigError, match="batch"):
        next(iter(MixtureBatchSampler([[1]], [DataSet(batch_size=0)], 3, 0)))


def test_the_batches_of_a_seed_stay_what_they_are():
    """Pinned before the orders were made of arrays: a run that was started then goes on with its own batches."""
    first = list(islice(MixtureBatchSampler(INDICES, SETS, 3000, seed=42), 3))
    assert first == [[167, 175, 115, 189], [62, 56, 78, 50, 52, 51, 61, 85, 65, 84], [125, 91, 185, 99]]
    indices = [np.arange(0, 20000, 2), np.arange(1, 20001, 2), np.arange(20001, 20009)]
    batches = list(MixtureBatchSampler(indices, SETS, 30000, 7, rank=1, world=2))
    told = hashlib.sha256(repr(batches).encode()).hexdigest()
    assert told == "2eb5386f658a9d836d8523f85e6677dac7cd0ac6a2f82aee626e82b54f074371"


def test_a_pass_over_many_conversations_takes_the_memory_of_two_arrays():
    members = np.arange(500_000)
    sampler = MixtureBatchSampler([members], [DataSet(batch_size=10)], 60_000, seed=0)
    tracemalloc.start()
    seen = sum(len(batch) for batch in sampler)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == 600_000
    assert peak < 3 * members.nbytes
