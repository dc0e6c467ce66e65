"""Meshes: colours by material, sampling by area, companions from the mesh's own folder only."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_files
import trimesh
from small_files import CORNERS, png
from trimesh.resolvers import FilePathResolver
from trimesh.visual import ColorVisuals

from pointalign import PointCloud, load_point_cloud
from pointalign.data.files.meshes import read_mesh, sample_mesh
from pointalign.data.files.obj import parse_materials
from pointalign.data.files.polygons import checked_faces, cut_polygons, fans
from pointalign.data.files.surface import CLAMP, MIRROR, REPEAT, UNCOLORED, Paint, Part, _wrapped, sample_surface
from pointalign.errors import DataError, MissingDependencyError

RED, BLUE, CLEAR = (255, 0, 0, 255), (0, 0, 255, 255), (0, 255, 0, 0)
READERS = ["by trimesh", "by ours"]


def write_obj(folder: Path, texels: list[list[tuple[int, int, int, int]]], scale_uv: float = 1.0) -> Path:
    """Two unit squares side by side: `painted` at x in [0, 1] with Kd 0.2 0.4 0.6, `printed` at x in [2, 3], textured."""
    (folder / "print.png").write_bytes(png(texels))  # pyright: ignore[reportArgumentType]
    (folder / "two.mtl").write_text("newmtl painted\nKd 0.2 0.4 0.6\nnewmtl printed\nKd 1 1 1\nmap_Kd print.png\n")
    (folder / "two.obj").write_text(
        "mtllib two.mtl\n"
        "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv 2 0 0\nv 3 0 0\nv 3 1 0\nv 2 1 0\n"
        f"vt 0 0\nvt {scale_uv} 0\nvt {scale_uv} 1\nvt 0 1\n"
        "usemtl painted\nf 1 2 3\nf 1 3 4\n"
        "usemtl printed\nf 5/1 6/2 7/3\nf 5/1 7/3 8/4\n"
    )
    return folder / "two.obj"


def drawn(path: Path, reader: str, count: int = 3000) -> np.ndarray:
    """Points of an .obj as the household build reads it, or as `load_point_cloud` does."""
    if reader == "by trimesh":
        with path.open("rb") as file:
            return sample_mesh(read_mesh(file, "obj", FilePathResolver(str(path)), str(path)), count, seed=0)
    return load_point_cloud(path, n_points=count // 4).array()


def told(cloud: PointCloud, word: str) -> bool:
    return any(word in note for note in cloud.notes)


# Both readers of .obj


@pytest.mark.parametrize("reader", READERS)
def test_each_material_keeps_its_color(tmp_path: Path, reader: str) -> None:
    points = drawn(write_obj(tmp_path, [[RED, BLUE]]), reader)
    painted, printed = points[points[:, 0] < 1.5], points[points[:, 0] > 1.5]
    np.testing.assert_allclose(painted[:, 3:], np.tile([0.2, 0.4, 0.6], (len(painted), 1)), atol=1 / 255)
    left = printed[:, 0] < 2.5
    assert (printed[left][:, 3:] == [1, 0, 0]).all()
    assert (printed[~left][:, 3:] == [0, 0, 1]).all()
    assert points.dtype == np.float32
    assert 300 < len(printed) < len(points)


@pytest.mark.parametrize("reader", READERS)
def test_texture_rows_run_from_the_top(tmp_path: Path, reader: str) -> None:
    points = drawn(write_obj(tmp_path, [[RED], [BLUE]]), reader)
    printed = points[points[:, 0] > 1.5]
    assert (printed[printed[:, 1] > 0.5][:, 3:] == [1, 0, 0]).all()
    assert (printed[printed[:, 1] < 0.5][:, 3:] == [0, 0, 1]).all()


@pytest.mark.parametrize("reader", READERS)
def test_texture_repeats_beyond_one(tmp_path: Path, reader: str) -> None:
    points = drawn(write_obj(tmp_path, [[RED, BLUE]], scale_uv=2.0), reader)
    printed = points[points[:, 0] > 1.5]
    quarter = np.floor((printed[:, 0].astype(np.float64) - 2) * 4).astype(int)
    assert (printed[:, 5] == quarter % 2).mean() > 0.999


@pytest.mark.parametrize("reader", READERS)
def test_transparent_texels_are_not_drawn(tmp_path: Path, reader: str) -> None:
    points = drawn(write_obj(tmp_path, [[RED, CLEAR]]), reader)
    printed = points[points[:, 0] > 1.5]
    assert (printed[:, 0] < 2.5 + 1e-6).all()
    assert (printed[:, 3:] == [1, 0, 0]).all()


@pytest.mark.parametrize("reader", READERS)
def test_broken_texture_is_named(tmp_path: Path, reader: str) -> None:
    path = write_obj(tmp_path, [[RED, BLUE]] * 64)
    data = (tmp_path / "print.png").read_bytes()
    (tmp_path / "print.png").write_bytes(data[: len(data) - 30])
    with pytest.raises(DataError, match=r"texture .* is broken"):
        drawn(path, reader)


# Sampling


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


def test_what_cannot_be_drawn_from() -> None:
    with pytest.raises(DataError, match="ask for at least 1"):
        sample_mesh(trimesh.creation.box((1, 1, 1)), 0, seed=0)
    flat = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1, 2]], process=False)
    with pytest.raises(DataError, match="without area"):
        sample_mesh(flat, 10, seed=0)
    with pytest.raises(DataError, match="holds no faces"):
        sample_surface([], 10, seed=0)


def test_a_part_that_is_not_seen_is_drawn_only_where_nothing_is() -> None:
    def part(x: float, opacity: float) -> Part:
        return Part(CORNERS + np.array([x, 0, 0]), small_files.FACES, Paint(np.ones(4), opacity=opacity))

    points = sample_surface([part(0, 0.0), part(10, 1.0)], 200, seed=0).points
    assert (points[:, 0] >= 10).all()
    assert (sample_surface([part(0, 0.0)], 200, seed=0).points[:, 0] <= 2).all()


def test_how_textures_go_on() -> None:
    places = np.arange(-5, 6)
    assert _wrapped(places, 3, REPEAT).tolist() == [1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert _wrapped(places, 3, CLAMP).tolist() == [0, 0, 0, 0, 0, 0, 1, 2, 2, 2, 2]
    assert _wrapped(places, 3, MIRROR).tolist() == [1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0]


def test_fans() -> None:
    counts = np.array([3, 5, 2, 0, 4])
    starts = np.cumsum(counts) - counts
    cut = fans(counts, "x")
    flat = np.arange(14)
    expected = [[0, 1, 2], [3, 4, 5], [3, 5, 6], [3, 6, 7], [10, 11, 12], [10, 12, 13]]
    assert cut.of_corners(flat, starts).tolist() == expected
    assert cut.of_polygons(np.array(list("abcde"))).tolist() == list("abbbee")
    assert cut.places(10 * starts, step=2)[-1].tolist() == [100, 104, 106]
    triangles = fans(np.array([3, 3]), "x")
    assert triangles.of_corners(np.arange(6), np.array([0, 3])).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert triangles.of_corners(np.arange(8), np.array([1, 5])).tolist() == [[1, 2, 3], [5, 6, 7]]
    for wrong in ([[0, 1, 3]], [[0, -1, 2]]):
        with pytest.raises(DataError, match="the file is broken"):
            checked_faces(np.array(wrong), 3, "x")


# One format each: the square, twice as wide as high


@pytest.mark.parametrize(
    "name",
    ["square.obj", "binary.stl", "ascii.stl", "square.off", "mesh.ply", "quads.ply", "ascii_mesh.ply", "square.glb"],
)
def test_the_square(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(small_files.every_format()[name])
    points = load_point_cloud(tmp_path / name, n_points=500).points
    np.testing.assert_allclose(points.min(axis=0), [0, 0, 0], atol=0.05)
    np.testing.assert_allclose(points.max(axis=0), [2, 1, 0], atol=0.05)


@pytest.mark.parametrize("encoding", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("quads", [False, True])
def test_corner_colors_of_ply(tmp_path: Path, encoding: str, quads: bool) -> None:
    (tmp_path / "a.ply").write_bytes(small_files.ply_mesh(encoding, quads))
    cloud = load_point_cloud(tmp_path / "a.ply", n_points=200)
    assert cloud.colors is not None
    # Both triangles: along y blue grows, along x green grows below the diagonal.
    np.testing.assert_allclose(cloud.colors.sum(axis=1), 1, atol=1e-5)
    below = cloud.points[:, 1] < cloud.points[:, 0] / 2
    np.testing.assert_allclose(cloud.colors[below, 2], cloud.points[below, 1], atol=1e-5)


def test_face_colors_and_textures_of_ply(tmp_path: Path) -> None:
    head = "ply\nformat ascii 1.0\ncomment TextureFile a.png\nelement vertex 4\n" + "".join(
        f"property float {a}\n" for a in "xyz"
    )
    rows = "\n".join(" ".join(map(str, corner)) for corner in CORNERS.tolist())
    colored = "property list uchar int vertex_index\nproperty uchar red\nproperty uchar green\nproperty uchar blue\n"
    (tmp_path / "a.ply").write_text(
        f"{head}element face 2\n{colored}end_header\n{rows}\n3 0 1 2 255 0 0\n3 0 2 3 0 0 255\n"
    )
    cloud = load_point_cloud(tmp_path / "a.ply", n_points=200)
    below = cloud.points[:, 1] < cloud.points[:, 0] / 2
    np.testing.assert_array_equal(cloud.colors, np.where(below[:, None], [1, 0, 0], [0, 0, 1]))
    assert told(cloud, "'a.png' is not in the folder of a.ply and was not read")
    (tmp_path / "a.png").write_bytes(png([[RED, BLUE]]))  # pyright: ignore[reportArgumentType]
    wedges = "property list uchar int vertex_index\nproperty list uchar float texcoord\n"
    (tmp_path / "a.ply").write_text(f"{head}element face 1\n{wedges}end_header\n{rows}\n4 0 1 2 3 8 0 0 1 0 1 1 0 1\n")
    cloud = load_point_cloud(tmp_path / "a.ply", n_points=200)
    np.testing.assert_array_equal(cloud.colors, np.where(cloud.points[:, :1] < 1, [1, 0, 0], [0, 0, 1]))


def test_colors_of_off(tmp_path: Path) -> None:
    (tmp_path / "a.off").write_bytes(small_files.off())
    cloud = load_point_cloud(tmp_path / "a.off", n_points=200)
    below = cloud.points[:, 1] < cloud.points[:, 0] / 2
    np.testing.assert_array_equal(cloud.colors, np.where(below[:, None], [1, 0, 0], [0, 0, 1]))
    (tmp_path / "b.off").write_text("OFF4 2 0\n0 0 0\n2 0 0\n2 1 0\n0 1 0\n3 0 1 2\n3 0 2 3\n")
    assert load_point_cloud(tmp_path / "b.off", n_points=200).colors is None, "the counts of ModelNet40 follow at once"


def test_relative_numbers_and_libraries_of_obj(tmp_path: Path) -> None:
    (tmp_path / "one.mtl").write_text("newmtl one\nKd 1 0 0\n")
    (tmp_path / "more.mtl").write_text("newmtl the other\nmap_Kd -s 1 1 1 -clamp on sub/a.png\nd 1.0\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(png([[BLUE]]))  # pyright: ignore[reportArgumentType]
    (tmp_path / "a.obj").write_text(
        "mtllib one.mtl\nmtllib more.mtl\nusemtl one\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf -3 -2 \\\n-1\n"
        "usemtl the other\nvt 0 0\n\tv 5 0 0\nv 6 0 0\nv 5 1 0\nf -3/-1 -2/1 -1/1\n"
    )
    cloud = load_point_cloud(tmp_path / "a.obj", n_points=100)
    assert cloud.colors is not None
    first = cloud.points[:, 0] < 3
    assert 30 < first.sum() < 70, "numbers below zero count from where they stand"
    np.testing.assert_array_equal(cloud.colors, np.where(first[:, None], [1, 0, 0], [0, 0, 1]))


def test_bytes_as_vertex_colors_of_obj(tmp_path: Path) -> None:
    for full in (1, 255):
        (tmp_path / "a.obj").write_text(f"v 0 0 0 {full} 0 0\nv 1 0 0 {full} 0 0\nv 0 1 0 {full} 0 0\nf 1 2 3\n")
        cloud = load_point_cloud(tmp_path / "a.obj", n_points=50)
        assert cloud.colors is not None
        np.testing.assert_allclose(cloud.colors, np.tile([1, 0, 0], (50, 1)), atol=1e-6)


def test_materials() -> None:
    text = b"# x\nnewmtl a b\nKd 0.1 0.2 0.3\nd 0.5\nmap_Kd my wood.png\nnewmtl gray\nKd 0.5\nmap_Kd -o 1 1 1 -mm 0 1 w.png\n"
    materials = parse_materials(text)
    assert materials["a b"].diffuse == [0.1, 0.2, 0.3]
    assert (materials["a b"].opacity, materials["a b"].texture) == (0.5, "my wood.png")
    assert (materials["gray"].diffuse, materials["gray"].texture) == ([0.5] * 3, "w.png")


def test_colors_of_3mf(tmp_path: Path) -> None:
    (tmp_path / "a.3mf").write_bytes(small_files.threemf())
    cloud = load_point_cloud(tmp_path / "a.3mf", n_points=200, up="y")
    below = cloud.points[:, 1] < (cloud.points[:, 0] - 10) / 2
    assert cloud.points[:, 0].min() >= 10
    np.testing.assert_array_equal(cloud.colors, np.where(below[:, None], [1, 0, 0], [0, 0, 1]))


def test_colors_of_dae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.dae").write_bytes(small_files.dae())
    cloud = load_point_cloud(tmp_path / "a.dae", n_points=100)
    np.testing.assert_array_equal(cloud.colors, np.tile([1, 0, 0], (100, 1)))
    assert 5 <= cloud.points[:, 0].min() < 5.1
    assert not told(cloud, "colours of vertices")
    colored = small_files.TRIANGLES.replace("/><p>", '/><input semantic="COLOR" source="#p" offset="0"/><p>')
    (tmp_path / "b.dae").write_bytes(small_files.dae(faces=colored))
    cloud = load_point_cloud(tmp_path / "b.dae", n_points=100)
    np.testing.assert_array_equal(cloud.colors, np.tile([1, 0, 0], (100, 1)))
    assert told(cloud, "colours of vertices that lie under a material were not read")
    (tmp_path / "c.dae").write_bytes(small_files.dae(faces=colored.replace(' material="s"', "")))
    cloud = load_point_cloud(tmp_path / "c.dae", n_points=100)
    assert cloud.colors is not None
    assert np.ptp(cloud.colors) > 0
    assert not told(cloud, "colours of vertices")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install pycollada"):
        load_point_cloud(tmp_path / "a.dae")


def test_a_mesh_without_colors_has_none(tmp_path: Path) -> None:
    for name in ("binary.stl", "square.obj"):
        (tmp_path / name).write_bytes(small_files.every_format()[name])
        cloud = load_point_cloud(tmp_path / name, n_points=20)
        assert cloud.colors is None
        assert told(cloud, "no colours")
    (tmp_path / "some.mtl").write_text("newmtl one\nKd 1 0 0\n")
    (tmp_path / "some.obj").write_bytes(small_files.obj("some.mtl"))
    cloud = load_point_cloud(tmp_path / "some.obj", n_points=50)
    assert cloud.colors is not None
    assert {tuple(color) for color in cloud.colors.tolist()} == {(1.0, 0.0, 0.0), UNCOLORED}
    assert told(cloud, "gray where it gives none")


# What lies beside a mesh


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "sub/../../secret.png",
        "/{absolute}",
        "file:///{absolute}",
        "http://example.org/secret.png",
        "link.png",
    ],
)
def test_nothing_outside_the_folder_is_read(tmp_path: Path, name: str) -> None:
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    secret = tmp_path / "secret.png"
    secret.write_bytes(png([[BLUE]]))  # pyright: ignore[reportArgumentType]
    (home / "link.png").symlink_to(secret)
    name = name.format(absolute=str(secret).lstrip("/"))
    (home / "a.mtl").write_text(f"newmtl one\nKd 1 0 0\nmap_Kd {name}\nnewmtl two\nKd 1 0 0\n")
    (home / "a.obj").write_bytes(small_files.obj("a.mtl"))
    cloud = load_point_cloud(home / "a.obj", n_points=20)
    np.testing.assert_array_equal(cloud.colors, np.tile([1, 0, 0], (20, 1)))
    assert told(cloud, "is not in the folder of a.obj and was not read")


@pytest.mark.parametrize(
    "name",
    ["C:\\Users\\someone\\Wood.PNG", "../textures/wood.png", "./wood.png", "wood%20.png", "file:///elsewhere/wood.png"],
)
def test_a_name_from_another_disk_is_found_by_its_last_word(tmp_path: Path, name: str) -> None:
    (tmp_path / ("wood .png" if "%" in name else "wood.png")).write_bytes(png([[BLUE]]))  # pyright: ignore[reportArgumentType]
    (tmp_path / "a.mtl").write_text(f"newmtl one\nmap_Kd {name}\nnewmtl two\nmap_Kd {name}\n")
    (tmp_path / "a.obj").write_bytes(small_files.obj("a.mtl"))
    np.testing.assert_array_equal(load_point_cloud(tmp_path / "a.obj", n_points=20).colors, np.tile([0, 0, 1], (20, 1)))


def test_a_linked_mesh_finds_what_lies_beside_the_file_itself(tmp_path: Path) -> None:
    """As in the Hub's cache: a snapshot's files are links into one folder of blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, (name, data) in enumerate(
        {"a.obj": small_files.obj("a.mtl"), "a.mtl": b"newmtl one\nKd 0 1 0\n"}.items()
    ):
        (tmp_path / "blobs" / str(number)).write_bytes(data)
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / str(number))
    assert load_point_cloud(tmp_path / "snapshot" / "a.obj", n_points=20).colors is not None


