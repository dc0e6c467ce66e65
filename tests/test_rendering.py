"""Pictures of one cloud: what is near hides what is far, every view from its side."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pointalign import load_point_cloud
from pointalign.cli import main
from pointalign.errors import CheckpointError, ConfigError, DataError
from pointalign.rendering import VIEWS, ball_size, draw_views, looking, render_file, shade, splat

RED, GREEN, BLUE = np.eye(3)


def middle(image: np.ndarray) -> np.ndarray:
    return image[image.shape[0] // 2, image.shape[1] // 2]


@pytest.mark.parametrize("name", VIEWS)
def test_axes_of_a_view(name: str) -> None:
    axes = looking(*VIEWS[name])
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(axes) == pytest.approx(1), "what is on the right stays on the right"
    assert axes[1, 1] >= -1e-12, "up is up"


def test_the_nearer_point_hides_the_farther() -> None:
    xyz = np.array([[0.0, 0, 1], [0, 0, -1], [1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    rgb = np.array([RED, GREEN, BLUE, BLUE * 0.5, RED + GREEN, GREEN + BLUE])
    sides = {
        (0, 0): RED,
        (180, 0): GREEN,
        (90, 0): BLUE,
        (270, 0): BLUE * 0.5,
        (0, 90): RED + GREEN,
        (0, -90): GREEN + BLUE,
    }
    for angles, color in sides.items():
        shown = middle(splat(xyz @ looking(*angles).T, rgb, 1.2, 81, 0.05))
        np.testing.assert_allclose(shown / shown.max(), color / color.max(), atol=1e-6, err_msg=str(angles))


def test_right_is_right_and_up_is_up() -> None:
    seen = np.array([[0.5, 0, 0], [0, 0.5, 0]]) @ looking(0, 0).T
    image = splat(seen, np.array([RED, BLUE]), 1.0, 100, 0.05)
    assert image[50, 75].argmax() == 0
    assert image[25, 50].argmax() == 2
    assert (image[75, 25] == 1).all(), "white where nothing is"


def test_light_falls_off_behind_an_edge() -> None:
    depth = np.full((21, 21), -1.0)
    depth[:, :10] = 1.0
    light = shade(depth, size=0.1)
    assert light[10, 3] == light[10, 17] == 1
    assert light[10, 10] < light[10, 9]
    assert (shade(np.full((9, 9), -np.inf), 0.1)[4, 4], light.min() > 0) == (1, True)


def test_balls_close_a_surface() -> None:
    side = np.arange(40) / 20 - 1
    plane = np.stack([*np.meshgrid(side, side), np.zeros((40, 40))], axis=-1).reshape(-1, 3)
    assert ball_size(plane) == pytest.approx(0.85 / 20)
    image = splat(plane, np.tile(BLUE, (1600, 1)), 1.2, 400, ball_size(plane))
    assert (image[60:330, 60:330, 0] == 0).all(), "no white between the balls"
    assert ball_size(np.zeros((5, 3))) == ball_size(np.zeros((1, 3))) == 0


@pytest.mark.parametrize("points", [np.zeros((1, 3)), np.zeros((5, 3)), np.eye(3)])
@pytest.mark.parametrize("colored", [True, False])
def test_any_cloud_can_be_drawn(
    tmp_path: Path, points: np.ndarray, colored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pointalign.rendering.PIXELS", 150)
    colors = np.zeros(points.shape) if colored else None
    draw_views(points, colors, tmp_path / "a.png", r"$\frac{no formula$.ply", r"a; $\b; c")
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    assert picture.shape[0] > 600
    assert (picture < 250).any()


def test_the_verb(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POINTALIGN_MODEL", str(tiny_model))
    np.save(tmp_path / "cloud.npy", np.random.default_rng(0).random((300, 3)))
    with pytest.raises(SystemExit) as ended:
        main(["render", str(tmp_path / "cloud.npy"), "--out", str(tmp_path / "a.png"), "--points", "100", "--up", "z"])
    told, shown = capsys.readouterr()
    result = json.loads(shown if shown.startswith("{") else told)
    assert ended.value.code == 0
    assert result["points"] == 100
    assert result["colored"] is False
    assert "z was up: turned so that y is" in result["notes"]
    with Image.open(tmp_path / "a.png") as image:
        assert image.size[0] > 1000
    os.rename(tmp_path / "cloud.npy", tmp_path / "clo\udcffud.npy")  # a byte that is not UTF-8
    assert render_file(str(tmp_path / "clo\udcffud.npy"), tmp_path / "c.png", num_points=100)["points"] == 100
    with pytest.raises(DataError, match="cannot give 0 points"):
        render_file(str(tmp_path / "clo\udcffud.npy"), tmp_path / "c.png", num_points=0)
    with pytest.raises(SystemExit) as ended:
        main(["render", str(tmp_path / "none.npy"), "--out", str(tmp_path / "b.png")])
    assert ended.value.code == 1
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize("name", ["x.bmp", "x"])
def test_pictures_are_pngs(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"pictures are PNGs; name a file that ends in .png"):
        render_file("examples/chair.glb", tmp_path / name)


def test_with_a_model_its_points_and_its_missing_color(tmp_path: Path, processor: object) -> None:
    processor.missing_color = [0.5, 0.25, 0.0]  # pyright: ignore[reportAttributeAccessIssue]
    processor.save_pretrained(tmp_path / "model")  # pyright: ignore[reportAttributeAccessIssue]
    (tmp_path / "model" / "config.json").write_text("{}")  # the model itself is not loaded
    np.save(tmp_path / "cloud.npy", np.random.default_rng(0).random((300, 3)))
    result = render_file(str(tmp_path / "cloud.npy"), tmp_path / "a.png", model=str(tmp_path / "model"))
    assert result["points"] == processor.num_points  # pyright: ignore[reportAttributeAccessIssue]
    assert "no colour: filled with (0.5, 0.25, 0), as in the model's own data" in result["notes"]
    with pytest.raises(CheckpointError):
        render_file(str(tmp_path / "cloud.npy"), tmp_path / "a.png", model=str(tmp_path / "no model"))


@pytest.mark.skipif(sys.platform == "win32", reason="display variables are a matter of other systems")
def test_no_screen_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("MPLBACKEND", "TkAgg")
    np.save(tmp_path / "cloud.npy", np.random.default_rng(0).random((30, 3)))
    cloud = load_point_cloud(tmp_path / "cloud.npy")
    draw_views(cloud.points, cloud.colors, tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").stat().st_size > 1000
