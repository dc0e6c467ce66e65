"""A uniform random choice from a stream of points of any length, in memory that does not grow with it."""

from __future__ import annotations

import numpy as np


class Thinner:
    """Keeps at most `capacity` of the rows that are shown to it, each as likely as any other.

    Every row draws a random key, and the rows with the smallest keys stay. What is kept depends on the rows, their order
    and the seed, not on the pieces in which they come.

    Args:
        capacity: how many rows to keep.
        num_columns: C; the first three columns are x, y, z.
        seed: of numpy's default generator.

    Attributes:
        seen: rows with finite xyz.
        dropped: rows whose xyz were not finite; they are not kept.
        low, high: (C,) smallest and largest finite value of each column over all rows seen, NaN where there was none.

    Source: Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir", with equal weights.
    """

    def __init__(self, capacity: int, num_columns: int, seed: int) -> None:
        self.capacity = capacity
        self.seen = 0
        self.dropped = 0
        self.low = np.full(num_columns, np.nan)
        self.high = np.full(num_columns, np.nan)
        self._random = np.random.default_rng(seed)
        self._rows = np.empty((0, num_columns))
        self._keys = np.empty(0)
        self._places = np.empty(0, dtype=np.int64)
        self._bound = np.inf

    def add(self, rows: np.ndarray) -> None:
        """Take in the next rows, (n, C) of any number type."""
        rows = np.asarray(rows, dtype=np.float64)
        finite = np.isfinite(rows[:, :3]).all(axis=1)
        if not finite.all():
            self.dropped += int((~finite).sum())
            rows = rows[finite]
        if not len(rows):
            return
        told = rows if np.isfinite(rows[:, 3:]).all() else np.where(np.isfinite(rows), rows, np.nan)
        self.low = np.fmin(self.low, np.fmin.reduce(told, axis=0))
        self.high = np.fmax(self.high, np.fmax.reduce(told, axis=0))
        keys = self._random.random(len(rows))
        mine = np.flatnonzero(keys < self._bound)
        self._rows = np.concatenate([self._rows, rows[mine]])
        self._keys = np.concatenate([self._keys, keys[mine]])
        self._places = np.concatenate([self._places, self.seen + mine])
        self.seen += len(rows)
        if len(self._keys) > self.capacity:
            kept = np.argpartition(self._keys, self.capacity - 1)[: self.capacity]
            self._rows, self._keys, self._places = self._rows[kept], self._keys[kept], self._places[kept]
            self._bound = self._keys.max()

    def rows(self) -> np.ndarray:
        """The kept rows (at most `capacity`, C) float64, in the order in which they came."""
        return self._rows[np.argsort(self._places)]