def test_a_picture_of_another_kind_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.dds").write_bytes(b"DDS |" + bytes(100))
    (tmp_path / "a.mtl").write_text("newmtl one\nKd 1 0 0\nmap_Kd a.dds\n")
    (tmp_path / "a.obj").write_bytes(small_files.obj("a.mtl"))
    cloud = load_point_cloud(tmp_path / "a.obj", n_points=20)
    assert cloud.colors is not None
    assert told(cloud, "texture a.dds is no PNG, JPEG")


def test_errors_say_what_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "empty.obj").write_text("# nothing\n")
    with pytest.raises(DataError, match=r"empty\.obj holds no point"):
        load_point_cloud(tmp_path / "empty.obj")
    (tmp_path / "broken.glb").write_bytes(b"glTF but not really")
    with pytest.raises(DataError, match=r"broken\.glb is no binary glTF 2"):
        load_point_cloud(tmp_path / "broken.glb")
    with (
        open(tmp_path / "broken.glb", "rb") as file,
        pytest.raises(DataError, match=r"cannot read x\.off: .*; the file is broken or cut short"),
    ):
        read_mesh(file, "off", None, "x.off")
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n")
    with pytest.raises(DataError, match="has a face with vertex 8, and 3 vertices"):
        load_point_cloud(tmp_path / "a.obj")


