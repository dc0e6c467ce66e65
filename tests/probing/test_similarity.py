"""CKNNA by hand, and what its calibration takes away."""

import numpy as np
import pytest

from pointalign.errors import DataError
from pointalign.probing.similarity import calibrated_cknna, cknna, cknna_difference, neighborhood


def test_by_hand() -> None:
    # Unit vectors on a circle; kernel entries are cosines of the angles between them.
    first = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    second = np.array([[1.0, 0.0], [0.0, 2.0], [0.6, 0.8]])
    a, b = neighborhood(first, k=1), neighborhood(second, k=1)
    # first: rows (1, 0, -1), (0, 1, 0), (-1, 0, 1), means 0, 1/3, 0. Nearest others: 0 -> 1, 1 -> 0 (the first of two
    # equal ones), 2 -> 1. second: rows (1, 0, .6), (0, 1, .8), (.6, .8, 1), means 1.6/3, .6, .8; nearest: 2, 2, 1.
    assert a.nearest.nonzero()[1].tolist() == [1, 0, 1]
    assert b.nearest.nonzero()[1].tolist() == [2, 2, 1]
    # Mutual: (2, 1) alone, centred 0 and 0, so nothing agrees.
    assert cknna(a, b) == pytest.approx(0)
    third = neighborhood(np.array([[0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]]), k=1)
    # Rows (1, .6, 0), (.6, 1, .8), (0, .8, 1); means 1.6/3, .8, .6; nearest: 1, 2, 1. Mutual with first: (0, 1), (2, 1).
    across = (0 - 0) * (0.6 - 1.6 / 3) + (0 - 0) * (0.8 - 0.6)
    assert cknna(a, third) == pytest.approx(across)
    # With the second: (2, 1) and (1, 2).
    across = (0.8 - 0.8) * (0.8 - 0.6) + (0.8 - 0.6) * (0.8 - 0.8)
    within_second = (0.6 - 1.6 / 3) ** 2 + (0.8 - 0.6) ** 2 + (0.8 - 0.8) ** 2
    within_third = (0.6 - 1.6 / 3) ** 2 + (0.8 - 0.8) ** 2 + (0.8 - 0.6) ** 2
    assert cknna(b, third) == pytest.approx(across / np.sqrt(within_second * within_third))


def test_a_mutual_pair_counts_by_hand() -> None:
    first = neighborhood(np.array([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0]]), k=1)
    second = neighborhood(np.array([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]]), k=1)
    # first: (1, .8, -1), (.8, 1, -.8), (-1, -.8, 1), means .8/3, 1/3, -.8/3; nearest 1, 0, 1.
    # second: (1, .6, 0), (.6, 1, -.8), (0, -.8, 1), means 1.6/3, .8/3, .2/3; nearest 1, 0, 0. Mutual: (0, 1), (1, 0).
    a, b = [0.8 - 0.8 / 3, 0.8 - 1 / 3, -0.8 + 0.8 / 3], [0.6 - 1.6 / 3, 0.6 - 0.8 / 3, 0 - 0.2 / 3]
    expected = (a[0] * b[0] + a[1] * b[1]) / np.sqrt(np.sum(np.square(a)) * np.sum(np.square(b)))
    assert cknna(first, second) == pytest.approx(expected)


def test_the_same_features_give_one_whatever_their_scale_and_turn() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 6))
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    space = neighborhood(features, 5)
    assert cknna(space, space) == pytest.approx(1)
    assert cknna(space, neighborhood(7 * features @ turn, 5)) == pytest.approx(1)
    told = calibrated_cknna(space, space)
    assert told["calibrated"] == pytest.approx(1)
    assert told["interval"] == pytest.approx([1, 1])
    assert told["p_value"] == pytest.approx(1 / 501)


def test_unrelated_features_are_calibrated_to_nothing() -> None:
    calibrated, p_values = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        first, second = (neighborhood(rng.normal(size=(60, 300)), 10) for _ in range(2))
        told = calibrated_cknna(first, second, seed)
        assert abs(told["raw"] - told["null_mean"]) < 0.06
        assert told["null_mean"] > 0.05, "in many dimensions unrelated features do not give 0"
        calibrated.append(told["calibrated"])
        p_values.append(told["p_value"])
    assert np.mean(calibrated) < 0.01
    assert 0.3 < np.mean(p_values) < 0.7


def test_the_null_is_what_shuffled_features_give() -> None:
    rng = np.random.default_rng(1)
    first, features = rng.normal(size=(30, 4)), rng.normal(size=(30, 5))
    shuffled = [cknna(neighborhood(first, 5), neighborhood(features[rng.permutation(30)], 5)) for _ in range(400)]
    told = calibrated_cknna(neighborhood(first, 5), neighborhood(features, 5))
    assert told["null_mean"] == pytest.approx(np.mean(shuffled), abs=0.01)
    assert told["null_95"] == pytest.approx(np.quantile(shuffled, 0.95), abs=0.02)


def test_the_difference_is_paired() -> None:
    rng = np.random.default_rng(2)
    target = rng.normal(size=(80, 5))
    near, far = target + 0.2 * rng.normal(size=target.shape), target + 2 * rng.normal(size=target.shape)
    spaces = [neighborhood(features, 8) for features in (far, near, target)]
    told = cknna_difference(*spaces)
    assert told["difference"] == pytest.approx(cknna(spaces[1], spaces[2]) - cknna(spaces[0], spaces[2]))
    assert not told["inside_noise"]
    same = cknna_difference(spaces[0], spaces[0], spaces[2])
    assert (same["difference"], same["interval"], same["inside_noise"]) == (0, [0, 0], True)


@pytest.mark.parametrize("count", [2, 3])
def test_of_so_few_objects_that_shuffled_pairs_are_the_same_ones_nothing_is_told(count: int) -> None:
    space = neighborhood(np.random.default_rng(0).normal(size=(count, 4)), count - 1)
    told = calibrated_cknna(space, space)
    assert told["raw"] == pytest.approx(1)
    assert told["null_95"] == pytest.approx(1)
    assert told["calibrated"] == 0


def test_too_few_objects() -> None:
    with pytest.raises(DataError, match="cannot find 5 neighbours among 5 objects"):
        neighborhood(np.eye(5), 5)
