"""Numbers over all answers: how often the commonest label comes, accuracy by class, who is taken for whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pointalign.errors import DataError
from pointalign.evaluation.statistics import wilson_interval


def majority_rate(labels: Sequence[str]) -> float:
    """Accuracy of always answering the most frequent label.

    Raises:
        DataError: without labels.
    """
    if not labels:
        raise DataError("there are no labels; evaluate at least one object")
    return Counter(labels).most_common(1)[0][1] / len(labels)


def class_accuracies(labels: Sequence[str], correct: Sequence[bool]) -> dict[str, dict[str, Any]]:
    """Accuracy of each class that occurs, the most frequent first.

    Args:
        labels: the true class of each object.
        correct: whether the answer about it was right.

    Returns:
        By class: `accuracy`, `n`, and its Wilson `interval`.
    """
    found = {}
    for name, n in sorted(Counter(labels).items(), key=lambda entry: (-entry[1], entry[0])):
        right = sum(good for label, good in zip(labels, correct, strict=True) if label == name)
        found[name] = {"accuracy": right / n, "n": n, "interval": list(wilson_interval(right, n))}
    return found


def mean_class_accuracy(classes: dict[str, dict[str, Any]]) -> float:
    """Mean over classes of `class_accuracies`: each class counts the same, however many objects it has."""
    return float(np.mean([entry["accuracy"] for entry in classes.values()]))


def confusion_matrix(
    labels: Sequence[str], predicted: Sequence[str | None], columns: Sequence[str], rows: Sequence[str]
) -> np.ndarray:
    """How often each class was taken for each.

    Args:
        labels: the true class of each object.
        predicted: the class read out of the answer; None where none could be.
        columns: classes that can be predicted.
        rows: true classes to show.

    Returns:
        (rows, columns + 1) counts; the last column is for answers without a class.
    """
    across = {name: index for index, name in enumerate(columns)}
    down = {name: index for index, name in enumerate(rows)}
    counts = np.zeros((len(rows), len(columns) + 1), dtype=int)
    for label, guess in zip(labels, predicted, strict=True):
        if label in down:
            counts[down[label], len(columns) if guess is None else across[guess]] += 1
    return counts