SQUARE = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"


def outline(count: int, seed: int) -> np.ndarray:
    """A polygon (count, 2) around the origin, with corners near and far: most are concave."""
    rng = np.random.default_rng(seed)
    angles = (np.arange(count) + rng.uniform(0.1, 0.9, count)) * 2 * np.pi / count
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(0.1, 1, count)[:, None]


def area(corners: np.ndarray) -> float:
    """By the shoelace formula."""
    x, y = corners.T
    return abs(float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum())) / 2


@pytest.mark.parametrize("count", [4, 5, 9, 40])
@pytest.mark.parametrize("turned", [False, True])
def test_concave_polygons_are_covered_once(count: int, turned: bool) -> None:
    """However they lie and whichever corner is first: the triangles' areas add up to the polygon's."""
    rng = np.random.default_rng(count)
    for seed in range(12):
        flat = outline(count, seed)[:: -1 if turned else 1]
        vertices = np.pad(flat, ((0, 0), (0, 1))) @ np.linalg.qr(rng.normal(size=(3, 3)))[0].T
        corners = np.roll(np.arange(count), seed)
        # A triangle and a square stand before it and stay as they are.
        more = np.concatenate([vertices, [[0, 0, 5], [1, 0, 5], [1, 1, 5], [0, 1, 5]]])
        listed = np.concatenate([count + np.arange(3), count + np.arange(4), corners])
        cut, faces = cut_polygons(np.array([3, 4, count]), listed, np.array([0, 3, 7]), more, "x")
        assert faces[:3].tolist() == [
            [count, count + 1, count + 2],
            [count, count + 1, count + 2],
            [count, count + 2, count + 3],
        ]
        assert cut.of_polygons(np.arange(3)).tolist() == [0, 1, 1, *[2] * (count - 2)]
        triangles = more[faces[3:]]
        sides = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
        assert np.linalg.norm(sides, axis=1).sum() / 2 == pytest.approx(area(flat), rel=1e-9)
        assert np.linalg.norm(sides.sum(axis=0)) / 2 == pytest.approx(area(flat), rel=1e-9), "all are turned one way"


