"""`load_point_cloud`: the same points again, turned, moved, cut and bounded, from files and from standard input."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_files
import torch

from pointalign import PointCloud, load_point_cloud
from pointalign.data.files.load import KEPT_PER_POINT
from pointalign.data.files.source import FORMATS, open_source, readable, sniff
from pointalign.errors import DataError
from pointalign.geometry import farthest_point_sample

FILES = small_files.every_format()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_the_same_file_gives_the_same_points(folder: Path, name: str) -> None:
    first, again = (load_point_cloud(folder / name, n_points=16) for _ in range(2))
    np.testing.assert_array_equal(first.array(), again.array())
    assert first.notes == again.notes
    assert len(first) == 16
    if name.startswith(("mesh", "square", "binary.stl")):
        assert (load_point_cloud(folder / name, n_points=16, seed=1).points != first.points).any()


@pytest.mark.parametrize("name", FILES)
def test_formats_are_known_by_their_first_bytes(folder: Path, tmp_path: Path, name: str) -> None:
    data = FILES[name]
    found, meant = sniff(data[:4096], len(data)), name.rpartition(".")[2]
    assert found == {"las": "laz", "xyz": "txt", "csv": "txt", "pts": "txt"}.get(meant, meant)
    (tmp_path / "noending").write_bytes(data)
    same, again = (load_point_cloud(path, n_points=16) for path in (tmp_path / "noending", folder / name))
    np.testing.assert_array_equal(same.points, again.points)


def test_the_unit_is_what_the_format_fixes_or_the_user_says(folder: Path) -> None:
    assert load_point_cloud(folder / "square.glb", n_points=16).unit == 1
    assert load_point_cloud(folder / "square.glb", n_points=16, unit=0.001).unit == 0.001
    assert load_point_cloud(folder / "square.glb", n_points=16, unit=0).unit is None, "not to be known"
    assert load_point_cloud(folder / "plain.xyz", n_points=16).unit is None
    assert load_point_cloud(folder / "plain.xyz", n_points=16, unit=0.01).unit == 0.01
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(DataError, match="the unit of coordinates is a number of metres"):
            load_point_cloud(folder / "plain.xyz", unit=wrong)


def test_standard_input(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, format in (("square.glb", None), ("plain.xyz", "xyz"), ("packed.laz", None), ("two.npz", None)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(FILES[name])))
        cloud = load_point_cloud("-", n_points=16, format=format)
        np.testing.assert_array_equal(cloud.points, load_point_cloud(folder / name, n_points=16).points)
        assert cloud.source == "standard input"


def test_a_small_cloud_stays_as_it_is(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(30.0).reshape(10, 3))
    np.testing.assert_array_equal(load_point_cloud(tmp_path / "a.npy").points, np.arange(30).reshape(10, 3))


def test_a_larger_cloud_is_cut_to_farthest_points(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).random((KEPT_PER_POINT * 20, 3), dtype=np.float32)
    np.save(tmp_path / "a.npy", rows)
    chosen = farthest_point_sample(torch.from_numpy(rows)[None], 20)[0].numpy()
    np.testing.assert_array_equal(load_point_cloud(tmp_path / "a.npy", n_points=20).points, rows[chosen])


def test_a_large_cloud_is_thinned_first(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).random((KEPT_PER_POINT * 20 + 1, 3), dtype=np.float32)
    np.save(tmp_path / "a.npy", rows)
    cloud = load_point_cloud(tmp_path / "a.npy", n_points=20, seed=3)
    assert "161 points, thinned at random (seed 3) to 160" in cloud.notes
    assert {tuple(point) for point in cloud.points.tolist()} <= {tuple(point) for point in rows.tolist()}


def test_up(tmp_path: Path, folder: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[1.0, 2.0, 3.0]]))
    np.testing.assert_array_equal(load_point_cloud(tmp_path / "a.npy", up="y").points, [[1, 2, 3]])
    np.testing.assert_array_equal(load_point_cloud(tmp_path / "a.npy", up="z").points, [[1, 3, -2]])
    assert any("the format does not say" in note for note in load_point_cloud(tmp_path / "a.npy").notes)
    # The square lies in z = 0: flat along z as it is, flat along y when z is up.
    for name, flat in (("square.glb", 2), ("square.3mf", 1), ("square.dae", 2)):
        cloud = load_point_cloud(folder / name, n_points=64)
        assert np.ptp(cloud.points, axis=0).argmin() == flat, name
        assert not any("does not say" in note for note in cloud.notes)
    (tmp_path / "z.dae").write_bytes(small_files.dae("Z_UP"))
    assert np.ptp(load_point_cloud(tmp_path / "z.dae", n_points=64).points, axis=0).argmin() == 1
    assert np.ptp(load_point_cloud(tmp_path / "z.dae", n_points=64, up="y").points, axis=0).argmin() == 2
    (tmp_path / "x.dae").write_bytes(small_files.dae("X_UP"))
    with pytest.raises(DataError, match="has x up"):
        load_point_cloud(tmp_path / "x.dae")


def test_far_from_the_origin_digits_are_kept(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).random((50, 3))
    np.save(tmp_path / "a.npy", rows + np.array([5e6, 0, 0]))
    far, near = load_point_cloud(tmp_path / "a.npy").points, rows - (rows.min(axis=0) + rows.max(axis=0)) / 2
    np.testing.assert_allclose(far, near, atol=1e-6)
    np.save(tmp_path / "b.npy", np.full((4, 3), 7e5))
    np.testing.assert_array_equal(load_point_cloud(tmp_path / "b.npy").points, np.full((4, 3), 7e5))
    np.save(tmp_path / "c.npy", np.array([[0, 0, 0], [1e300, 0, 0]]))
    with pytest.raises(DataError, match="beyond float32; rescale it"):
        load_point_cloud(tmp_path / "c.npy")


def test_a_mesh_without_faces_is_a_cloud(tmp_path: Path) -> None:
    (tmp_path / "a.obj").write_text("v 0 0 0 1 0 0\nv 1 0 0 0 1 0\nv 0 1 0 0 0 1\n")
    (tmp_path / "a.off").write_text("COFF\n3 0 0\n0 0 0 255 0 0\n1 0 0 0 255 0\n0 1 0 0 0 255\n")
    for name in ("a.obj", "a.off"):
        cloud = load_point_cloud(tmp_path / name)
        np.testing.assert_array_equal(cloud.points, [[0, 0, 0], [1, 0, 0], [0, 1, 0]])
        np.testing.assert_array_equal(cloud.colors, np.eye(3))
        assert "no faces: its vertices taken as a cloud" in cloud.notes


def test_faces_that_are_nothing_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.obj").write_text(
        "v 0 0 0\nv 1 0 0\nv 0 1 0\nv nan 0 0\nv 2 0 0\nf 1 2 3\nf 1 2 4\nf 1 2 5\nf 1 1 1\nf 1 2\n"
    )
    cloud = load_point_cloud(tmp_path / "a.obj", n_points=20)
    assert np.isfinite(cloud.points).all()
    assert (cloud.points[:, :2].sum(axis=1) <= 1 + 1e-6).all()
    assert "1 face with coordinates that are not finite was left out" in cloud.notes
    (tmp_path / "b.obj").write_text("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n")
    with pytest.raises(DataError, match=r"b\.obj has a surface without area"):
        load_point_cloud(tmp_path / "b.obj")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("http://example.org/a.ply", "no address is fetched"),
        ("HTTPS://example.org/a.ply", "no address is fetched"),
        ("file:///etc/passwd", "no address is fetched"),
        ("none.ply", "no 3D file at none.ply; check the path"),
        (".", "is a folder"),
        ("long" * 1000, "cannot open (long)+: File name too long; check the path and who may read it"),
    ],
)
def test_what_is_no_file(path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_point_cloud(path)


def test_long_reading_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pointalign.data.files.source.SHOWN_MEBIBYTES", 3)
    monkeypatch.setattr("pointalign.data.files.source.SECONDS_UNSHOWN", 0.0)
    line = b"v 0 0 0" + b" " * 2**10 + b"\n"
    (tmp_path / "short.obj").write_bytes(line * 2**11)
    (tmp_path / "long.obj").write_bytes(line * 2**12)
    for name in ("short", "long"):
        load_point_cloud(tmp_path / f"{name}.obj", n_points=4)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert re.match(r"reading long\.obj \(MiB\): 4/4, .* took", told[0])


def test_settings_that_cannot_be(folder: Path) -> None:
    path = folder / "plain.npy"
    for n_points in (0, -1, 10**9):
        with pytest.raises(DataError, match="ask for 1 to"):
            load_point_cloud(path, n_points=n_points)
    with pytest.raises(DataError, match="up is 'y' or 'z', not 'x'"):
        load_point_cloud(path, up="x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="unknown format 'docx'; known are ply, pcd"):
        load_point_cloud(path, format="docx")
    with pytest.raises(DataError, match=r"cannot read .*plain\.las"):
        load_point_cloud(folder / "plain.las", format="npy")


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_empty_and_senseless_files(tmp_path: Path, format: str | None) -> None:
    for data, message in ((b"", "is empty"), (b"\x00\x01\x02 what is this", None)):
        (tmp_path / "a.what").write_bytes(data)
        with pytest.raises(DataError, match=message):
            load_point_cloud(tmp_path / "a.what", format=format)


def test_sizes_are_told_for_people() -> None:
    assert [readable(size) for size in (12, 2048, 1536, 3 * 2**30)] == ["12 bytes", "2 KiB", "1.5 KiB", "3 GiB"]


def test_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "a.obj").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(DataError, match=r"a.obj has 1 GiB, more than the 512 MiB .*; decimate the mesh"):
        load_point_cloud(tmp_path / "a.obj")
    monkeypatch.setattr("pointalign.data.files.source.MAX_CLOUD_BYTES", 2**20)
    with pytest.raises(DataError, match="more than the 1 MiB read"), open_source(tmp_path / "a.obj"):
        pass


LOAD = """
import resource, sys
from pointalign import load_point_cloud
import pointalign.data.files.load
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cloud = load_point_cloud(sys.argv[1], n_points=256)
print(len(cloud), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used) // 1024)
print(*cloud.notes, sep="\\n")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is counted in kibibytes on Linux only")
@pytest.mark.parametrize("kind", ["npy", "ply"])
def test_memory_does_not_grow_with_the_cloud(tmp_path: Path, kind: str) -> None:
    """Points of 120 MB, as float64 twice that, mostly a hole in the file, are read in less than 96 MiB."""
    count = 6_000_000
    path = tmp_path / f"a.{kind}"
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {count}\nproperty float x\nproperty float y\n"
    head += "property float z\nproperty double time\nend_header\n"
    start = np.lib.format.header_data_from_array_1_0(np.zeros((1, 5), dtype="<f4")) | {"shape": (count, 5)}
    with path.open("wb") as file:
        if kind == "npy":
            np.lib.format.write_array_header_1_0(file, start)
        else:
            file.write(head.encode())
        file.seek(count * 20 - 20, os.SEEK_CUR)
        file.write(np.ones(5, dtype="<f4").tobytes())
    done = subprocess.run([sys.executable, "-c", LOAD, path], capture_output=True, text=True, check=True, timeout=120)
    points, mebibytes = done.stdout.splitlines()[0].split()
    assert points == "256"
    assert f"{count:,} points, thinned at random" in done.stdout
    assert int(mebibytes) < 96


# The typed cloud


def test_filling_missing_color() -> None:
    cloud = PointCloud(np.zeros((2, 3), dtype=np.float32), None, "a.stl", ("no colours",))
    assert cloud.array().shape == (2, 3)
    np.testing.assert_array_equal(cloud.array((0.25, 0.5, 1)), [[0, 0, 0, 0.25, 0.5, 1]] * 2)
    filled = cloud.filled((0.25, 0.5, 1))
    assert filled.notes == ("no colours", "no colour: filled with (0.25, 0.5, 1), as in the model's own data")
    assert filled.filled((0, 0, 0)) is filled
    assert filled.array().dtype == np.float32
    for wrong in ((0, 0), (0, 0, 2), (0, 0, float("nan"))):
        with pytest.raises(DataError, match="three numbers between 0 and 1"):
            cloud.filled(wrong)
