"""Files read by other processes: the same clouds, and a file that kills its reader costs itself alone."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from pointalign.answering.reader import read_cloud, receive_cloud, send_cloud
from pointalign.answering.reading import TimedReader, read_clouds, reading_processes
from pointalign.data.files import PointCloud
from pointalign.errors import DataError

# What leads to a process that ended, and the process, are let go.
pytestmark = pytest.mark.filterwarnings("error")
OPTIONS = {"n_points": 40}
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds child processes through /proc")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = []
    for number in range(5):
        path = tmp_path / f"{number}.npy"
        np.save(path, np.random.default_rng(number).random((60, 6 if number else 3)))
        paths.append(str(path))
    (tmp_path / "broken.glb").write_bytes(b"glTF but no more")
    return [*paths, str(tmp_path / "broken.glb"), str(tmp_path / "missing.ply")]


def same(first: PointCloud | DataError, second: PointCloud | DataError) -> bool:
    if isinstance(first, DataError) or isinstance(second, DataError):
        return str(first) == str(second)
    if (first.colors is None) != (second.colors is None):
        return False
    told, told_again = ((cloud.source, cloud.notes, cloud.unit) for cloud in (first, second))
    return np.array_equal(first.array(), second.array()) and told == told_again


@pytest.mark.parametrize("ahead", [1, 20])
def test_processes_read_what_is_read_here(files: list[str], ahead: int) -> None:
    here = dict(read_clouds(files, OPTIONS, 0, 1))
    there = list(read_clouds(files, OPTIONS, 2, ahead))
    assert list(here) == files
    assert sorted(path for path, _ in there) == sorted(files)
    for path, cloud in there:
        assert same(cloud, here[path]), path
    assert [isinstance(cloud, DataError) for cloud in here.values()] == [False] * 5 + [True] * 2
    in_order = list(read_clouds(files[::-1] * 3, OPTIONS, 2, ahead, in_order=True))
    assert [path for path, _ in in_order] == files[::-1] * 3
    assert all(same(cloud, here[path]) for path, cloud in in_order)


def test_clouds_survive_the_way_between_processes() -> None:
    points = np.random.default_rng(0).random((7, 3)).astype(np.float32)
    for cloud in (
        PointCloud(points, None, "a", ("x", "y")),
        PointCloud(points, points, "b", unit=0.01),
        DataError("no\ngood"),
    ):
        stream = io.BytesIO()
        send_cloud(stream, cloud)
        stream.seek(0)
        assert same(receive_cloud(stream), cloud)
    for cut in (b"", b'{"points": 7', json.dumps({"points": 7, "colored": False}).encode() + b"\n1234"):
        with pytest.raises(EOFError):
            receive_cloud(io.BytesIO(cut))


def children() -> list[int]:
    """Processes that any thread of this one has started."""
    threads = Path("/proc/self/task").iterdir()
    return [int(pid) for thread in threads for pid in (thread / "children").read_text().split()]


@needs_proc
def test_a_killed_reader_costs_the_file_it_was_reading(files: list[str], tmp_path: Path) -> None:
    slow = str(tmp_path / "slow.npy")
    np.save(slow, np.random.default_rng(0).random((400_000, 6), np.float32))
    before = set(children())
    clouds = read_clouds([*files[:2], slow, *files[2:4]], OPTIONS, 1, 1)
    found = dict([next(clouds), next(clouds)])
    (started,) = set(children()) - before
    os.kill(started, signal.SIGKILL)
    found |= dict(clouds)
    assert list(found) == [*files[:2], slow, *files[2:4]]
    assert [path for path, cloud in found.items() if isinstance(cloud, DataError)] == [slow]
    assert "the process that read it ended with signal SIGKILL; make the file smaller" in str(found[slow])


@needs_proc
def test_leaving_early_ends_the_processes(files: list[str]) -> None:
    before = set(children())
    clouds = read_clouds(files * 4, OPTIONS, 2, 2)
    next(clouds)
    started = set(children()) - before
    assert started
    clouds.close()
    deadline = time.monotonic() + 20
    while set(children()) & started and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(children()) & started


def test_whatever_a_reader_trips_over_is_told(tmp_path: Path) -> None:
    assert "give one 3D file" in str(read_cloud(str(tmp_path), OPTIONS))
    assert "cannot read x.npy: TypeError" in str(read_cloud("x.npy", {"n_points": "many"}))


def test_few_files_are_read_here() -> None:
    assert reading_processes(3, None) == 0
    assert reading_processes(1, 4) == 1
    assert reading_processes(10_000, 0) == 0
    assert 1 <= reading_processes(10_000, None) <= 8


def test_a_timed_reader_gives_up_on_a_slow_file_and_reads_the_next(files: list[str], tmp_path: Path) -> None:
    np.save(tmp_path / "slow.npy", np.random.default_rng(0).random((300_000, 3)))
    reader = TimedReader(tmp_path, 2)
    try:
        start = time.monotonic()
        slow = reader.read("slow.npy", {"n_points": 200_000})  # farthest points of that many take minutes
        assert isinstance(slow, DataError)
        assert str(slow).startswith("slow.npy: reading it took more than 2 seconds; make the file smaller")
        assert time.monotonic() - start < 60
        read = reader.read("1.npy", OPTIONS)
        assert isinstance(read, PointCloud)
        assert read.source == "1.npy"
        assert same(reader.read("missing.ply", OPTIONS), DataError("no 3D file at missing.ply; check the path"))
    finally:
        reader.close()
    assert "any more" in str(reader.read("1.npy", OPTIONS))