def test_a_polygon_whose_sides_cross_is_still_read(tmp_path: Path) -> None:
    (tmp_path / "bow.obj").write_text("v 0 0 0\nv 1 1 0\nv 1 0 0\nv 0 1 0\nv .5 2 0\nf 1 2 3 4 5\n")
    assert len(load_point_cloud(tmp_path / "bow.obj", n_points=50).array()) == 50


@pytest.mark.parametrize("kind", ["obj", "ply", "off"])
def test_no_point_lies_outside_of_a_notched_polygon(tmp_path: Path, kind: str) -> None:
    corners = [(0, 0), (4, 0), (4, 4), (2, 1), (0, 4)]
    rows = "".join(f"{x} {y} 0\n" for x, y in corners)
    content = {
        "obj": "".join(f"v {x} {y} 0\n" for x, y in corners) + "f 1 2 3 4 5\n",
        "ply": "ply\nformat ascii 1.0\nelement vertex 5\nproperty float x\nproperty float y\nproperty float z\n"
        f"element face 1\nproperty list uchar int vertex_indices\nend_header\n{rows}5 0 1 2 3 4\n",
        "off": f"OFF\n5 1 0\n{rows}5 0 1 2 3 4\n",
    }
    (tmp_path / f"notch.{kind}").write_text(content[kind])
    x, y, _ = load_point_cloud(tmp_path / f"notch.{kind}", n_points=500).points.T
    assert (y <= 1 + 1.5 * np.abs(x - 2) + 1e-5).all()


