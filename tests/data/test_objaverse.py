"""A folder of clouds as the field keeps them."""

import hashlib
import os
import pickle

import numpy as np
import pytest

from pointalign.data import objaverse
from pointalign.data.objaverse import NumpyClouds
from pointalign.errors import DataError


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("abc", "with_underscore"):
        np.save(tmp_path / f"{name}_8192.npy", generator.random((64, 6), dtype=np.float32))
    (tmp_path / "notes.txt").write_text("not a cloud")
    return tmp_path


def test_clouds_by_object_id(folder):
    clouds = NumpyClouds(folder)
    assert "abc" in clouds
    assert "with_underscore" in clouds
    assert "with" not in clouds
    assert "notes" not in clouds
    assert list(clouds) == ["abc", "with_underscore"]
    assert len(clouds) == 2
    assert np.array_equal(clouds["abc"], np.load(folder / "abc_8192.npy"))
    assert clouds["with_underscore"].shape == (64, 6)
    assert list(NumpyClouds(str(folder))) == list(clouds)
    assert clouds.num_bytes == sum(path.stat().st_size for path in folder.glob("*.npy"))


def test_hidden_files_are_passed_over_and_the_last_of_several_counts(folder):
    (folder / "._abc_8192.npy").write_bytes(b"what a Mac leaves in an archive")
    (folder / "plain.npy").write_bytes(b"")
    np.save(folder / "abc_2048.npy", np.zeros((5, 6)))
    clouds = NumpyClouds(folder)
    assert list(clouds) == ["abc", "with_underscore"]
    assert clouds["abc"].shape == (64, 6)


def test_the_fingerprint_of_a_hundred_files_is_that_of_one_by_one(tmp_path, monkeypatch):
    """As it was before files were looked at in pieces, so that caches stay valid."""
    for index in range(100):
        np.save(tmp_path / f"{index:03d}_8192.npy", np.zeros((index % 7, 6)))
    digest = hashlib.sha256()
    for path in sorted(tmp_path.glob("*_*.npy")):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    monkeypatch.setattr(objaverse, "PIECE", 7)
    clouds = NumpyClouds(tmp_path)
    assert clouds.fingerprint == digest.hexdigest()
    (tmp_path / "003_8192.npy").unlink()
    assert clouds.fingerprint == digest.hexdigest()
    with pytest.raises(DataError, match=r"cannot look at .*003_8192\.npy: No such file"):
        clouds.states(list(clouds))


def test_the_fingerprint_changes_with_the_files(folder):
    seen = {NumpyClouds(folder).fingerprint}
    assert NumpyClouds(folder).fingerprint in seen
    np.save(folder / "new_8192.npy", np.zeros((8, 6)))
    seen.add(NumpyClouds(folder).fingerprint)
    np.save(folder / "new_8192.npy", np.zeros((9, 6)))
    seen.add(NumpyClouds(folder).fingerprint)
    os.utime(folder / "new_8192.npy", ns=(1, 1))
    seen.add(NumpyClouds(folder).fingerprint)
    (folder / "new_8192.npy").rename(folder / "other_8192.npy")
    seen.add(NumpyClouds(folder).fingerprint)
    assert len(seen) == 5


def test_folders_without_clouds(tmp_path):
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        NumpyClouds(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no \{object_id\}_8192\.npy file"):
        NumpyClouds(tmp_path)


def test_a_missing_object(folder):
    with pytest.raises(DataError, match="has no cloud of object nobody"):
        NumpyClouds(folder)["nobody"]


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"garbage" * 9, None], ids=["empty", "cut", "garbage", "short"])
def test_broken_files_are_named(folder, content):
    path = folder / "abc_8192.npy"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(DataError, match=r"abc_8192\.npy is broken") as error:
        NumpyClouds(folder)["abc"]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 5)), r"shape \(4, 5\), but a point cloud has shape \(points, 3\) or \(points, 6\)"),
        (np.zeros(6), r"shape \(6,\)"),
        (np.zeros((2, 4, 6)), r"shape \(2, 4, 6\)"),
        (np.array(1.0), r"shape \(\)"),
        (np.zeros((4, 6), dtype=complex), "it holds complex128, not numbers"),
        (np.full((4, 6), "x"), "not numbers"),
        (np.zeros((4, 6), dtype=bool), "not numbers"),
    ],
)
def test_arrays_that_are_no_clouds_are_named(folder, array, message):
    np.save(folder / "abc_8192.npy", array)
    with pytest.raises(DataError, match=rf"abc_8192\.npy .*{message}.*copy it again") as error:
        NumpyClouds(folder)["abc"]
    assert "\n" not in str(error.value)


def test_clouds_without_colour_and_of_whole_numbers(folder):
    np.save(folder / "abc_8192.npy", np.arange(12, dtype=np.uint8).reshape(4, 3))
    assert NumpyClouds(folder)["abc"].shape == (4, 3)


@pytest.mark.parametrize("name", ["archive", "long header", "too large"])
def test_files_that_only_look_like_arrays(folder, name):
    path = folder / "abc_8192.npy"
    if name == "archive":
        with path.open("wb") as file:
            np.savez(file, np.zeros((4, 6)))
    elif name == "long header":
        path.write_bytes(b"\x93NUMPY\x02\x00" + (20_000).to_bytes(4, "little") + b" " * 20_000)
    else:
        header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000, 6), }"
        path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    with pytest.raises(DataError, match=r"abc_8192\.npy is broken \(") as error:
        NumpyClouds(folder)["abc"]
    assert "\n" not in str(error.value)


def test_a_file_that_vanished(folder):
    clouds = NumpyClouds(folder)
    (folder / "abc_8192.npy").unlink()
    with pytest.raises(DataError, match=r"abc_8192\.npy is broken"):
        clouds["abc"]


class Trap:
    """Unpickling this leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("form", ["object array", "bare pickle"])
def test_pickles_are_never_loaded(folder, form):
    path, mark = folder / "abc_8192.npy", folder / "mark"
    if form == "object array":
        np.save(path, np.array([Trap(mark)], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(DataError, match="is broken"):
        NumpyClouds(folder)["abc"]
    assert not mark.exists()
