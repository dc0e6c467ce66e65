"""CKNNA: whether two sets of features agree on who is near whom, and how much of that chance alone would give."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pointalign.errors import DataError
from pointalign.evaluation.statistics import bootstrap_statistic

NEIGHBORS = 10
PERMUTATIONS = 500
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Neighborhood:
    """The kernel of one set of features: n objects.

    Args:
        kernel: (n, n) inner products of unit vectors, every row centred on its mean.
        nearest: (n, n) bool, true at each row's k nearest others.
    """

    kernel: np.ndarray
    nearest: np.ndarray


def neighborhood(features: np.ndarray, k: int = NEIGHBORS) -> Neighborhood:
    """Who is near whom among n objects.

    Args:
        features: (n, D), n > k.
        k: neighbours.

    Raises:
        DataError: for too few objects.
    """
    if not 0 < k < len(features):
        raise DataError(f"cannot find {k} neighbours among {len(features)} objects; give more objects, or a smaller k")
    units = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    kernel = units.astype(float) @ units.astype(float).T
    others = np.where(np.eye(len(kernel), dtype=bool), -np.inf, kernel)
    nearest = np.zeros(kernel.shape, dtype=bool)
    np.put_along_axis(nearest, np.argsort(-others, axis=1, kind="stable")[:, :k], True, axis=1)
    return Neighborhood(kernel - kernel.mean(axis=1, keepdims=True), nearest)


def cknna_parts(first: Neighborhood, second: Neighborhood) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each object's share of the three sums of CKNNA: across, within the first, within the second; (n,) each."""
    both = first.nearest & second.nearest
    return (
        np.where(both, first.kernel * second.kernel, 0).sum(axis=1),
        np.where(first.nearest, first.kernel**2, 0).sum(axis=1),
        np.where(second.nearest, second.kernel**2, 0).sum(axis=1),
    )


def _ratio(across: np.ndarray, within_first: np.ndarray, within_second: np.ndarray) -> np.ndarray:
    return across / np.maximum(np.sqrt(within_first * within_second), 1e-12)


def cknna(first: Neighborhood, second: Neighborhood) -> float:
    """Centred kernel alignment over mutual nearest neighbours: 1 for the same features, about k / n without relation.

    Source: Huh et al. 2024, "The Platonic Representation Hypothesis" (arXiv 2405.07987), appendix A: the sum over i and j
    that are neighbours in both of the row-centred kernels' product, over the root of the same sums within each.
    """
    across, within_first, within_second = (part.sum() for part in cknna_parts(first, second))
    return float(_ratio(across, within_first, within_second))


def calibrated_cknna(first: Neighborhood, second: Neighborhood, seed: int = 0) -> dict[str, float | list[float]]:
    """CKNNA held against the same features with the pairs shuffled.

    Args:
        first: of n objects.
        second: of the same objects in the same order.
        seed: of permutations (500) and resampling.

    Returns:
        `raw` and its 95 % `interval` (bootstrap over objects as the ones who ask; whom they may choose stays fixed);
        `null_mean` and `null_95`, mean and 95th percentile of the shuffled pairs; `p_value`; and `calibrated`, 0 up to the
        95th percentile and 1 for equal features: max((raw - null_95) / (1 - null_95), 0).

    Source: Gröger et al. 2026, "Revisiting the Platonic Representation Hypothesis" (arXiv 2602.14486).
    """
    rng = np.random.default_rng(seed)
    parts = cknna_parts(first, second)
    raw = cknna(first, second)
    null = np.empty(PERMUTATIONS)
    scale = max(float(np.sqrt(parts[1].sum() * parts[2].sum())), 1e-12)
    rows, columns = first.nearest.nonzero()
    weights = first.kernel[rows, columns]
    known = np.where(second.nearest, second.kernel, 0)
    for draw in range(PERMUTATIONS):
        order = rng.permutation(len(known))
        null[draw] = weights @ known[order[rows], order[columns]] / scale
    threshold = float(np.quantile(null, 1 - SIGNIFICANCE))
    low, high = bootstrap_statistic(parts, _ratio, seed)
    return {
        "raw": raw,
        "interval": [low, high],
        "null_mean": float(null.mean()),
        "null_95": threshold,
        "p_value": float((1 + (null >= raw).sum()) / (1 + PERMUTATIONS)),
        "calibrated": (raw - threshold) / (1 - threshold) if threshold < min(raw, 1 - 1e-9) else 0.0,
    }


def cknna_difference(
    first: Neighborhood, second: Neighborhood, target: Neighborhood, seed: int = 0
) -> dict[str, object]:
    """How much nearer the second features' neighbourhoods are to the target's than the first's, over the same objects.

    Returns:
        `difference` of the raw values, its paired 95 % `interval`, and `inside_noise`.
    """
    low, high = bootstrap_statistic(
        [*cknna_parts(first, target), *cknna_parts(second, target)],
        lambda a, b, c, d, e, f: _ratio(d, e, f) - _ratio(a, b, c),
        seed,
    )
    difference = cknna(second, target) - cknna(first, target)
    return {"difference": difference, "interval": [low, high], "inside_noise": low <= 0 <= high}