def test_several_libraries_on_one_line_and_comments(tmp_path: Path) -> None:
    (tmp_path / "a.mtl").write_text("newmtl red\nKd 1 0 0\n")
    (tmp_path / "b.mtl").write_text("newmtl blue\nKd 0 0 1\n")
    (tmp_path / "two.obj").write_text(
        f"mtllib a.mtl b.mtl # both\n{SQUARE}v 9 9 9 # not used\nusemtl red # first\nf 1 2 3 # a face\nusemtl blue\nf 1 3 4\n"
    )
    colors = load_point_cloud(tmp_path / "two.obj", n_points=200).colors
    assert colors is not None
    assert {tuple(color) for color in colors.round(3).tolist()} == {(1.0, 0.0, 0.0), (0.0, 0.0, 1.0)}


def test_a_library_whose_name_has_a_blank(tmp_path: Path) -> None:
    (tmp_path / "my paint.mtl").write_text("newmtl red\nKd 1 0 0\n")
    (tmp_path / "one.obj").write_text(f"mtllib my paint.mtl\n{SQUARE}usemtl red\nf 1 2 3\nusemtl none\nf 1 3 4\n")
    cloud = load_point_cloud(tmp_path / "one.obj", n_points=50)
    assert cloud.colors is not None
    assert told(cloud, "material 'none' is in none of its libraries")


