"""Columns of clouds: which are colours, in which range, and which are not guessed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pointalign import PointCloud, load_point_cloud
from pointalign.data.files.columns import ZEROTH_HARMONIC, plain_name
from pointalign.data.files.thinning import Thinner
from pointalign.errors import DataError

RNG = np.random.default_rng(0)
XYZ = RNG.normal(size=(50, 3)).round(4)


def write(path: Path, rows: np.ndarray, header: str = "") -> Path:
    np.savetxt(path, rows, fmt="%.10g", header=header, comments="")
    return path


def told(cloud: PointCloud, word: str) -> bool:
    return any(word in note for note in cloud.notes)


def normals(count: int) -> np.ndarray:
    vectors = RNG.normal(size=(count, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("values", "full"),
    [
        (RNG.random((50, 3)), 1),
        (RNG.integers(0, 256, (50, 3)), 255),
        (RNG.random((50, 3)) * 250, 255),
        (RNG.integers(0, 65536, (50, 3)), 65535),
        (RNG.integers(0, 2, (50, 3)), 1),
    ],
    ids=["fractions", "bytes", "byte floats", "16 bits", "zeros and ones"],
)
def test_the_range_is_found(tmp_path: Path, values: np.ndarray, full: float) -> None:
    cloud = load_point_cloud(write(tmp_path / "a.xyz", np.hstack([XYZ, values])))
    assert cloud.colors is not None
    np.testing.assert_allclose(cloud.colors, values / full, atol=1e-6)
    assert told(cloud, "columns 4-6 taken as red, green, blue")
    assert told(cloud, "0 or 1" if full == 1 and values.dtype.kind == "i" else f"colours 0-{full}")


def test_zero_everywhere_is_no_color(tmp_path: Path) -> None:
    cloud = load_point_cloud(write(tmp_path / "a.xyz", np.hstack([XYZ, np.zeros((50, 3))])))
    assert cloud.colors is None
    assert told(cloud, "zero everywhere")


def test_dark_bytes_stay_dark_where_the_file_says_they_are_bytes(tmp_path: Path) -> None:
    table = np.zeros(50, [("x", "f4"), ("y", "f4"), ("z", "f4"), ("r", "u1"), ("g", "u1"), ("b", "u1")])
    for axis, column in zip("xyz", XYZ.T, strict=True):
        table[axis] = column
    table["g"] = 1
    np.save(tmp_path / "a.npy", table)
    cloud = load_point_cloud(tmp_path / "a.npy")
    assert cloud.colors is not None
    np.testing.assert_allclose(cloud.colors, np.tile([0, 1 / 255, 0], (50, 1)), atol=1e-7)


def test_normals_are_not_colors(tmp_path: Path) -> None:
    cloud = load_point_cloud(write(tmp_path / "a.xyz", np.hstack([XYZ, normals(50).round(4)])))
    assert cloud.colors is None
    assert told(cloud, "columns 4-6 are unit normals")
    upward = load_point_cloud(write(tmp_path / "b.xyz", np.hstack([XYZ, np.abs(normals(50)).round(4)])))
    assert upward.colors is None, "normals without a negative number are normals too"


@pytest.mark.parametrize("normals_first", [True, False])
def test_nine_columns(tmp_path: Path, normals_first: bool) -> None:
    rgb = RNG.integers(0, 256, (50, 3))
    parts = [normals(50).round(4), rgb] if normals_first else [rgb, normals(50).round(4)]
    cloud = load_point_cloud(write(tmp_path / "a.txt", np.hstack([XYZ, *parts])))
    assert cloud.colors is not None
    np.testing.assert_allclose(cloud.colors, rgb / 255, atol=1e-6)


def test_seven_columns(tmp_path: Path) -> None:
    rgb, labels = RNG.integers(0, 256, (50, 3)), RNG.integers(0, 13, (50, 1))
    labelled = load_point_cloud(write(tmp_path / "a.txt", np.hstack([XYZ, rgb, labels])))
    assert labelled.colors is not None
    np.testing.assert_allclose(labelled.colors, rgb / 255, atol=1e-6)
    intensities = RNG.integers(-2000, 2000, (50, 1))
    scanned = load_point_cloud(write(tmp_path / "b.txt", np.hstack([XYZ, intensities, rgb])))
    assert scanned.colors is not None
    np.testing.assert_allclose(scanned.colors, rgb / 255, atol=1e-6)
    path = write(tmp_path / "c.txt", np.hstack([XYZ, RNG.integers(0, 256, (50, 1)), rgb]))
    with pytest.raises(DataError, match="rgb may be columns 4-6 or 5-7; name them"):
        load_point_cloud(path)
    named = load_point_cloud(path, columns=["x", "y", "z", "intensity", "red", "green", "blue"])
    assert named.colors is not None
    np.testing.assert_allclose(named.colors, rgb / 255, atol=1e-6)


def test_what_is_neither_is_left_out_and_said(tmp_path: Path) -> None:
    features = load_point_cloud(write(tmp_path / "a.xyz", np.hstack([XYZ, RNG.normal(size=(50, 3)) * 5])))
    assert features.colors is None
    assert told(features, "neither colours nor normals")
    four = load_point_cloud(write(tmp_path / "b.xyz", np.hstack([XYZ, RNG.random((50, 1))])))
    assert four.colors is None
    assert told(four, "column 4 has no name and was not used")


def test_intensity_becomes_gray(tmp_path: Path) -> None:
    intensity = RNG.integers(1, 900, (50, 1))
    cloud = load_point_cloud(write(tmp_path / "a.csv", np.hstack([XYZ, intensity]), "x y z Intensity"))
    assert cloud.colors is not None
    np.testing.assert_allclose(cloud.colors, np.repeat(intensity / intensity.max(), 3, axis=1), atol=1e-6)
    assert told(cloud, "gray from intensity")


@pytest.mark.parametrize(
    "header",
    ["x,y,z,r,g,b", "X,Y,Z,Red,Green,Blue", "//X,Y,Z,R,G,B", '"x","y","z","red","green","blue"', "# x,y,z,R,G,B"],
)
def test_headers(tmp_path: Path, header: str) -> None:
    rgb = RNG.integers(0, 256, (50, 3))
    rows = "\n".join(",".join(map(str, row)) for row in np.hstack([XYZ, rgb]).tolist())
    (tmp_path / "a.csv").write_text(f"{header}\n{rows}\n")
    cloud = load_point_cloud(tmp_path / "a.csv")
    assert cloud.colors is not None
    np.testing.assert_allclose(cloud.colors, rgb / 255, atol=1e-6)
    np.testing.assert_allclose(cloud.points, XYZ, atol=1e-6)


def test_columns_in_another_order_with_others_between(tmp_path: Path) -> None:
    rgb = RNG.integers(0, 256, (50, 3))
    names = ["", "nx", "label", "blue", "z", "red", "y", "green", "x"]
    columns = {"blue": rgb[:, 2], "red": rgb[:, 0], "green": rgb[:, 1], **dict(zip("xyz", XYZ.T, strict=True))}
    rows = [[columns[n][i] if n in columns else "chair" if n == "label" else 7 for n in names] for i in range(50)]
    text = "\n".join(";".join(map(str, row)) for row in [names, *rows])
    (tmp_path / "a.csv").write_text(text.replace("chair", "3"))
    cloud = load_point_cloud(tmp_path / "a.csv")
    np.testing.assert_allclose(cloud.points, XYZ, atol=1e-6)
    assert cloud.colors is not None
    np.testing.assert_allclose(cloud.colors, rgb / 255, atol=1e-6)


def test_words_in_columns_that_are_not_needed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y,z,label\n" + "".join(f"{x},{y},{z},chair\n" for x, y, z in XYZ.tolist()))
    np.testing.assert_allclose(load_point_cloud(tmp_path / "a.csv").points, XYZ, atol=1e-6)


def test_decimal_commas(tmp_path: Path) -> None:
    rows = "\n".join(";".join(f"{value}".replace(".", ",") for value in row) for row in XYZ.tolist())
    (tmp_path / "a.csv").write_text(f"x;y;z\n{rows}\n")
    np.testing.assert_allclose(load_point_cloud(tmp_path / "a.csv").points, XYZ, atol=1e-6)


def test_untidy_text(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_bytes(
        b"\xef\xbb\xbf# cloud\n\n  1   2\t3\r\n// half way\n+4 +5.0 -6e0  \n\n7 8 nan\n1 1 1"
    )
    cloud = load_point_cloud(tmp_path / "a.xyz")
    np.testing.assert_array_equal(cloud.points, [[1, 2, 3], [4, 5, -6], [1, 1, 1]])
    assert told(cloud, "1 point with coordinates that are not finite was left out")


def test_gaussian_splats(tmp_path: Path) -> None:
    names = ["x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"]
    head = "ply\nformat binary_little_endian 1.0\nelement vertex 50\n" + "".join(f"property float {n}\n" for n in names)
    harmonics = RNG.normal(size=(50, 3))
    table = np.hstack([XYZ, harmonics, np.zeros((50, 1))]).astype("<f4")
    (tmp_path / "a.ply").write_bytes(f"{head}end_header\n".encode() + table.tobytes())
    cloud = load_point_cloud(tmp_path / "a.ply")
    assert cloud.colors is not None
    np.testing.assert_allclose(cloud.colors, (0.5 + ZEROTH_HARMONIC * harmonics).clip(0, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("x y z r g b", np.hstack([XYZ, RNG.random((50, 3)) * 1.9]), "colours from .* not 0-1, 0-255"),
        ("x y z r g b", np.hstack([XYZ, RNG.normal(size=(50, 3))]), "colours from -"),
        ("a b c", XYZ, "has columns 'a', 'b', 'c' and not x, y, z among them; say which is which"),
        ("x y z", XYZ[:, :2], "names 3 columns and has 2"),
        ("", XYZ[:, :2], "has 2 columns; a cloud has at least x, y, z"),
        ("", np.full((5, 3), np.nan), "no point with finite coordinates"),
    ],
)
def test_refusals(tmp_path: Path, header: str, rows: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_point_cloud(write(tmp_path / "a.txt", rows, header))


def test_the_user_may_say_what_columns_are(tmp_path: Path) -> None:
    rgb = RNG.random((50, 3)).round(4)
    path = write(tmp_path / "a.txt", np.hstack([rgb, XYZ]))
    cloud = load_point_cloud(path, columns=["r", "g", "b", "x", "y", "z"])
    np.testing.assert_allclose(cloud.points, XYZ, atol=1e-6)
    assert cloud.colors is not None
    np.testing.assert_allclose(cloud.colors, rgb, atol=1e-6)
    np.save(tmp_path / "a.npy", np.hstack([XYZ, rgb]))
    assert load_point_cloud(tmp_path / "a.npy", columns=["x", "y", "z", "-", "-", "-"]).colors is None
    with pytest.raises(DataError, match="has 6 columns and 2 names"):
        load_point_cloud(path, columns=["x", "y"])


def test_the_user_may_say_what_full_color_is(tmp_path: Path) -> None:
    rgb = RNG.integers(0, 2, (50, 3))
    path = write(tmp_path / "a.txt", np.hstack([XYZ, rgb]))
    for full in (0, -5, float("nan"), float("inf")):
        with pytest.raises(DataError, match="the colour value that means full is above 0"):
            load_point_cloud(path, color_max=full)
    cloud = load_point_cloud(path, color_max=255)
    assert cloud.colors is not None
    np.testing.assert_allclose(cloud.colors, rgb / 255, atol=1e-7)
    with pytest.raises(DataError, match="not 0 to"):
        load_point_cloud(path, columns=["x", "y", "z", "r", "g", "b"], color_max=0.5)


def test_broken_colors_are_left_out_and_said(tmp_path: Path) -> None:
    rgb = RNG.random((50, 3)).round(4)
    rgb[3, 1] = np.nan
    cloud = load_point_cloud(write(tmp_path / "a.txt", np.hstack([XYZ, rgb]), "x y z r g b"))
    assert len(cloud) == 49
    assert told(cloud, "1 point with colours that are not finite was left out")


def test_names() -> None:
    assert [plain_name(name) for name in ("//X", "scalar_Intensity", "diffuse_red", " R ", "z [m]", "G(8 bit)")] == [
        *("x", "intensity", "red", "red", "z", "green")
    ]


# Thinning


def test_thinning_does_not_depend_on_the_pieces() -> None:
    rows = RNG.random((1000, 4))
    rows[::50, 0] = np.nan
    whole, pieces = Thinner(100, 4, seed=5), Thinner(100, 4, seed=5)
    whole.add(rows)
    for start in range(0, 1000, 37):
        pieces.add(rows[start : start + 37])
    np.testing.assert_array_equal(whole.rows(), pieces.rows())
    assert whole.seen == pieces.seen == 980
    assert whole.dropped == pieces.dropped == 20
    np.testing.assert_array_equal(whole.low, pieces.low)
    assert (Thinner(100, 4, seed=5).rows().shape, len(whole.rows())) == ((0, 4), 100)


def test_thinning_is_uniform_and_keeps_the_order() -> None:
    counts = np.zeros(60)
    for seed in range(300):
        thinner = Thinner(20, 3, seed)
        for piece in np.split(np.arange(60.0).repeat(3).reshape(60, 3), 6):
            thinner.add(piece)
        kept = thinner.rows()[:, 0].astype(int)
        assert (np.diff(kept) > 0).all()
        counts[kept] += 1
    # 300 draws of 20 in 60: 100 each, with a standard deviation of about 8.
    assert counts.sum() == 6000
    assert 65 < counts.min() <= counts.max() < 135


@pytest.mark.parametrize(
    ("start", "channels"),
    [
        ("//X Y Z R G B Intensity\n40\n", "rgbi"),  # as CloudCompare writes both
        ("40\n//X Y Z R G B Intensity\n", "rgbi"),
        ("X Y Z R G B Intensity\n40\n", "rgbi"),
        ("//X Y Z B G R\n40\n", "bgr"),
        ("X Y Z B G R\n40\n", "bgr"),
        ("// made by hand on a Monday\n40\n", "rgb"),  # says nothing of columns, however many words it has
        ("//X Y Z Rf Gf Bf\n", "rgb"),
    ],
)
def test_a_header_and_a_count_of_points(tmp_path: Path, start: str, channels: str) -> None:
    rng = np.random.default_rng(0)
    values = {"r": rng.integers(0, 256, 40), "g": rng.integers(0, 256, 40), "b": rng.integers(0, 256, 40)}
    values["i"] = rng.integers(0, 3000, 40)
    columns = [rng.random((40, 3)), *(values[name][:, None] for name in channels)]
    rows = "\n".join(" ".join(f"{number:g}" for number in row) for row in np.concatenate(columns, axis=1))
    (tmp_path / "a.asc").write_text(start + rows + "\n")
    cloud = load_point_cloud(tmp_path / "a.asc", n_points=40)
    assert cloud.colors is not None
    found = np.sort(cloud.colors, axis=0)
    np.testing.assert_allclose(
        found, np.sort(np.stack([values[name] for name in "rgb"], axis=1) / 255, axis=0), atol=1e-6
    )
