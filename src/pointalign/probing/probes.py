"""Probes: what can be read out of features by nearest neighbours or by one linear map, scored on objects not fitted on.

Every probe gives one number pair per object, so that two models are compared over the same objects.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pointalign.evaluation.statistics import bootstrap_ratio, verdict

PENALTIES = tuple(10.0**power for power in range(-2, 7))

Folds = Sequence[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Outcome:
    """How well a probe did, object by object; its value is 1 - sum(lost) / sum(possible).

    Args:
        lost: (n,): 1 for a wrong class; the squared error of a decoding.
        possible: (n,): 1; the squared distance from the fitted objects' mean, so that the value is R2.
    """

    lost: np.ndarray
    possible: np.ndarray

    @property
    def value(self) -> float:
        """Accuracy, or R2, which is below 0 for a decoding worse than the mean."""
        return float(1 - self.lost.sum() / self.possible.sum())

    def interval(self, seed: int = 0) -> list[float]:
        """95 % interval of the value by the bootstrap over objects."""
        low, high = bootstrap_ratio(self.lost, self.possible, seed)
        return [1 - high, 1 - low]


def outcome_difference(first: Outcome, second: Outcome, seed: int = 0) -> dict[str, Any]:
    """Second minus first over the same objects, both scored against the same possible loss.

    Returns:
        `difference`, its paired 95 % `interval`, and of `verdict` the `p_value` and `inside_noise`.
    """
    gained = first.lost - second.lost
    interval = list(bootstrap_ratio(gained, second.possible, seed))
    difference = float(gained.sum() / second.possible.sum())
    return {"difference": difference, "interval": interval, **verdict(gained, interval, seed)}


def nearest_class(features: np.ndarray, labels: np.ndarray, folds: Folds, k: int) -> Outcome:
    """Accuracy of the k nearest fitted objects' most frequent class, by Euclidean distance of standardised features.

    Args:
        features: (objects, D).
        labels: (objects,) class names.
        folds: pairs of indices: fitted on, scored on; each object is scored at most once, and only scored ones count.
        k: neighbours; of equally frequent classes the one first in the alphabet counts.

    Source: the measure of PointAlign's Figure 3 (arXiv 2603.00412), there with k=1 at its best.
    """
    from sklearn.neighbors import KNeighborsClassifier

    return _classify(KNeighborsClassifier(k), features, labels, folds)


def linear_class(features: np.ndarray, labels: np.ndarray, folds: Folds) -> Outcome:
    """Accuracy of a linear classifier (ridge on one-hot classes, its penalty by leave-one-out); as `nearest_class`.

    Source: linear probes after Alain and Bengio 2016 (arXiv 1610.01644).
    """
    from sklearn.linear_model import RidgeClassifierCV

    return _classify(RidgeClassifierCV(PENALTIES), features, labels, folds)


def _classify(model: Any, features: np.ndarray, labels: np.ndarray, folds: Folds) -> Outcome:
    wrong = []
    for fitted, scored in folds:
        known, asked = standardized(features[fitted], features[scored])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of classes with a single object
            found = model.fit(known, labels[fitted]).predict(asked)
        wrong.append(found != labels[scored])
    lost = np.concatenate(wrong).astype(float)
    return Outcome(lost, np.ones_like(lost))


def linear_decoding(features: np.ndarray, targets: np.ndarray, folds: Folds) -> Outcome:
    """R2 of a linear map (ridge, its penalty by leave-one-out for each target) from features to targets.

    Targets count equally: each is divided by its deviation over the fitted objects. R2 is against the fitted mean.

    Args:
        features: (objects, D), or (objects, S, D) of several tokens each, which are decoded by one map.
        targets: (objects, T), or (objects, S, T).
        folds: as in `nearest_class`.
    """
    from sklearn.linear_model import RidgeCV

    lost, possible = [], []
    for fitted, scored in folds:
        known, asked = standardized(_rows(features[fitted]), _rows(features[scored]))
        wanted, truth = standardized(_rows(targets[fitted]), _rows(targets[scored]))
        found = RidgeCV(PENALTIES, alpha_per_target=True).fit(known, wanted).predict(asked)
        errors = np.square(found.reshape(truth.shape) - truth)
        lost.append(errors.reshape(len(scored), -1).sum(axis=1))
        possible.append(np.square(truth).reshape(len(scored), -1).sum(axis=1))
    return Outcome(np.concatenate(lost), np.concatenate(possible))


def _rows(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, values.shape[-1])


def standardized(known: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both with the mean and deviation of the known rows; a column that does not vary becomes zeros."""
    mean, deviation = known.mean(axis=0, dtype=float), known.std(axis=0, dtype=float)
    scale = np.where(deviation > 1e-8 * np.maximum(np.abs(mean), 1), 1 / np.maximum(deviation, 1e-300), 0)
    return (known - mean) * scale, (asked - mean) * scale
