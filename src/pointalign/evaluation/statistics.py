"""How sure a number is: intervals of one result, and tests of the difference between two over the same objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pointalign.errors import DataError

RESAMPLES = 10_000
RESAMPLES_AT_ONCE = 500
CONFIDENCE = 0.95
# Resampling this few seeds shows too little of how much training varies.
FEW_SEEDS = 5

Values = Sequence[float] | np.ndarray


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share, for yes-or-no answers.

    Args:
        successes: how many of them were right.
        n: how many there were, at least one.

    Returns:
        Low and high, inside [0, 1] and of some width also at 0 and n.

    Raises:
        DataError: without objects.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", by scipy.stats.
    """
    if not n:
        raise DataError("there is nothing to average; evaluate at least one object")
    from scipy import stats  # half a second that answering without judging does not need

    interval = stats.binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean by the percentile bootstrap over objects.

    Args:
        values: one number per object, at least one.
        seed: of the resampling (10,000 times).

    Returns:
        Low and high; equal when all values are.

    Raises:
        DataError: without values.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    data = np.asarray(values, dtype=float)
    if not len(data):
        raise DataError("there is nothing to average; evaluate at least one object")
    return _pigeonhole(data[None], np.zeros_like(data)[None], True, seed)


def bootstrap_ratio(numerators: Values, denominators: Values, seed: int = 0) -> tuple[float, float]:
    """95 % interval of sum(numerators) / sum(denominators) by the percentile bootstrap over pairs.

    Args:
        numerators: one number per unit, for instance the summed loss of a passage.
        denominators: one positive number per unit, for instance the passage's tokens.
        seed: of the resampling (10,000 times).

    Raises:
        DataError: without units.

    Source: Efron 1979, as `bootstrap_interval`; a ratio of sums weighs long units more.
    """
    return bootstrap_statistic([numerators, denominators], lambda above, below: above / below, seed)


