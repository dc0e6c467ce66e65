"""Files that are written whole or not at all, and where the cache lies."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pointalign.errors import CheckpointError, DataError
from pointalign.storage import cache_dir, write_text, written_file, written_folder


def fail_within(writing, write):
    """Write half, then find the disk full."""
    with writing as temporary:
        write(temporary)
        raise OSError("disk full")


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("POINTALIGN_CACHE", str(tmp_path / "a"))
    assert cache_dir() == tmp_path / "a"
    monkeypatch.delenv("POINTALIGN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_dir() == tmp_path / "b" / "pointalign"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert cache_dir() == tmp_path / "c" / ".cache" / "pointalign"


def test_a_file_that_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    target = tmp_path / "new" / "a.json"
    write_text(target, "old")
    with pytest.raises(OSError, match="disk"):
        fail_within(written_file(target), lambda path: path.write_text("half"))
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]
    with written_file(target) as temporary:
        assert temporary.suffix == ".json"
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("name", ["", ".", "folder"])
def test_a_folder_is_no_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="it is a folder; name a file"):
        write_text(Path(name), "x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    target = tmp_path / "model"
    for content in ("old", "new"):
        with written_folder(target) as temporary:
            (temporary / "weights").write_text(content)
    assert (target / "weights").read_text() == "new"
    with pytest.raises(CheckpointError, match="cannot write"):
        fail_within(written_folder(target), lambda path: (path / "weights").write_text("half"))
    assert (target / "weights").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_written_where_its_link_leads(tmp_path):
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "large_disk" / "model")
    for content in ("first", "second"):
        with written_folder(tmp_path / "model") as temporary:
            (temporary / "weights").write_text(content)
        assert (tmp_path / "model").is_symlink()
        assert (tmp_path / "large_disk" / "model" / "weights").read_text() == content
    assert [path.name for path in (tmp_path / "large_disk").iterdir()] == ["model"]


def test_a_folder_whose_place_cannot_be_taken_stays(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "weights").write_text("old")
    rename = Path.rename

    def fail_once(path, other):
        if other == target and not path.name.endswith("-old"):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(path, other)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(CheckpointError, match="cannot write"), written_folder(target) as temporary:
        (temporary / "weights").write_text("new")
    assert (target / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_is_in_a_folder_can_be_read_as_new_files_can(tmp_path):
    mask = os.umask(0o027)
    try:
        with written_folder(tmp_path / "model") as temporary:
            (temporary / "part").mkdir(mode=0o700)
            save_file({"weight": torch.ones(2)}, temporary / "part" / "model.safetensors")
    finally:
        os.umask(mask)
    rights = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model", *(tmp_path / "model").rglob("*"))}
    assert rights == {"model": 0o750, "part": 0o750, "model.safetensors": 0o640}


def test_a_folder_that_another_process_wrote_meanwhile_stays(tmp_path):
    target = tmp_path / "converted"
    with written_folder(target, replace=False) as temporary:
        (temporary / "weights").write_text("ours")
        with written_folder(target, replace=False) as other:
            (other / "weights").write_text("theirs")
    assert (target / "weights").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [target]
