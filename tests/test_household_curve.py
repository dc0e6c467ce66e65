"""The curve over training objects: what each of its encoders is trained on, and how the baselines are scored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarking import BENCHMARKS, load_script
from pointalign.config import Recipe, load_recipe
from pointalign.data.household_split import household_sides


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(BENCHMARKS / "household_curve.py")


def test_only_the_objects_and_the_steps_differ_from_the_bundled_encoder(script: ModuleType) -> None:
    recipe, bundled = script.encoder_recipe("validation-0", 0.25, 400, None), load_recipe("household-135m-encoder")
    assert (recipe.data.fraction, recipe.data.extra, recipe.data.held_out) == (0.25, None, "validation-0")
    recipe.data, recipe.optimizer.max_steps = bundled.data, bundled.optimizer.max_steps
    assert recipe == bundled
    assert script.encoder_recipe("fold-1", 1.0, 9, Path("x.parquet")).data.extra == "x.parquet"


def test_a_wider_encoder_has_more_heads_of_the_same_width(script: ModuleType) -> None:
    recipe, usual = (script.encoder_recipe("fold-1", 1.0, 9, None, width) for width in (384, 192))
    wide = recipe.model.point_encoder
    assert (wide.hidden_size, wide.num_attention_heads) == (384, 12)
    assert (wide.group_hidden_sizes, wide.group_width) == ([96, 192, 384], 256)
    recipe.model.point_encoder = usual.model.point_encoder
    assert recipe == usual


def test_baselines_are_right_where_their_best_class_is_the_objects(script: ModuleType) -> None:
    known, asked = household_sides("validation-0")
    labels = [thing.label for thing in known]
    largest = max(sorted(set(labels)), key=labels.count)
    right = script.baseline_right("most-frequent", known, asked[:20])
    assert right == [thing.label == largest for thing in asked[:20]]
    nearest = script.baseline_right("chamfer", known[:30], known[:5])
    assert nearest == [True] * 5, "each is its own nearest neighbour"


def test_the_figure(script: ModuleType, tmp_path: Path) -> None:
    row = {"mean": 0.4, "n": 142, "interval": [0.3, 0.5]}
    points = [
        {"method": method, "objects": count, "extra": 0, "width": None, "parameters": None, "steps": None, **row}
        for method in ("forest", "chamfer")
        for count in (144, 578)
    ]
    for count, extra, width, steps in (
        (144, 0, 192, 400),
        (578, 0, 192, 400),
        (578, 2935, 192, 400),
        (578, 2935, 192, 1600),
        (578, 0, 384, 400),
        (578, 0, 192, 1600),
    ):
        encoder = {"method": "encoder", "width": width, "parameters": 10_000 * width, "steps": steps}
        points.append({**encoder, "objects": count, "extra": extra, **row})
    script.draw_curve(points, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_trains_and_scores_every_point(
    script: ModuleType, write_extra: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """A step or two each, learnt from and scored on a few objects."""
    known, asked = household_sides("validation-0")
    monkeypatch.setattr(script, "household_sides", lambda part: (known[:24], asked[:10]))
    whole = script.encoder_recipe

    def small(part: str, share: float, *given: Any) -> Recipe:
        recipe = whole(part, 0.02 * share, *given)
        recipe.data.sets = [replace(each, batch_size=6) for each in recipe.data.sets]
        return recipe

    monkeypatch.setattr(script, "encoder_recipe", small)
    extra = write_extra(tmp_path / "extra.parquet", ["chair", "lamp", "cup"] * 5)
    arguments = ["--extra", str(extra), "--out", str(tmp_path / "curve"), "--fractions", "1", "--widths", "96"]
    script.main([*arguments, "--steps", "1", "2", "--extra-steps", "1"])
    told = json.loads(capsys.readouterr().out)["points"]
    points = [tuple(point[name] for name in ("method", "objects", "extra", "width", "steps")) for point in told]
    assert points == [
        ("encoder", 24, 0, 192, 1),
        ("forest", 24, 0, None, None),
        ("chamfer", 24, 0, None, None),
        ("encoder", 24, 0, 192, 2),
        ("encoder", 24, 0, 96, 1),
        ("encoder", 24, 15, 192, 1),
    ]
    assert 3 < told[0]["parameters"] / told[4]["parameters"] < 4
    assert {point["n"] for point in told} == {10}
    assert (tmp_path / "curve" / "curve.png").is_file()


def test_without_the_extra_objects_it_says_how_to_get_them(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is not there; build it with"):
        script.main(["--extra", str(tmp_path / "none.parquet")])
