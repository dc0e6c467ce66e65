"""A folder of clouds as the field keeps them."""

import os
import pickle

import numpy as np
import pytest

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
    assert len(clouds.files) == 2
    assert np.array_equal(clouds["abc"], np.load(folder / "abc_8192.npy"))
    assert clouds["with_underscore"].shape == (64, 6)
    assert NumpyClouds(str(folder)).files == clouds.files


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
