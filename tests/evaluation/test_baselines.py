"""Baselines without learning of shape: what they predict on made-up objects, and in an evaluation in a model's place."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pointalign.cli import main
from pointalign.data.household import HouseholdObject, household_classes, load_household
from pointalign.data.household_split import household_sides
from pointalign.data.household_text import reference_caption
from pointalign.evaluation import baselines
from pointalign.evaluation.baselines import chamfer, forest, forest_without_size, histograms, most_frequent
from pointalign.evaluation.results import read_results

CLASSES = ["ball", "pole", "slab"]
STRETCH = {"ball": (1.0, 1.0, 1.0), "pole": (0.1, 1.0, 0.1), "slab": (1.0, 0.1, 1.0)}


def make_object(name: str, label: str, seed: int, size: float = 10.0, color: float = 0.5) -> HouseholdObject:
    """An ellipsoid's surface whose stretch is its class."""
    rng = np.random.default_rng(seed)
    xyz = rng.normal(size=(600, 3))
    xyz = xyz / np.linalg.norm(xyz, axis=1, keepdims=True) * STRETCH[label]
    xyz = xyz - xyz.mean(axis=0)
    xyz = xyz / np.linalg.norm(xyz, axis=1).max()
    points = np.concatenate([xyz, np.full((600, 3), color)], axis=1).astype(np.float32)
    return HouseholdObject(
        id=name, name=name, category="", tags=(), creator="", licence="", source="", size_cm=(size, size, size),
        label=label, noun=f"a {label}", family=name, split="train", points=points,
    )  # fmt: skip


@pytest.fixture
def things() -> list[HouseholdObject]:
    labels = ["ball", "pole", "slab", "pole", "slab", "pole"]
    return [make_object(f"o{number}", label, number) for number, label in enumerate(labels)]


def predicted(found: Any) -> list[str]:
    return [CLASSES[int(np.argmax(one.scores))] for one in found]


def test_the_most_frequent(things: list[HouseholdObject]) -> None:
    found = most_frequent(things, things[:2], CLASSES, lambda count: None)
    assert predicted(found) == ["pole", "pole"]
    assert found[0].scores == pytest.approx([np.log(1 / 6), np.log(3 / 6), np.log(2 / 6)])
    assert found[0].caption == reference_caption(things[1])


def test_chamfer_finds_the_shape_and_gives_minus_the_distance(things: list[HouseholdObject]) -> None:
    asked = [make_object("x", "slab", 9), things[1]]
    done: list[int] = []
    found = chamfer(things, asked, [*CLASSES, "absent"], done.append)
    assert done == [1, 1]
    assert [int(np.argmax(one.scores)) for one in found] == [2, 1]
    assert found[0].caption == reference_caption(things[2])
    assert found[1].scores[1] == pytest.approx(0, abs=2e-3), "the object itself is among the training objects"
    assert found[0].scores[3] == -2.0
    from scipy.spatial import KDTree

    first, second = (thing.points[: baselines.CHAMFER_POINTS, :3] for thing in (asked[0], things[0]))
    expected = (KDTree(first).query(second)[0].mean() + KDTree(second).query(first)[0].mean()) / 2
    assert found[0].scores[0] == pytest.approx(-expected, abs=1e-4)


def test_the_forest_sees_shape_color_and_only_when_told_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "TREES", 20)
    shapes = [make_object(f"s{n}", CLASSES[n % 3], n) for n in range(12)]
    asked = [make_object("x", name, 50 + n) for n, name in enumerate(CLASSES)]
    assert predicted(forest_without_size(shapes, asked, CLASSES, lambda count: None)) == CLASSES
    # Here the label is in the size alone: every object is a ball of one colour.
    balls = [replace(make_object(f"b{n}", "ball", 0, size=10.0 ** (n % 3)), label=CLASSES[n % 3]) for n in range(12)]
    asked = [make_object("y", "ball", 0, size=10.0**n) for n in range(3)]
    assert predicted(forest(balls, asked, CLASSES, lambda count: None)) == CLASSES
    assert len(set(predicted(forest_without_size(balls, asked, CLASSES, lambda count: None)))) == 1


def test_the_forests_caption_is_of_the_object_that_shares_its_leaves(things: list[HouseholdObject]) -> None:
    found = forest(things, things, CLASSES, lambda count: None)
    assert [one.caption for one in found] == [reference_caption(thing) for thing in things]


