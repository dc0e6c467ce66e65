"""Farthest points and nearest neighbours on a CPU: what `geometry` promises, in numpy and scipy instead of torch.

Sampling is thousands of tiny steps, each too small to be worth torch's thread pool; neighbours come from a k-d tree, so that
no matrix of all distances is held. Both are equal to the plain way bit for bit. Arrays are (N, 3) or (B, N, 3).
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import KDTree

from pointalign.errors import DataError

# Coordinates of one axis that sampling works on at a time: what stays in a core's second-level cache.
CACHED_VALUES = 32_768
# Of larger clouds more samples are chosen with buckets of points, where a step looks into the near ones alone.
DENSE_POINTS = 32_768
DENSE_SAMPLES = 1024
BUCKET_POINTS = 1024
# A float32 distance from three rounded differences errs by less than this share of it; float64's by less still.
ROUNDING = 1e-6


def farthest_points(xyz: np.ndarray, num_samples: int, start: int) -> np.ndarray:
    """`geometry.farthest_point_sample`: (B, N, 3) to int64 indices (B, num_samples)."""
    batch, count = xyz.shape[:2]
    if count > DENSE_POINTS and num_samples > DENSE_SAMPLES:
        return np.stack([_Buckets(cloud, start).choose(num_samples) for cloud in xyz])
    columns = np.ascontiguousarray(xyz.transpose(0, 2, 1))
    chosen = np.full((batch, num_samples), start, dtype=np.int64)
    at_once = max(CACHED_VALUES // count, 1)
    for first in range(0, batch, at_once):
        piece = slice(first, first + at_once)
        _farthest_densely(columns[piece], chosen[piece])
    return chosen


def _farthest_densely(columns: np.ndarray, chosen: np.ndarray) -> None:
    """Fill all but the first column of `chosen` (B, S), measuring all points of (B, 3, N) at every step."""
    x, y, z = (columns[:, axis] for axis in range(3))
    rows = np.arange(len(x))
    nearest = np.full(x.shape, np.inf, dtype=x.dtype)
    for i in range(1, chosen.shape[1]):
        current = chosen[:, i - 1]
        centre = (axis[rows, current, None] for axis in (x, y, z))
        np.minimum(nearest, _squares(x, y, z, *centre), out=nearest)
        nearest[rows, current] = -1
        chosen[:, i] = nearest.argmax(axis=1)


class _Buckets:
    """One large cloud in boxes of near points: a chosen point changes nothing in a box that lies far enough away.

    Source: the pruning of Han et al. 2023, "QuickFPS" (IEEE TCAD), with boxes of one size and the lowest index of equals.
    """

    def __init__(self, xyz: np.ndarray, start: int) -> None:
        self.xyz, self.start = xyz, start
        levels = max(int(np.ceil(np.log2(len(xyz) / BUCKET_POINTS))), 0)
        size = -(-len(xyz) >> levels)
        # Filled up with points that can never be chosen, and that come after all others.
        filled = np.arange(size << levels)
        places = np.minimum(filled, len(xyz) - 1)
        rows = filled[None]
        for _ in range(levels):
            rows = _halves(xyz[places[rows]], rows)
        self.index = np.sort(rows, axis=1)  # the first of equals in a bucket is then the one of lowest index
        self.points = np.ascontiguousarray(xyz[places[self.index]].transpose(2, 0, 1))
        self.low, self.high = self.points.min(axis=2).T, self.points.max(axis=2).T
        self.nearest = np.where(self.index < len(xyz), np.inf, -1).astype(xyz.dtype)
        self.bucket, self.slot = np.empty(len(filled), np.int64), np.empty(len(filled), np.int64)
        self.bucket[self.index] = np.arange(len(self.index))[:, None]
        self.slot[self.index] = np.arange(self.index.shape[1])

    def choose(self, num_samples: int) -> np.ndarray:
        """Indices in the order of choice."""
        chosen = np.empty(num_samples, dtype=np.int64)
        chosen[0] = current = self.start
        farthest = np.full(len(self.index), np.inf, dtype=self.xyz.dtype)  # of each bucket, and which point it is
        which = np.zeros(len(self.index), dtype=np.int64)
        for i in range(1, num_samples):
            centre, own = self.xyz[current], self.bucket[current]
            gap = np.maximum(np.maximum(self.low - centre, centre - self.high), 0)
            touched = np.einsum("ij,ij->i", gap, gap) * (1 - ROUNDING) < farthest
            self.nearest[own, self.slot[current]] = -1
            touched[own] = True
            buckets = np.flatnonzero(touched)
            farthest[buckets], which[buckets] = self._look_into(buckets, centre)
            best = np.flatnonzero(farthest == farthest.max())
            chosen[i] = current = which[best].min()
        return chosen

    def _look_into(self, buckets: np.ndarray, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Measure the points of some buckets; the farthest distance of each bucket, and the index of its point."""
        nearest = np.minimum(self.nearest[buckets], _squares(*self.points[:, buckets], *centre))
        self.nearest[buckets] = nearest
        slots, rows = nearest.argmax(axis=1), np.arange(len(buckets))
        return nearest[rows, slots], self.index[buckets, slots]


