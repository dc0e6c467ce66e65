"""Reports and figures: which answers are shown, what is written when a number is missing, figures of odd data."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image

from pointalign.evaluation.figures import Panel, draw_class_accuracy, draw_confusion, draw_contact_sheet, shown_classes
from pointalign.evaluation.report import cell, percent, pick_rows, points, write_overview


def row(number: int, label: str, right: bool | None, **values: Any) -> dict[str, Any]:
    return {"object_id": f"o{number}", "question": "I", "label": label, "right": right, **values}


def test_the_extremes_are_shown_one_of_each_class_first() -> None:
    rows = [row(number, "chair", True, margin=9.0 - number) for number in range(8)]
    rows += [row(8, "lamp", True, margin=0.5), row(9, "sofa", False, margin=-1.0), row(10, "sofa", False, margin=-3.0)]
    assert [one["object_id"] for one in pick_rows(rows, best=True)] == ["o0", "o1", "o2", "o3", "o4", "o5", "o6", "o8"]
    assert [one["object_id"] for one in pick_rows(rows, best=False)] == ["o10", "o9"]


def test_without_a_margin_the_order_is_that_of_the_ids() -> None:
    rows = [row(number, f"class {number}", number < 9) for number in (5, 3, 1, 9)]
    assert [one["object_id"] for one in pick_rows(rows, best=True)] == ["o1", "o3", "o5"]
    captions = [
        {"object_id": name, "question": "caption", "score": score} for name, score in (("a", 10.0), ("b", 90.0))
    ]
    assert [one["object_id"] for one in pick_rows(captions, best=True)] == ["b", "a"]
    assert [one["object_id"] for one in pick_rows(captions, best=False)] == ["a", "b"]


def test_answers_that_do_not_count_are_not_shown() -> None:
    rows = [row(0, "chair", None), row(1, "lamp", True)]
    assert [one["object_id"] for one in pick_rows(rows, best=True)] == ["o1"]
    assert pick_rows(rows, best=False) == []


def test_only_the_first_questions_answers_are_shown() -> None:
    rows = [row(0, "chair", True), {**row(0, "chair", True), "question": "C"}]
    assert len(pick_rows(rows, best=True)) == 1


def test_numbers_as_people_read_them() -> None:
    assert percent(0.125, [0.1, 0.2]) == "12.5 % (10.0 to 20.0)"
    assert points(41.26, [40, 42.5]) == "41.3 (40.0 to 42.5)"
    assert percent(None, None) == points(None, None) == "-"
    assert cell("a|b\nc") == "a\\|b c"
    assert cell("") == "(empty)"


def test_an_overview_without_a_number_says_so(tmp_path: Path) -> None:
    metrics = {"simcse": {"absent": "no Hub"}}
    numbers = {"judge": None, "n": 2, "invalid": 0, "metrics": metrics, "results": str(tmp_path / "x" / "results.json")}
    result = {"benchmark": "own-captioning", **numbers}
    write_overview(tmp_path / "report.md", "m", [result], {"modelnet40": "no file | there"})
    report = (tmp_path / "report.md").read_text()
    assert "| [own-captioning](x/report.md) | - | - | 2 | 0 |" in report
    assert "* modelnet40: no file \\| there" in report


def test_of_too_many_classes_the_most_frequent_are_drawn(tmp_path: Path) -> None:
    labels = [f"class {number}" for number in range(60) for _ in range(1 + (number < 40))]
    assert shown_classes(labels) == sorted(f"class {number}" for number in range(40))
    predicted = [None if index % 3 else label for index, label in enumerate(labels)]
    draw_confusion(labels, predicted, tmp_path / "confusion.png", "title")
    draw_class_accuracy(labels, [one is not None for one in predicted], tmp_path / "classes.png", "title")
    for name in ("confusion", "classes"):
        assert image.imread(tmp_path / f"{name}.png").std() > 0.01


@pytest.mark.parametrize(
    "points", [np.random.default_rng(0).random((9000, 6)), np.random.default_rng(0).random((50, 3))]
)
def test_a_contact_sheet_of_any_clouds_and_words(points: np.ndarray, tmp_path: Path) -> None:
    black = np.concatenate([points[:, :3], np.zeros_like(points[:, :3])], axis=1)
    odd = ("costs $5 or $6", "\u6905\u5b50 \x07", "word " * 300, "")
    panels = [Panel(points, "a chair", odd, True), Panel(black, "$x^2$ " * 30, ("said: it",), False)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_contact_sheet({"Right": panels * 3, "None": [], "Wrong": [Panel(points, "", ())]}, tmp_path / "x.png", "t")
    drawn = image.imread(tmp_path / "x.png")
    assert drawn.std() > 0.01
    assert drawn.shape[0] > drawn.shape[1] / 2
