"""Intervals, tests and differences against values worked out by hand."""

from __future__ import annotations

from math import erfc, nan, sqrt

import numpy as np
import pytest

from pointalign.errors import DataError
from pointalign.evaluation.statistics import (
    bootstrap_interval,
    bootstrap_ratio,
    mcnemar_exact,
    paired_difference,
    pooled_difference,
    sign_flip_test,
    summarize,
    summarize_share,
    verdict,
    wilson_interval,
)


def test_wilson_is_the_formula() -> None:
    """30 of 100: centre (p + z^2 / 2n) / (1 + z^2 / n), half width z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n)."""
    p, n, z = 0.3, 100, 1.959964
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert wilson_interval(30, 100) == pytest.approx((centre - half, centre + half), abs=1e-6)
    assert wilson_interval(30, 100) == pytest.approx((0.2189, 0.3958), abs=1e-4)


def test_wilson_has_width_where_all_or_none_are_right() -> None:
    """0 of 10: from 0 to z^2 / (n + z^2) = 3.8415 / 13.8415."""
    assert wilson_interval(0, 10) == pytest.approx((0, 3.8415 / 13.8415), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((10 / 13.8415, 1), abs=1e-4)
    with pytest.raises(DataError, match="nothing to average"):
        wilson_interval(0, 0)


def test_a_share_has_its_count_and_interval() -> None:
    share = summarize_share([True] * 3 + [False])
    assert share == {"mean": 0.75, "n": 4, "interval": list(wilson_interval(3, 4))}


def test_the_bootstrap_of_a_proportion_is_the_binomial_one() -> None:
    """Resampling 100 answers of which 30 are right gives Binomial(100, 0.3) / 100: 2.5 % and 97.5 % at 0.21 and 0.39."""
    low, high = bootstrap_interval([1.0] * 30 + [0.0] * 70)
    assert low == pytest.approx(0.21, abs=0.011)
    assert high == pytest.approx(0.39, abs=0.011)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = [low <= 0.4 <= high for low, high in (bootstrap_interval(rng.random(60) < 0.4) for _ in range(60))]
    assert 0.85 <= np.mean(covered) <= 1


def test_equal_values_have_no_width_and_nothing_is_an_error() -> None:
    assert bootstrap_interval([1.0, 1.0, 1.0]) == (1.0, 1.0)
    for call in (bootstrap_interval, lambda values: bootstrap_ratio(values, values)):
        with pytest.raises(DataError, match="nothing to average"):
            call([])


def test_the_same_numbers_give_the_same_interval() -> None:
    values = np.random.default_rng(1).random(50).tolist()
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)


def test_the_bootstrap_of_a_ratio_weighs_long_units_more() -> None:
    """Two units, 1 / 1 and 3 / 9: drawn with replacement their ratio is 1, 4 / 10 or 1 / 3 with odds 1 : 2 : 1."""
    assert bootstrap_ratio([1, 3], [1, 9]) == pytest.approx((1 / 3, 1))
    assert bootstrap_ratio([2, 18], [1, 9]) == pytest.approx((2, 2))


def test_pairing_takes_out_what_the_objects_share() -> None:
    easy_and_hard = np.linspace(0, 100, 40)
    better = easy_and_hard + np.where(np.arange(40) % 2, 1.2, 0.8)
    difference = paired_difference(easy_and_hard.tolist(), better.tolist())
    assert difference["mean"] == pytest.approx(1.0)
    assert difference["n"] == 40
    assert not difference["inside_noise"]
    unpaired_half_width = (lambda low, high: (high - low) / 2)(*summarize(better.tolist())["interval"])
    assert unpaired_half_width > 5


def test_a_difference_inside_the_noise_says_so() -> None:
    first, second = [0.0, 1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0, 1.0]
    assert paired_difference(first, second)["inside_noise"]
    with pytest.raises(DataError, match="cannot pair 1 objects with 2"):
        paired_difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("objects", "worse", "better"),
    [(1, 0, 1), (5, 0, 5), (100, 0, 5), (6, 0, 6), (100, 0, 6), (100, 1, 7), (100, 1, 8)],
)
def test_few_objects_that_differ_tell_no_difference(objects: int, worse: int, better: int) -> None:
    """Where few differ, the bootstrap's interval excludes zero too soon: McNemar's p is 0.06 of 5 to 0, 0.07 of 7 to 1."""
    first = [0.0] * objects
    second = [1.0] * better + [-1.0] * worse + [0.0] * (objects - better - worse)
    p_value = mcnemar_exact(worse, better)
    for found in (paired_difference(first, second), pooled_difference([first], [second])):
        assert found["p_value"] == p_value
        assert found["interval"][0] > 0
        assert found["inside_noise"] == (p_value > 0.05)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_no_number_is_no_difference() -> None:
    assert verdict([nan, 1.0], (nan, nan))["inside_noise"]


