"""Probes on made-up features whose right value is known."""

import numpy as np
import pytest

from pointalign.probing.probes import (
    Outcome,
    linear_class,
    linear_decoding,
    nearest_class,
    outcome_difference,
    standardized,
)

N = 200
FOLDS = [(np.arange(100), np.arange(100, N))]


def made_up(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (N, 12) in which three directions, of very unequal scale, hold the class; classes; other noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, N)
    features = rng.normal(size=(N, 12))
    features[:, :3] = 0.001 * (6 * np.eye(3)[labels] + rng.normal(size=(N, 3)))
    features[:, 3] *= 1000
    return features, np.array(["a", "b", "c"])[labels], rng.normal(size=(N, 12))


def test_classes_that_are_there_are_found_whatever_the_scale() -> None:
    features, labels, noise = made_up()
    assert linear_class(features, labels, FOLDS).value > 0.95
    assert nearest_class(features[:, :4], labels, FOLDS, 1).value > 0.9
    for probe in (linear_class, lambda *given: nearest_class(*given, 3)):
        found = probe(noise, labels, FOLDS)
        assert found.value == pytest.approx(1 / 3, abs=0.12)
        low, high = found.interval()
        assert low < found.value < high
        assert high - low == pytest.approx(2 * 1.96 * np.sqrt(found.value * (1 - found.value) / 100), rel=0.15)


def test_k_neighbours_vote() -> None:
    features = np.array([[0.0], [1.0], [1.1], [9.0], [0.1]])
    labels = np.array(["a", "b", "b", "b", "a"])
    folds = [(np.arange(4), np.array([4]))]
    assert nearest_class(features, labels, folds, 1).value == 1
    assert nearest_class(features, labels, folds, 3).value == 0


def test_linear_decoding_finds_the_share_that_is_linear() -> None:
    rng = np.random.default_rng(3)
    features, hidden = rng.normal(size=(N, 5)), rng.normal(size=(N, 2))
    signal = features @ rng.normal(size=(5, 2))
    signal = signal / signal.std(axis=0)
    assert linear_decoding(features, 5 + 100 * signal, FOLDS).value > 0.999
    assert linear_decoding(features, signal + hidden, FOLDS).value == pytest.approx(0.5, abs=0.12)
    assert linear_decoding(features, hidden, FOLDS).value < 0.05
    half = linear_decoding(features, np.stack([1e6 * signal[:, 0], hidden[:, 0]], axis=1), FOLDS).value
    assert half == pytest.approx(0.5, abs=0.1), "targets count equally, whatever their scale"


def test_r2_by_hand_and_tokens_of_an_object_together() -> None:
    features = np.array([[[1.0], [-1.0]], [[1.0], [-1.0]], [[1.0], [-1.0]]])
    targets = np.array([[[2.0], [-2.0]], [[2.0], [-2.0]], [[4.0], [-2.0]]])
    found = linear_decoding(features, targets, [(np.arange(2), np.array([2]))])
    # Fitted without rest (the smallest penalty): 2 and -2 in deviations of 2, so wrong by 2 / 2 in one token.
    assert found.lost == pytest.approx([1.0], abs=0.02)
    assert found.possible == pytest.approx([2.0**2 + 1.0**2])
    assert found.value == pytest.approx(1 - 1 / 5, abs=0.01)


def test_every_fold_counts_in_its_order() -> None:
    features, labels, _ = made_up()
    folds = [(np.arange(100, N), np.arange(100)), *FOLDS]
    found = linear_class(features, labels, folds)
    assert len(found.lost) == N
    assert found.lost[100:].tolist() == linear_class(features, labels, FOLDS).lost.tolist()


def test_the_difference_of_two_models_is_paired() -> None:
    features, labels, noise = made_up()
    good, bad = linear_class(features, labels, FOLDS), linear_class(noise, labels, FOLDS)
    told = outcome_difference(bad, good)
    assert told["difference"] == pytest.approx(good.value - bad.value)
    assert not told["inside_noise"]
    assert outcome_difference(good, good) == {
        "difference": 0.0,
        "interval": [0.0, 0.0],
        "p_value": 1.0,
        "inside_noise": True,
    }


@pytest.mark.parametrize("better", [5, 6])
def test_few_objects_that_differ_tell_no_difference(better: int) -> None:
    lost = np.array([1.0] * better + [0.0] * (100 - better))
    told = outcome_difference(Outcome(lost, np.ones(100)), Outcome(np.zeros(100), np.ones(100)))
    assert told["interval"][0] > 0
    assert told["p_value"] == pytest.approx(2 / 2**better)
    assert told["inside_noise"] == (better == 5)


def test_a_column_that_does_not_vary_is_no_number() -> None:
    known, asked = standardized(np.array([[1.0, 3.0], [1.0, 5.0]]), np.array([[2.0, 4.0]]))
    assert known.tolist() == [[0, -1], [0, 1]]
    assert asked.tolist() == [[0, 0]]