def _halves(points: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Cut every bucket (buckets, size, 3) at the median of its longest side: rows (buckets, size) to (2 buckets, size / 2)."""
    axis = np.ptp(points, axis=1).argmax(axis=1)
    values = np.take_along_axis(points, axis[:, None, None], axis=2)[..., 0]
    order = np.argpartition(values, values.shape[1] // 2, axis=1)
    return np.take_along_axis(rows, order, axis=1).reshape(2 * len(rows), -1)


def nearest_points(queries: np.ndarray, xyz: np.ndarray, k: int) -> np.ndarray:
    """`geometry.k_nearest_neighbors`: queries (B, G, 3) and float32 points (B, N, 3) to int64 indices (B, G, k).

    Raises:
        DataError: when a coordinate is not finite.
    """
    if not (np.isfinite(queries).all() and np.isfinite(xyz).all()):
        raise DataError("a cloud holds coordinates that are not finite; give finite numbers")
    return np.stack([_nearest(some, cloud, k) for some, cloud in zip(queries, xyz, strict=True)])


def _nearest(queries: np.ndarray, xyz: np.ndarray, k: int) -> np.ndarray:
    """One cloud's. The tree measures in float64; one point more than wanted shows whether float32 might choose others."""
    more = min(k + 1, len(xyz))
    found = KDTree(xyz).query(queries, more)[1].reshape(len(queries), more)  # for one neighbour it gives no second axis
    found = np.sort(found, axis=1)
    squares = _squares(*xyz[found].transpose(2, 0, 1), *queries.T[..., None])
    order = np.argsort(squares, axis=1, kind="stable")
    found, squares = np.take_along_axis(found, order, axis=1), np.take_along_axis(squares, order, axis=1)
    if more > k:
        farther = squares[:, k - 1] * (1 + ROUNDING) + np.finfo(np.float32).tiny
        columns = np.ascontiguousarray(xyz.T)
        for row in np.flatnonzero(~(squares[:, k] > farther)):
            every = _squares(*columns, *queries[row])
            near = np.flatnonzero(every <= squares[row, k - 1])
            found[row, :k] = near[np.argsort(every[near], kind="stable")[:k]]
    return found[:, :k]


def _squares(x: np.ndarray, y: np.ndarray, z: np.ndarray, x0: np.ndarray, y0: np.ndarray, z0: np.ndarray) -> np.ndarray:
    """Squared distances of points from centres, in the order of the axes, so that every path rounds alike."""
    squares = np.square(x - x0)
    squares += np.square(y - y0)
    squares += np.square(z - z0)
    return squares