def test_flips_of_signs_are_counted_by_hand() -> None:
    """Of 1, 2 and 4 the eight sums are +-7, +-5, +-3 and +-1: two are as far out as 7, and four as far as 5."""
    assert sign_flip_test([1, 2, 4]) == pytest.approx(2 / 8)
    assert sign_flip_test([-1, 2, 0, 4]) == pytest.approx(4 / 8)
    assert sign_flip_test([-1, -2, -4]) == pytest.approx(2 / 8)
    assert sign_flip_test([0.0, 0.0]) == sign_flip_test([]) == 1


def test_many_flips_agree_with_the_normal_law() -> None:
    changes = np.linspace(-1, 1.3, 200)
    z = changes.sum() / np.sqrt((changes**2).sum())
    assert sign_flip_test(changes) == pytest.approx(erfc(z / sqrt(2)), abs=0.005)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [(2, 8, 2 * (1 + 10 + 45) / 2**10), (0, 5, 2 / 2**5), (4, 4, 1.0), (0, 0, 1.0), (8, 2, 2 * 56 / 2**10)],
)
def test_mcnemar_is_twice_the_binomial_tail(only_first: int, only_second: int, p_value: float) -> None:
    assert mcnemar_exact(only_first, only_second) == pytest.approx(p_value)


def test_one_seed_a_side_is_the_paired_bootstrap_over_objects() -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.random(80) < 0.4).astype(float), (rng.random(80) < 0.5).astype(float)
    pooled, paired = pooled_difference([first], [second]), paired_difference(first.tolist(), second.tolist())
    assert pooled["mean"] == pytest.approx(paired["mean"])
    assert pooled["interval"] == pytest.approx(paired["interval"], abs=0.015)
    assert pooled["seeds"] == [1, 1]
    assert pooled["seed_deviation"] is None


def test_seeds_that_differ_widen_the_interval_whatever_the_objects() -> None:
    """Two paired seeds, all objects alike: differences 0 and 1, so resampled means are 0, 1/2, 1 with odds 1 : 2 : 1."""
    first, second = np.zeros((2, 50)), np.stack([np.zeros(50), np.ones(50)])
    pooled = pooled_difference(first.tolist(), second.tolist())
    assert pooled["interval"] == pytest.approx([0, 1])
    assert pooled["mean"] == 0.5
    assert pooled["by_seed"] == [0, 1]
    assert pooled["seed_deviation"] == pytest.approx(sqrt(0.5))
    assert pooled["few_seeds"]
    assert pooled["inside_noise"]


def test_paired_seeds_take_out_what_a_seed_does_to_both_sides() -> None:
    lucky = np.array([0.0, 10.0, 20.0, 30.0, 40.0])[:, None] + np.zeros((5, 30))
    paired = pooled_difference(lucky.tolist(), (lucky + 1).tolist())
    unpaired = pooled_difference(lucky.tolist(), (lucky[:4] + 1).tolist())
    assert paired["interval"] == pytest.approx([1, 1])
    assert not paired["few_seeds"]
    low, high = unpaired["interval"]
    assert high - low > 20
    assert not unpaired["paired_seeds"]
    assert "by_seed" not in unpaired


def test_the_pooled_interval_is_as_wide_as_the_two_sources_of_variance() -> None:
    """Seed effects of variance 1 and object effects of variance 4: the mean's variance is 1 (1/S) + 4 (1/n), about."""
    rng = np.random.default_rng(2)
    seeds, objects = rng.normal(0, 1, 20), rng.normal(0, 2, 100)
    effect = seeds[:, None] + objects[None]
    low, high = pooled_difference(np.zeros((20, 100)).tolist(), effect.tolist())["interval"]
    expected = 2 * 1.96 * sqrt(seeds.var() / 20 + objects.var() / 100)
    assert high - low == pytest.approx(expected, rel=0.05)


def test_what_cannot_be_pooled_is_an_error() -> None:
    with pytest.raises(DataError, match="cannot pair 1 objects with 2"):
        pooled_difference([[1.0]], [[1.0, 2.0]])
    for nothing in ([], [[]]):
        with pytest.raises(DataError, match="nothing to compare"):
            pooled_difference(nothing, nothing)
