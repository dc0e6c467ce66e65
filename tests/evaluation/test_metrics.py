"""Numbers over all answers against values worked out by hand."""

from __future__ import annotations

import pytest

from pointalign.errors import DataError
from pointalign.evaluation.metrics import class_accuracies, confusion_matrix, majority_rate, mean_class_accuracy
from pointalign.evaluation.statistics import wilson_interval


def test_majority_rate() -> None:
    assert majority_rate(["a", "b", "a", "c"]) == 0.5
    with pytest.raises(DataError, match="no labels"):
        majority_rate([])


def test_accuracy_by_class_and_its_mean() -> None:
    classes = class_accuracies(["a", "a", "a", "b"], [True, True, False, False])
    assert list(classes) == ["a", "b"]
    assert classes["a"] == {"accuracy": 2 / 3, "n": 3, "interval": list(wilson_interval(2, 3))}
    assert mean_class_accuracy(classes) == pytest.approx((2 / 3 + 0) / 2)


def test_confusion_counts_rows_by_truth_and_ends_with_no_class() -> None:
    counts = confusion_matrix(["a", "a", "b", "c"], ["a", "b", None, "a"], columns=["a", "b"], rows=["a", "b"])
    assert counts.tolist() == [[1, 1, 0], [0, 0, 1]]
