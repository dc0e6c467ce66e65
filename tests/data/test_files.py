"""3D files: colours by material, sampling by area, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image
from trimesh.visual import ColorVisuals

from pointalign.data.files import UNCOLORED, load_mesh, sample_mesh
from pointalign.errors import DataError

RED, BLUE, CLEAR = (255, 0, 0, 255), (0, 0, 255, 255), (0, 255, 0, 0)


def write_obj(folder: Path, texels: list[list[tuple[int, int, int, int]]], scale_uv: float = 1.0) -> Path:
    """Two unit squares side by side: `painted` at x in [0, 1] with Kd 0.2 0.4 0.6, `printed` at x in [2, 3], textured."""
    Image.fromarray(np.array(texels, dtype=np.uint8)).save(folder / "print.png")
    (folder / "two.mtl").write_text("newmtl painted\nKd 0.2 0.4 0.6\nnewmtl printed\nKd 1 1 1\nmap_Kd print.png\n")
    (folder / "two.obj").write_text(
        "mtllib two.mtl\n"
        "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv 2 0 0\nv 3 0 0\nv 3 1 0\nv 2 1 0\n"
        f"vt 0 0\nvt {scale_uv} 0\nvt {scale_uv} 1\nvt 0 1\n"
        "usemtl painted\nf 1 2 3\nf 1 3 4\n"
        "usemtl printed\nf 5/1 6/2 7/3\nf 5/1 7/3 8/4\n"
    )
    return folder / "two.obj"


def test_each_material_keeps_its_color(tmp_path: Path) -> None:
    points = sample_mesh(load_mesh(write_obj(tmp_path, [[RED, BLUE]])), 4000, seed=0)
    painted, printed = points[points[:, 0] < 1.5], points[points[:, 0] > 1.5]
    np.testing.assert_allclose(painted[:, 3:], np.tile([0.2, 0.4, 0.6], (len(painted), 1)), atol=1 / 255)
    left = printed[:, 0] < 2.5
    assert (printed[left][:, 3:] == [1, 0, 0]).all()
    assert (printed[~left][:, 3:] == [0, 0, 1]).all()
    assert points.dtype == np.float32
    assert points.shape == (4000, 6)


def test_texture_rows_run_from_the_top(tmp_path: Path) -> None:
    points = sample_mesh(load_mesh(write_obj(tmp_path, [[RED], [BLUE]])), 2000, seed=0)
    printed = points[points[:, 0] > 1.5]
    assert (printed[printed[:, 1] > 0.5][:, 3:] == [1, 0, 0]).all()
    assert (printed[printed[:, 1] < 0.5][:, 3:] == [0, 0, 1]).all()


def test_texture_repeats_beyond_one(tmp_path: Path) -> None:
    points = sample_mesh(load_mesh(write_obj(tmp_path, [[RED, BLUE]], scale_uv=2.0)), 2000, seed=0)
    printed = points[points[:, 0] > 1.5]
    quarter = np.floor((printed[:, 0] - 2) * 4).astype(int)
    assert (printed[:, 5] == quarter % 2).all()


def test_transparent_texels_are_not_drawn(tmp_path: Path) -> None:
    points = sample_mesh(load_mesh(write_obj(tmp_path, [[RED, CLEAR]])), 4000, seed=0)
    printed = points[points[:, 0] > 1.5]
    assert (printed[:, 0] < 2.5).all()
    assert (printed[:, 3:] == [1, 0, 0]).all()


def test_points_are_drawn_by_area() -> None:
    small, large = trimesh.creation.box((1, 1, 1)), trimesh.creation.box((2, 2, 2))
    large.apply_translation((10, 0, 0))
    points = sample_mesh(trimesh.Scene([small, large]), 20000, seed=0)
    share = (points[:, 0] > 5).mean()
    assert abs(share - 24 / 30) < 0.02


def test_same_seed_same_points() -> None:
    box = trimesh.creation.box((1, 2, 3))
    np.testing.assert_array_equal(sample_mesh(box, 100, seed=3), sample_mesh(box, 100, seed=3))
    assert (sample_mesh(box, 100, seed=3) != sample_mesh(box, 100, seed=4)).any()


def test_scene_keeps_transforms_and_face_colors() -> None:
    box = trimesh.creation.box((1, 1, 1))
    box.visual = ColorVisuals(box, face_colors=[10, 20, 30, 255])
    scene = trimesh.Scene()
    scene.add_geometry(box, transform=trimesh.transformations.translation_matrix((5, 0, 0)))
    scene.add_geometry(trimesh.creation.box((1, 1, 1)))
    points = sample_mesh(scene, 1000, seed=0)
    moved = points[:, 0] > 2
    assert points[moved, 0].min() >= 4.5
    assert points[moved, 0].max() <= 5.5
    np.testing.assert_allclose(points[moved, 3:] * 255, np.tile([10, 20, 30], (moved.sum(), 1)), atol=1e-3)
    assert (points[~moved, 3:] == UNCOLORED).all()


def test_vertex_colors_blend() -> None:
    mesh = trimesh.Trimesh(
        [[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]], vertex_colors=[RED, (0, 255, 0, 255), BLUE], process=False
    )
    points = sample_mesh(mesh, 500, seed=0)
    np.testing.assert_allclose(points[:, 4], points[:, 0], atol=1e-6)
    np.testing.assert_allclose(points[:, 5], points[:, 1], atol=1e-6)


def test_errors_say_what_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no 3D file at .*; check the path"):
        load_mesh(tmp_path / "none.obj")
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(DataError, match=r"format '\.txt' is not one of \.obj"):
        load_mesh(tmp_path / "text.txt")
    (tmp_path / "empty.obj").write_text("# nothing\n")
    with pytest.raises(DataError, match=r"empty\.obj"):
        load_mesh(tmp_path / "empty.obj")
    (tmp_path / "broken.glb").write_bytes(b"glTF but not really")
    with pytest.raises(DataError, match=r"broken\.glb.*broken or cut short"):
        load_mesh(tmp_path / "broken.glb")
    with pytest.raises(DataError, match="ask for at least 1"):
        sample_mesh(trimesh.creation.box((1, 1, 1)), 0, seed=0)
    flat = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1, 2]], process=False)
    with pytest.raises(DataError, match="no area"):
        sample_mesh(flat, 10, seed=0)


def test_broken_texture_is_named(tmp_path: Path) -> None:
    path = write_obj(tmp_path, [[RED, BLUE]] * 64)
    data = (tmp_path / "print.png").read_bytes()
    (tmp_path / "print.png").write_bytes(data[: len(data) - 30])
    with pytest.raises(DataError, match="texture of material 'printed' is broken"):
        sample_mesh(load_mesh(path), 10, seed=0)
