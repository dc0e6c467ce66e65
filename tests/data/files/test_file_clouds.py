"""Clouds from every format: the points that went in come out."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import small_files
from small_files import grid

from pointalign import load_point_cloud
from pointalign.data.files import unlaz
from pointalign.data.files.pcd import decompress_lzf
from pointalign.errors import DataError, MissingDependencyError

XYZ, RGB = grid()
CLOUDS = {
    "little.ply": small_files.ply_cloud(),
    "big.ply": small_files.ply_cloud("binary_big_endian"),
    "ascii.ply": small_files.ply_cloud("ascii"),
    "ascii.pcd": small_files.pcd(),
    "binary.pcd": small_files.pcd("binary"),
    "packed.pcd": small_files.pcd("binary_compressed"),
    "plain.npy": small_files.npy(),
    "two.npz": small_files.npz(),
    "plain.xyz": small_files.text(),
    "header.csv": small_files.text(",", "x,y,z,r,g,b"),
    "tabs.txt": small_files.text("\t"),
    "counted.pts": b"40\n" + small_files.text(),
}


@pytest.mark.parametrize("name", CLOUDS)
def test_points_and_colors(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CLOUDS[name])
    cloud = load_point_cloud(tmp_path / name)
    assert cloud.colors is not None
    np.testing.assert_allclose(cloud.points, XYZ, atol=1e-6)
    np.testing.assert_allclose(cloud.colors, RGB / 255, atol=1e-6)
    assert cloud.points.dtype == cloud.colors.dtype == np.float32
    assert cloud.source == str(tmp_path / name)


@pytest.mark.parametrize("laz", [False, True])
@pytest.mark.parametrize(("point_format", "minor"), [(2, 2), (3, 2), (7, 4)])
@pytest.mark.parametrize("full", [255, 65535])
def test_laser_scans(tmp_path: Path, laz: bool, point_format: int, minor: int, full: int) -> None:
    path = tmp_path / ("a.laz" if laz else "a.las")
    path.write_bytes(small_files.las(point_format, full=full, laz=laz, minor=minor))
    cloud = load_point_cloud(path, up="z")
    assert cloud.colors is not None
    np.testing.assert_allclose(cloud.colors, RGB / 255, atol=1e-5)
    turned = np.stack([XYZ[:, 0], XYZ[:, 2], -XYZ[:, 1]], axis=1)
    middle = (turned.min(axis=0) + turned.max(axis=0)) / 2
    np.testing.assert_allclose(cloud.points, turned - middle, atol=2e-3)
    assert any("moved to the origin" in note for note in cloud.notes), (
        "half a million metres away float32 is too coarse"
    )
    assert any("16-bit colours up to 255" in note for note in cloud.notes) == (full == 255)


def test_scan_without_colors_is_gray_by_intensity(tmp_path: Path) -> None:
    (tmp_path / "a.las").write_bytes(small_files.las(0))
    cloud = load_point_cloud(tmp_path / "a.las")
    assert cloud.colors is not None
    np.testing.assert_allclose(cloud.colors, np.repeat(np.arange(40)[:, None] / 39, 3, axis=1), atol=1e-6)
    (tmp_path / "b.las").write_bytes(small_files.las(2, full=0))
    np.testing.assert_array_equal(load_point_cloud(tmp_path / "b.las").colors, cloud.colors)


def test_laz_without_lazrs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.laz").write_bytes(small_files.las(2, laz=True))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install lazrs"):
        load_point_cloud(tmp_path / "a.laz")


def test_unpacking_writes_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = small_files.las(2, laz=True)
    (tmp_path / "a.laz").write_bytes(data)
    start = struct.unpack_from("<I", data, 96)[0]
    written = io.BytesIO()
    with (tmp_path / "a.laz").open("rb") as file, monkeypatch.context() as patch:
        patch.setattr("sys.stdin", type("", (), {"buffer": file}))
        patch.setattr("sys.stdout", type("", (), {"buffer": written}))
        patch.setattr("sys.platform", "win32")  # else this process would be bounded, not one of its own
        unlaz.main(26, 40, start, data[227 + 54 : start])
    assert written.getvalue() == small_files.las(2)[227:]


def test_packed_floats_of_old_point_clouds(tmp_path: Path) -> None:
    """PCL has written `rgb` as a float's bits, and as a float's value."""
    bits = np.array([[0x00FF8000]], dtype="<u4").view("<f4")[0, 0]
    for value in (f"{bits:.9e}", str(0x00FF8000)):
        (tmp_path / "a.pcd").write_text(
            "VERSION .7\nFIELDS x y z rgb\nSIZE 4 4 4 4\nTYPE F F F F\nWIDTH 2\nHEIGHT 1\nDATA ascii\n"
            f"0 0 0 {value}\nnan 1 1 {value}\n"
        )
        np.testing.assert_allclose(load_point_cloud(tmp_path / "a.pcd").colors, [[1, 128 / 255, 0]], atol=1e-6)


def test_fields_of_several_numbers_are_stepped_over(tmp_path: Path) -> None:
    head = "FIELDS x fpfh y z\nSIZE 4 4 4 4\nTYPE F F F F\nCOUNT 1 33 1 1\nWIDTH 2\nHEIGHT 1\nPOINTS 2\nDATA "
    rows = np.zeros((2, 36), dtype="<f4")
    rows[:, [0, 34, 35]] = [[1, 2, 3], [4, 5, 6]]
    (tmp_path / "a.pcd").write_bytes(f"{head}binary\n".encode() + rows.tobytes())
    (tmp_path / "b.pcd").write_text(f"{head}ascii\n" + "\n".join(" ".join(map(str, row)) for row in rows.tolist()))
    for name in ("a.pcd", "b.pcd"):
        np.testing.assert_array_equal(load_point_cloud(tmp_path / name).points, [[1, 2, 3], [4, 5, 6]])


def test_lzf_by_hand() -> None:
    # Four bytes as they are; three from two back; nine (7 + 2) and two more from one back.
    data = bytes([3]) + b"abcd" + bytes([1 << 5, 1]) + bytes([7 << 5, 2, 0])
    assert decompress_lzf(data, 18, "x") == b"abcdcdc" + b"c" * 11
    with pytest.raises(DataError, match="unpacks to 18 bytes instead of 19"):
        decompress_lzf(data, 19, "x")
    with pytest.raises(DataError, match="the file is broken"):
        decompress_lzf(bytes([0, 65, 1 << 5, 9]), 4, "x")
    raw = bytes(np.random.default_rng(1).integers(0, 3, 5000, dtype=np.uint8)) + b"x" * 600
    assert decompress_lzf(small_files.lzf(raw), len(raw), "x") == raw


def test_what_stands_before_the_vertices(tmp_path: Path) -> None:
    head = (
        "ply\nformat {} 1.0\nelement camera 2\nproperty double f\nelement vertex 1\nproperty double x\nproperty double y\n"
        "property double z\nproperty ushort red\nproperty ushort green\nproperty ushort blue\nend_header\n"
    )
    (tmp_path / "a.ply").write_bytes(
        head.format("binary_big_endian").encode() + struct.pack(">5d3H", 9, 9, 1, 2, 3, 0, 65535, 1)
    )
    (tmp_path / "b.ply").write_text(head.format("ascii") + "9\n9\n1 2 3 0 65535 1\n")
    for name in ("a.ply", "b.ply"):
        cloud = load_point_cloud(tmp_path / name)
        np.testing.assert_array_equal(cloud.points, [[1, 2, 3]])
        np.testing.assert_allclose(cloud.colors, [[0, 1, 1 / 65535]])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["<f2", ">f4", "<f8", "<i4"])
def test_arrays_of_any_kind(tmp_path: Path, order: str, kind: str) -> None:
    rows = np.arange(30).reshape(10, 3)
    np.save(tmp_path / "a.npy", np.asarray(rows, dtype=kind, order=order))  # pyright: ignore[reportCallIssue, reportArgumentType]
    np.testing.assert_array_equal(load_point_cloud(tmp_path / "a.npy").points, rows)
    np.savez(tmp_path / "a.npz", anything=np.asarray(rows, dtype=kind, order=order))  # pyright: ignore[reportCallIssue, reportArgumentType]
    np.testing.assert_array_equal(load_point_cloud(tmp_path / "a.npz").points, rows)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 500)), "shape .3, 500., not .points, 3 or more.; transpose it"),
        (np.zeros((2, 9, 3)), "save one cloud, one point a row"),
        (np.zeros((0, 3)), "no point with finite coordinates"),
        (np.zeros((4, 3), dtype=complex), "not numbers"),
        (np.array([{"a": 1}]), "Python objects, which are never unpickled"),
    ],
)
def test_arrays_that_are_no_clouds(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        load_point_cloud(tmp_path / "a.npy")


def test_archives(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", one=np.zeros((5, 3)), two=np.zeros((5, 3)))
    with pytest.raises(DataError, match=r"cannot tell which array of .* is the cloud \(it holds one, two\)"):
        load_point_cloud(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", label=np.array([object()]), xyz=XYZ, rgb=RGB.astype(np.float32, order="F") / 255)
    cloud = load_point_cloud(tmp_path / "b.npz")
    assert cloud.colors is not None
    np.testing.assert_allclose(cloud.colors, RGB / 255, atol=1e-6)


def structured_npy(names: list[str]) -> bytes:
    rows = np.zeros(len(XYZ), dtype=[(name, "<f4") for name in names])
    for name, values in zip(names, np.concatenate([XYZ, RGB], axis=1).T, strict=True):
        rows[name] = values
    stream = io.BytesIO()
    np.save(stream, rows)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["ply", "pcd", "npy"])
def test_columns_of_any_names_can_be_named(tmp_path: Path, kind: str) -> None:
    """A file that calls its colours c0, c1, c2."""
    own = ["x", "y", "z", "c0", "c1", "c2"]
    lines = "".join(" ".join(f"{v:g}" for v in (*xyz, *rgb)) + "\n" for xyz, rgb in zip(XYZ, RGB, strict=True))
    content = {
        "ply": f"ply\nformat ascii 1.0\nelement vertex {len(XYZ)}\n"
        + "".join(f"property float {name}\n" for name in own)
        + f"end_header\n{lines}",
        "pcd": f"VERSION .7\nFIELDS {' '.join(own)}\nSIZE 4 4 4 4 4 4\nTYPE F F F F F F\nCOUNT 1 1 1 1 1 1\n"
        f"WIDTH {len(XYZ)}\nHEIGHT 1\nPOINTS {len(XYZ)}\nDATA ascii\n{lines}",
    }
    path = tmp_path / f"own.{kind}"
    path.write_bytes(structured_npy(own) if kind == "npy" else content[kind].encode())
    assert load_point_cloud(path).colors is None
    named = load_point_cloud(path, columns=["x", "y", "z", "red", "green", "blue"])
    assert named.colors is not None
    np.testing.assert_allclose(named.colors, RGB / 255, atol=1e-5)
    with pytest.raises(DataError, match="6 columns and 3 names"):
        load_point_cloud(path, columns=["x", "y", "z"])


@pytest.mark.parametrize("kind", ["F", "U", "I"])
def test_packed_colors_with_opacity_as_text(tmp_path: Path, kind: str) -> None:
    """0xFERRGGBB: as a float a number near -1e38, as a whole number with a sign one below zero."""
    bits = (0xFE000000 + (RGB.astype(np.int64) * [65536, 256, 1]).sum(axis=1)).astype("<u4")
    words = {"F": [f"{v:.9g}" for v in bits.view("<f4")], "U": bits.tolist(), "I": bits.view("<i4").tolist()}[kind]
    head = f"FIELDS x y z rgb\nSIZE 4 4 4 4\nTYPE F F F {kind}\nCOUNT 1 1 1 1\nWIDTH {len(XYZ)}\nHEIGHT 1\nDATA ascii\n"
    rows = (f"{x:g} {y:g} {z:g} {word}\n" for (x, y, z), word in zip(XYZ, words, strict=True))
    (tmp_path / "packed.pcd").write_text(head + "".join(rows))
    cloud = load_point_cloud(tmp_path / "packed.pcd")
    assert cloud.colors is not None
    np.testing.assert_allclose(cloud.colors, RGB / 255, atol=1e-6)


def test_a_wrong_seed_is_no_broken_file(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_bytes(small_files.text())
    with pytest.raises(DataError, match="a seed is 0 or more, not -1"):
        load_point_cloud(tmp_path / "a.xyz", seed=-1)