@pytest.mark.parametrize("options", ["-s 2 2", "-s 2 2 1 -o 0.5", "-clamp on -t 1 1 1"])
def test_a_texture_behind_options_is_read(tmp_path: Path, options: str) -> None:
    (tmp_path / "red.png").write_bytes(png([[RED]]))
    (tmp_path / "one.mtl").write_text(f"newmtl printed\nmap_Kd {options} red.png\n")
    (tmp_path / "one.obj").write_text(f"mtllib one.mtl\n{SQUARE}usemtl printed\nf 1/1 2/2 3/3\n")
    cloud = load_point_cloud(tmp_path / "one.obj", n_points=50)
    assert cloud.colors is not None
    assert cloud.colors.tolist() == [[1.0, 0.0, 0.0]] * 50
    assert told(cloud, "is moved or scaled by its material, which is not done")


def test_a_placed_object_with_words_of_its_own(tmp_path: Path) -> None:
    model = small_files.threemf()
    changed = _rewritten(model, lambda text: text.replace("/></build>", "><metadatagroup/></item></build>"))
    (tmp_path / "plain.3mf").write_bytes(model)
    (tmp_path / "worded.3mf").write_bytes(changed)
    clouds = [load_point_cloud(tmp_path / name, n_points=50).array() for name in ("plain.3mf", "worded.3mf")]
    np.testing.assert_array_equal(*clouds)