def test_histograms_are_shares() -> None:
    thing = make_object("x", "pole", 0, color=1.0)
    values = histograms(thing, with_size=True)
    assert values[:3] == pytest.approx(np.ptp(thing.points[:, :3], axis=0) / np.ptp(thing.points[:, 1]), abs=1e-6)
    edges = np.cumsum([3, 32, 16, 16, 16, 64])
    for start, end in pairwise(edges):
        assert values[start:end].sum() == pytest.approx(1)
    assert values[edges[5] - 1] == 1, "white is the last cell"
    assert values[-3:] == pytest.approx(np.log([10, 10, 10]))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_a_baseline_is_evaluated_and_compared_like_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "TREES", 10)
    classes = ["--benchmark", "household-classification", "--limit", "6"]
    for name in ("most-frequent", "forest"):
        status, out, err = run(capsys, "--model", f"baseline:{name}", *classes, "--out", str(tmp_path / name))
        assert status == 0, err
        told = json.loads(out.splitlines()[-1])
        assert (told["n"], told["model"]) == (6, f"baseline:{name}")
    result = read_results(tmp_path / "most-frequent")
    assert [row["predicted"] for row in result["objects"]] == ["chair"] * 6
    assert [row["right"] for row in result["objects"]] == [
        thing.label == "chair" for thing in load_household("test")[:6]
    ]
    assert {row["model_output"] for row in result["objects"]} == {"This is a chair."}
    more = [*classes[:-1], "8", "--out", str(tmp_path / "most-frequent")]
    status, out, err = run(capsys, "--model", "baseline:most-frequent", *more)
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["n"] == 8
    assert run(capsys, "--model", "baseline:most-frequent", *classes, "--out", str(tmp_path / "most-frequent"))[0] == 0
    monkeypatch.setitem(baselines.BASELINES, "forest", lambda *given: pytest.fail("predicted again"))
    status, *_ = run(capsys, "--model", "baseline:forest", *classes, "--out", str(tmp_path / "forest"))
    assert status == 0
    sides = [str(tmp_path / name) for name in ("most-frequent", "forest")]
    with pytest.raises(SystemExit) as ended:
        main(["compare", *sides, "--out", str(tmp_path / "compared")])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n"] == 6


def test_a_baseline_learns_from_all_that_is_not_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "household-classification-validation-1"
    arguments = ["--model", "baseline:chamfer", "--held-out", "validation-1", "--benchmark", "household-classification"]
    status, _, err = run(capsys, *arguments, "--limit", "4", "--out", str(tmp_path))
    assert status == 0, err
    known, asked = household_sides("validation-1")
    told = [row["predicted"] for row in read_results(tmp_path / name)["objects"]]
    classes = household_classes()
    expected = chamfer(known, asked[:4], classes, lambda count: None)
    assert told == [classes[int(np.argmax(one.scores))] for one in expected]
    assert {thing.id for thing in known}.isdisjoint(thing.id for thing in asked)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "baseline:oracle"], "there is no baseline 'oracle'; known are baseline:most-frequent, "),
        (["--model", "baseline:forest", "--benchmark", "language-retention"], "leave language-retention out"),
        (["--model", "baseline:forest", "--as-released"], "leave --as-released out"),
    ],
)
def test_bad_input(arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *arguments, "--out", str(tmp_path / "out"))
    assert (status, out) == (1, "")
    assert told in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_all_leaves_out_what_a_baseline_cannot_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "--model", "baseline:most-frequent", "--benchmark", "all", "--limit", "3")
    assert status == 0, err
    told = json.loads(out.splitlines()[-1])
    assert set(told["benchmarks"]) == {"household-classification", "household-captioning"}
    assert "language-retention" in told["skipped"] or "modelnet40" in told["skipped"]
    out = tmp_path / "runs" / "evaluation" / "baseline--most-frequent"
    assert (out / "report.md").is_file()
    caption = min(row["model_output"] for row in read_results(out / "household-captioning")["objects"])
    assert caption == "This is an appliance: a radiator. It is mainly white. It is long and narrow."


def test_the_classes_of_a_baseline_are_the_benchmarks() -> None:
    assert {thing.label for thing in load_household("test")} <= set(household_classes())
