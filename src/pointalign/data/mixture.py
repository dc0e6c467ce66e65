"""Batches of several sets mixed by odds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from pointalign.config import DataSet
from pointalign.errors import ConfigError

# An order is turned into Python's integers piece by piece, so that a pass over 660K conversations makes no list of them.
PIECE = 4096


class MixtureBatchSampler(Sampler[list[int]]):
    """Batches of a mixture: at each step one set is drawn by odds, and its next conversations in shuffled order.

    A set's order is a new permutation on every pass, so every conversation comes once before any comes twice. The
    sequence of batches depends on the seed alone: not on the number of processes, nor on where a run was stopped.

    Args:
        indices: for each set, the dataset indices it holds.
        sets: odds and batch sizes.
        num_batches: how many batches there are in all.
        seed: of the draw and the permutations.
        rank: this process; it receives every `world`-th conversation of each batch.
        world: number of processes.

    Raises:
        ConfigError: when a set is empty, its batch is smaller than the number of processes, or the odds mean nothing.

    Source: PointAlign (arXiv 2603.00412) and MiniGPT-3D (arXiv 2405.01413): three sets, odds 2:3:3, batch 6/10/4.
    """

    def __init__(
        self,
        indices: Sequence[Sequence[int] | np.ndarray],
        sets: Sequence[DataSet],
        num_batches: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        for members, settings in zip(indices, sets, strict=True):
            if not len(members):
                raise ConfigError(
                    f"the data hold no conversation of types {', '.join(settings.types)}; leave this set out of data.sets in a "
                    "recipe file"
                )
            if settings.batch_size < world:
                raise ConfigError(
                    f"a batch of {settings.batch_size} cannot be split over {world} processes; raise data.sets' batch_size"
                )
        if not all(0 <= settings.odds < float("inf") for settings in sets) or not sum(s.odds for s in sets):
            given = ", ".join(f"{settings.odds:g}" for settings in sets)
            raise ConfigError(f"data.sets' odds are numbers from 0 up, not all 0; got {given}")
        self.indices, self.sets, self.num_batches, self.seed = indices, sets, num_batches, seed
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        odds = np.array([settings.odds for settings in self.sets], dtype=float)
        draws = np.random.default_rng([self.seed, 0]).choice(len(odds), size=self.num_batches, p=odds / odds.sum())
        streams = [self._stream(number) for number in range(len(self.sets))]
        for drawn in draws:
            batch = [next(streams[drawn]) for _ in range(self.sets[drawn].batch_size)]
            yield batch[self.rank :: self.world]

    def _stream(self, number: int) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, 1 + number])
        members = np.asarray(self.indices[number])
        while True:
            order = rng.permutation(members)
            for start in range(0, len(order), PIECE):
                yield from order[start : start + PIECE].tolist()


class NumberedBatches(MixtureBatchSampler):
    """Batches of (index, the batch's number) instead of indices, so that what is drawn anew each time is a function of them."""

    def __iter__(self) -> Iterator[list[Any]]:
        for step, batch in enumerate(super().__iter__()):
            yield [(number, step) for number in batch]