def _rewritten(archive: bytes, change: Any) -> bytes:
    """A .3mf with another model file."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(made, "w") as new:
        for info in old.infolist():
            text = old.read(info)
            if info.filename.endswith(".model"):
                text, before = change(text.decode()).encode(), text
                assert text != before
            new.writestr(info.filename, text)
    return made.getvalue()


def test_a_binary_stl_that_calls_itself_solid_and_is_cut_short(tmp_path: Path) -> None:
    whole = small_files.stl()
    (tmp_path / "cut.stl").write_bytes(b"solid" + whole[5:-10])
    with pytest.raises(DataError, match="cut short"):
        load_point_cloud(tmp_path / "cut.stl")
    (tmp_path / "mixed.stl").write_text(small_files.stl(binary=False).decode().replace("vertex", "Vertex"))
    assert len(load_point_cloud(tmp_path / "mixed.stl", n_points=20).array()) == 20


def test_what_of_a_scene_is_not_read_is_noted(tmp_path: Path) -> None:
    tree, data = small_files.gltf_tree()
    tree["nodes"][0]["extensions"] = {"EXT_mesh_gpu_instancing": {"attributes": {}}}
    tree["meshes"][0]["weights"] = [1.0]
    (tmp_path / "scene.glb").write_bytes(small_files.glb(tree, data))
    cloud = load_point_cloud(tmp_path / "scene.glb", n_points=20)
    assert told(cloud, "EXT_mesh_gpu_instancing is not read")
    assert told(cloud, "morph targets are not read")