def bootstrap_statistic(
    parts: Sequence[Values], statistic: Callable[..., np.ndarray], seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a function of several means, by the percentile bootstrap over units; every draw serves all means.

    Args:
        parts: for each mean, one number per unit.
        statistic: from the means of the draws, one array (draws,) for each part, to the statistic of each draw (draws,).
        seed: of the resampling (10,000 times).

    Raises:
        DataError: without units.

    Source: Efron 1979, as `bootstrap_interval`.
    """
    values = np.asarray(parts, dtype=float)
    if not values.size:
        raise DataError("there is nothing to average; evaluate at least one unit")
    weights = _weights(np.random.default_rng(seed), RESAMPLES, values.shape[1])
    return _percentiles(statistic(*(weights @ values.T).T))


def summarize(values: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Mean, n and bootstrap interval of one number per object."""
    low, high = bootstrap_interval(values, seed)
    return {"mean": float(np.mean(values)), "n": len(values), "interval": [low, high]}


def summarize_share(flags: Sequence[bool]) -> dict[str, Any]:
    """Share, n and Wilson interval of one yes or no per object."""
    low, high = wilson_interval(sum(map(bool, flags)), len(flags))
    return {"mean": float(np.mean(flags)), "n": len(flags), "interval": [low, high]}


def paired_difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Second minus first over the same objects, with a paired bootstrap interval.

    Returns:
        `mean`, `n`, `interval`, `p_value` of `sign_flip_test`, and `inside_noise`: whether the interval holds zero or that
        test finds nothing.

    Raises:
        DataError: when the two do not have the same number of objects.
    """
    if len(first) != len(second):
        raise DataError(
            f"cannot pair {len(first)} objects with {len(second)}; evaluate both models on the same objects"
        )
    differences = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    summary = summarize(differences.tolist(), seed)
    return {**summary, **verdict(differences, summary["interval"], seed)}


def verdict(differences: Values, interval: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Whether a mean difference can be told from none.

    A bootstrap interval alone is too short where few objects differ, and a point where all differ alike.

    Args:
        differences: one number per object.
        interval: of their mean, or of their sum over something positive.
        seed: of the flips.

    Returns:
        `p_value` of `sign_flip_test`, and `inside_noise`: whether the interval holds zero or that test finds nothing.
    """
    low, high = interval
    p_value = sign_flip_test(differences, seed)
    told_apart = (low > 0 or high < 0) and p_value <= 1 - CONFIDENCE  # what is no number tells nothing apart
    return {"p_value": p_value, "inside_noise": not told_apart}


def sign_flip_test(differences: Values, seed: int = 0) -> float:
    """Two-sided p-value of a mean difference, if each object's were as likely to point the other way.

    Args:
        differences: one number per object.
        seed: of the flips, where there are more than 10,000.

    Returns:
        The probability of a mean at least as far from zero: McNemar's where all that differ do so by the same amount; else
        counted over all flips of up to 13 differing objects, and over 10,000 flips of more; 1 when none differ.

    Source: Fisher 1935, "The design of experiments", section 21, by scipy.stats.
    """
    changes = np.asarray(differences, dtype=float)
    changes = changes[changes != 0]
    if not len(changes) or np.ptp(np.abs(changes)) == 0:
        return mcnemar_exact(int((changes < 0).sum()), int((changes > 0).sum()))
    from scipy import stats

    return float(
        stats.permutation_test(
            (changes,),
            np.mean,
            permutation_type="samples",
            n_resamples=RESAMPLES,
            batch=RESAMPLES_AT_ONCE,
            rng=np.random.default_rng(seed),
        ).pvalue
    )


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p-value of the exact McNemar test: are two models right equally often?

    Args:
        only_first: objects that only the first model has right.
        only_second: objects that only the second model has right.

    Returns:
        The probability of a split at least as uneven if both were equally good; 1 when they never disagree.

    Source: McNemar 1947, with the binomial distribution instead of chi-squared.
    """
    disagreements = only_first + only_second
    from scipy import stats

    return float(stats.binomtest(only_first, disagreements, 0.5).pvalue) if disagreements else 1.0


def pooled_mean(values: Sequence[Sequence[float]], seed: int = 0) -> dict[str, Any]:
    """`mean`, `n` objects and `interval` over several seeds of training, both resampled as in `pooled_difference`.

    Args:
        values: for each seed, one number per object.
        seed: of the resampling (10,000 times).
    """
    rows = np.asarray(values, dtype=float)
    interval = _pigeonhole(rows, np.zeros_like(rows), True, seed)
    return {"mean": float(rows.mean()), "n": rows.shape[1], "interval": list(interval)}


def pooled_difference(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], seed: int = 0
) -> dict[str, Any]:
    """Second minus first over the same objects and several seeds of training a side.

    Seeds and objects are crossed: every seed's model answers about every object. Both are resampled, independently of one
    another; an object drawn for one side is drawn for the other. With equally many seeds a side, the i-th of each belong
    together (the same seed of training) and are drawn together. With one seed a side only objects are resampled.

    Args:
        first: for each seed, one number per object.
        second: likewise, the objects in the same order.
        seed: of the resampling (10,000 times).

    Returns:
        `mean`, `n` objects, `seeds` a side, `paired_seeds`, `interval`; `p_value` of `sign_flip_test` over the objects' means,
        and `inside_noise`, as `paired_difference`; with paired seeds `by_seed`, the difference of each pair, and
        `seed_deviation`, their standard deviation; `few_seeds` when the interval says little about how much training varies.

    Raises:
        DataError: without values, or when two rows do not have the same number of objects.

    Source: Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2); mildly conservative by Owen and
    Eckles 2012 (arXiv 1106.2125).
    """
    lengths = {len(row) for row in (*first, *second)}
    if not (first and second) or lengths == {0}:
        raise DataError("there is nothing to compare; give at least one result a side, with at least one object")
    if len(lengths) > 1:
        low, high = min(lengths), max(lengths)
        raise DataError(f"cannot pair {low} objects with {high}; evaluate all models on the same objects")
    before, after = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    paired = len(before) == len(after)
    low, high = _pigeonhole(after, before, paired, seed)
    found: dict[str, Any] = {
        "mean": float(after.mean() - before.mean()),
        "n": before.shape[1],
        "seeds": [len(before), len(after)],
        "paired_seeds": paired,
        "interval": [low, high],
        **verdict(after.mean(axis=0) - before.mean(axis=0), (low, high), seed),
        "few_seeds": min(len(before), len(after)) < FEW_SEEDS,
    }
    if paired:
        by_seed = (after - before).mean(axis=1)
        found["by_seed"] = by_seed.tolist()
        found["seed_deviation"] = float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None
    return found


def _pigeonhole(plus: np.ndarray, minus: np.ndarray, paired: bool, seed: int) -> tuple[float, float]:
    """Percentile interval of mean(plus) - mean(minus), rows (seeds) and columns (objects) resampled independently."""
    rng = np.random.default_rng(seed)
    objects = plus.shape[1]
    if np.ptp(plus) == 0 and np.ptp(minus) == 0:
        value = float(plus.flat[0] - minus.flat[0])
        return value, value
    estimates = []
    for start in range(0, RESAMPLES, RESAMPLES_AT_ONCE):
        count = min(RESAMPLES_AT_ONCE, RESAMPLES - start)
        columns = _weights(rng, count, objects)
        rows = _weights(rng, count, len(plus))
        others = rows if paired else _weights(rng, count, len(minus))
        estimates.append((rows * (columns @ plus.T)).sum(axis=1) - (others * (columns @ minus.T)).sum(axis=1))
    return _percentiles(np.concatenate(estimates))


def _percentiles(estimates: np.ndarray) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(estimates, [tail, 1 - tail])
    return float(low), float(high)


def _weights(rng: np.random.Generator, draws: int, size: int) -> np.ndarray:
    """(draws, size) shares of each of `size` things when as many are drawn with replacement."""
    return rng.multinomial(size, np.full(size, 1 / size), size=draws) / size
