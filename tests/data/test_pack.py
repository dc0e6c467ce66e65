"""Packed clouds: the same arrays by id from anywhere, and a packing that can be stopped at any moment."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import fsspec
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pointalign.data import pack
from pointalign.data.objaverse import NumpyClouds
from pointalign.data.pack import pack_clouds
from pointalign.data.packed import INDEX_FILE, JOURNAL_FILE, PackedClouds
from pointalign.data.sources import open_clouds, read_clouds
from pointalign.errors import ConfigError, DataError, MissingDependencyError
from pointalign.storage import taken_lock


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pack, "SHARD_CLOUDS", 4)
    monkeypatch.setattr(pack, "GROUP_CLOUDS", 3)


def fill(folder, count=10, first=0):
    folder.mkdir(exist_ok=True)
    for index in range(first, first + count):
        points = np.random.default_rng(index).random((index % 5 + 3, 3 if index == 7 else 6), dtype=np.float32)
        np.save(folder / f"object_{index:03d}_8192.npy", points)


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path / "clouds")
    return tmp_path / "clouds"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "packed"


def assert_same(packed, folder):
    clouds = NumpyClouds(folder)
    assert list(packed) == list(clouds)
    for object_id in clouds:
        assert packed[object_id].dtype == np.float32
        assert packed[object_id].flags.writeable
        assert packed[object_id].shape == clouds[object_id].shape
        assert packed[object_id].tobytes() == clouds[object_id].astype(np.float32).tobytes()


def contents(out):
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.name != JOURNAL_FILE}


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# Reading


def test_packed_clouds_are_the_clouds(folder, out):
    report = pack_clouds(folder, out)
    assert {name: report[name] for name in ("clouds", "shards", "broken", "rounded")} == {
        "clouds": 10,
        "shards": 3,
        "broken": 0,
        "rounded": 0,
    }
    packed = open_clouds(out)
    assert isinstance(packed, PackedClouds)
    assert_same(packed, folder)
    assert len(packed) == 10
    assert "object_003" in packed
    assert "nobody" not in packed
    assert report["bytes"] == packed.num_bytes == sum(path.stat().st_size for path in out.glob("*.parquet"))
    assert report["fingerprint"] == packed.fingerprint
    with pytest.raises(DataError, match="has no cloud of object nobody"):
        packed["nobody"]
    again = pickle.loads(pickle.dumps(packed))
    assert_same(again, folder)
    objects = ["object_009", "object_000", "object_009"]
    for points, object_id in zip(read_clouds(packed, objects), objects, strict=True):
        assert np.array_equal(points, packed[object_id])
    assert read_clouds(packed, []) == []


def test_packed_clouds_at_an_address(folder, out):
    report = pack_clouds(folder, out)
    files = fsspec.filesystem("memory")
    files.put(str(out), "/bucket/clouds", recursive=True)
    for address in ("memory://bucket/clouds", out.as_uri()):
        packed = open_clouds(address)
        assert_same(packed, folder)
        assert packed.fingerprint == report["fingerprint"]
    files.rm("/bucket/clouds/clouds-00001.parquet")
    with pytest.raises(DataError, match=r"1 of 3 shards of memory://bucket/clouds are missing .*clouds-00001\.parquet"):
        open_clouds("memory://bucket/clouds")
    files.rm("/bucket", recursive=True)


def test_other_readers_open_the_shards_as_they_are(folder, out):
    pack_clouds(folder, out)
    clouds = NumpyClouds(folder)
    frame = pd.read_parquet(out)
    assert list(frame.columns) == ["object_id", "num_points", "points"]
    assert frame.object_id.tolist() == list(clouds)
    for row in frame.itertuples():
        assert row.points.dtype == np.float32
        assert np.array_equal(row.points.reshape(row.num_points, -1), clouds[row.object_id])
    tables = [pq.ParquetFile(path).read() for path in sorted(out.glob("*.parquet"))]
    assert sum(table.num_rows for table in tables) == 10
    assert pq.ParquetFile(out / "clouds-00000.parquet").num_row_groups == 2


ODD = arrays(np.float32, st.tuples(st.integers(0, 20), st.sampled_from([3, 6])), elements=st.floats(width=32))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.lists(ODD, min_size=1, max_size=9))
def test_any_numbers_come_back_bit_for_bit(tmp_path_factory, clouds):
    root = tmp_path_factory.mktemp("any")
    (root / "clouds").mkdir()
    for index, points in enumerate(clouds):
        np.save(root / "clouds" / f"{index}_8192.npy", points)
    pack_clouds(root / "clouds", root / "packed")
    assert_same(PackedClouds(root / "packed"), root / "clouds")


def test_clouds_that_look_alike_do_not_get_mixed_up(tmp_path, out):
    """All zeros, as the bytes around them are; beginnings that are the same; the same cloud twice."""
    folder = tmp_path / "alike"
    folder.mkdir()
    for index in range(12):
        points = np.zeros((40, 6), dtype=np.float32)
        points[-1, -1] = index // 2
        np.save(folder / f"{index:02d}_8192.npy", points)
    pack_clouds(folder, out)
    assert_same(PackedClouds(out), folder)


def test_other_kinds_of_numbers_are_kept_as_float32(tmp_path, out):
    folder = tmp_path / "kinds"
    folder.mkdir()
    values = np.random.default_rng(0).random((6, 6))
    for name, points in {
        "double": values,
        "half": values.astype(np.float16),
        "swapped": values.astype(">f4"),
        "fortran": np.asfortranarray(values.astype(np.float32)),
        "bytes": (values * 255).astype(np.uint8),
        "exact": values.round(),
        "nan": np.full((2, 6), np.nan),
    }.items():
        np.save(folder / f"{name}_8192.npy", points)
    assert pack_clouds(folder, out)["rounded"] == 1
    assert_same(PackedClouds(out), folder)


@pytest.mark.parametrize("change", ["missing", "shorter", "longer"])
def test_shards_that_are_not_whole_are_named_at_once(folder, out, change):
    pack_clouds(folder, out)
    path = out / "clouds-00002.parquet"
    content = path.read_bytes()
    path.unlink() if change == "missing" else path.write_bytes(content[:-9] if change == "shorter" else content + b"x")
    with pytest.raises(
        DataError, match=r"1 of 3 shards of .* are missing or not whole \(first: clouds-00002\.parquet\)"
    ):
        open_clouds(out)


def test_a_shard_that_is_cut_short_while_it_is_in_use(folder, out):
    packed = PackedClouds(out) if pack_clouds(folder, out) else None
    path = out / "clouds-00002.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"clouds-00002\.parquet of .* is cut short; copy it again"):
        packed["object_009"]
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read .*clouds-00002\.parquet") as error:
        packed["object_009"]
    one_line(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is broken"), (b"PAR1", "is broken"), (None, "is broken"), ("other", "was packed in layout 2, not 1")],
)
def test_a_broken_index_is_named(folder, out, content, message, monkeypatch):
    if content == "other":
        monkeypatch.setattr(pack, "INDEX_VERSION", 2)
        with pytest.raises(DataError, match=message):
            pack_clouds(folder, out)
        return
    pack_clouds(folder, out)
    path = out / INDEX_FILE
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    with pytest.raises(DataError, match=message) as error:
        open_clouds(out)
    one_line(error)


def test_a_parquet_file_in_the_place_of_the_index(folder, out):
    pack_clouds(folder, out)
    (out / INDEX_FILE).write_bytes((out / "clouds-00000.parquet").read_bytes())
    with pytest.raises(
        DataError, match=r"_clouds\.index is broken \('shards'|_clouds\.index is broken \(b'pointalign'"
    ):
        open_clouds(out)


def test_addresses_that_lead_nowhere(out):
    for address, message in (
        ("memory://nowhere", "holds no _clouds.index"),
        ("wrong://bucket", "Protocol not known"),
        ("http://127.0.0.1:9/clouds", "cannot read http://127.0.0.1:9/clouds"),
    ):
        with pytest.raises((DataError, MissingDependencyError)) as error:
            open_clouds(address)
        assert message in one_line(error) or "pip install" in one_line(error)


def test_storage_whose_package_is_not_installed(monkeypatch):
    def absent(address):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(MissingDependencyError, match=r"cannot open s3://bucket/clouds: Install s3fs .*pip install"):
        open_clouds("s3://bucket/clouds")


# Packing


def test_the_same_clouds_give_the_same_bytes(folder, out, tmp_path):
    pack_clouds(folder, out, readers=1)
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    folder.rename(tmp_path / "moved")
    pack_clouds(tmp_path / "moved", tmp_path / "again", readers=5)
    assert contents(out) == contents(tmp_path / "again")


def test_a_second_run_reads_nothing(folder, out, monkeypatch, capsys):
    first = pack_clouds(folder, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    monkeypatch.setattr(pack, "_read", None)
    assert pack_clouds(folder, out) == first
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")} == before
    assert "3 of 3 shards are packed already" in capsys.readouterr().err


def read_again(folder, out, monkeypatch):
    """Object ids that a further run reads."""
    seen = []
    read = pack._read
    monkeypatch.setattr(pack, "_read", lambda clouds, object_id: seen.append(object_id) or read(clouds, object_id))
    pack_clouds(folder, out)
    monkeypatch.setattr(pack, "_read", read)
    return sorted(seen)


def test_only_what_changed_is_packed_again(folder, out, monkeypatch):
    pack_clouds(folder, out)
    np.save(folder / "object_005_8192.npy", np.ones((4, 6), dtype=np.float32))
    assert read_again(folder, out, monkeypatch) == [f"object_00{index}" for index in (4, 5, 6, 7)]
    assert_same(PackedClouds(out), folder)
    fill(folder, 3, first=10)
    assert read_again(folder, out, monkeypatch) == [f"object_0{index:02d}" for index in range(8, 13)]
    assert_same(PackedClouds(out), folder)
    for index in range(6, 13):
        (folder / f"object_{index:03d}_8192.npy").unlink()
    assert read_again(folder, out, monkeypatch) == ["object_004", "object_005"]
    assert_same(PackedClouds(out), folder)
    assert sorted(path.name for path in out.glob("*.parquet")) == ["clouds-00000.parquet", "clouds-00001.parquet"]


def test_a_shard_that_was_lost_is_packed_again(folder, out, monkeypatch):
    pack_clouds(folder, out)
    before = contents(out)
    (out / "clouds-00001.parquet").write_bytes(b"half")
    assert read_again(folder, out, monkeypatch) == [f"object_00{index}" for index in (4, 5, 6, 7)]
    assert contents(out) == before


def test_an_interruption_leaves_whole_shards_and_goes_on(folder, out, monkeypatch):
    read = pack._read

    def interrupted(clouds, object_id):
        if object_id == "object_006":
            raise KeyboardInterrupt
        return read(clouds, object_id)

    monkeypatch.setattr(pack, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack_clouds(folder, out)
    assert sorted(path.name for path in out.iterdir()) == [JOURNAL_FILE, "clouds-00000.parquet"]
    with pytest.raises(DataError, match=r"holds no _clouds\.index, so it is no finished packed folder"):
        open_clouds(out)
    monkeypatch.setattr(pack, "_read", read)
    assert read_again(folder, out, monkeypatch) == [f"object_00{index}" for index in range(4, 10)]
    assert_same(PackedClouds(out), folder)


PROCESS = """
import sys, time
from pointalign.data import pack
pack.SHARD_CLOUDS, pack.GROUP_CLOUDS = 4, 3
read = pack._read
def slow(clouds, object_id):
    time.sleep(0.004)
    return read(clouds, object_id)
pack._read = slow
pack.pack_clouds(sys.argv[1], sys.argv[2], readers=1)
"""


@pytest.mark.parametrize("shards", [1, 7])
def test_killed_and_run_again_equals_never_stopped(tmp_path, out, shards, monkeypatch):
    folder = tmp_path / "many"
    fill(folder, 120)
    process = subprocess.Popen([sys.executable, "-c", PROCESS, str(folder), str(out)], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (out / JOURNAL_FILE).is_file() or len((out / JOURNAL_FILE).read_text().splitlines()) <= shards:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("clouds-*.parquet")}
    assert shards <= len(kept) < 30
    for name in kept:
        assert pq.ParquetFile(out / name).read().num_rows == 4
    journaled = [json.loads(line)["shard"] for line in (out / JOURNAL_FILE).read_text().splitlines()[1:]]
    # A line cut short and a file half written, as a kill in another moment leaves them.
    with (out / JOURNAL_FILE).open("a") as journal:
        journal.write('{"shard": "clouds-000')
    for name in ("clouds-00029.parquet", INDEX_FILE):
        (out / f".0123456789ab-{name}").write_bytes(b"half")
    assert len(read_again(folder, out, monkeypatch)) == 120 - 4 * len(journaled)
    for name in journaled:
        assert (out / name).stat().st_mtime_ns == kept[name]
    pack_clouds(folder, tmp_path / "unbroken")
    assert contents(out) == contents(tmp_path / "unbroken")
    assert read_again(folder, out, monkeypatch) == []


def test_a_link_to_nowhere_is_a_broken_file(folder, out):
    (folder / "object_999_8192.npy").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"1 of 11 clouds could not be read \(first: .*object_999_8192\.npy is broken"):
        pack_clouds(folder, out)
    assert pack_clouds(folder, out, skip_broken=True)["clouds"] == 10


def test_broken_files_are_named_and_the_rest_is_packed(folder, out, monkeypatch, capsys):
    broken = {"object_002": b"garbage", "object_009": b""}
    whole = {name: (folder / f"{name}_8192.npy").read_bytes() for name in broken}
    for name, content in broken.items():
        (folder / f"{name}_8192.npy").write_bytes(content)
    with pytest.raises(
        DataError, match=r"2 of 10 clouds could not be read \(first: .*object_002_8192\.npy is broken .*--skip-broken"
    ) as error:
        pack_clouds(folder, out)
    one_line(error)
    listed = [line.split("\t")[0] for line in (out / pack.BROKEN_FILE).read_text().splitlines()]
    assert listed == list(broken)
    assert not (out / INDEX_FILE).exists()

    report = pack_clouds(folder, out, skip_broken=True)
    assert (report["clouds"], report["broken"]) == (8, 2)
    assert "left out, all are named in" in capsys.readouterr().err
    packed = PackedClouds(out)
    assert "object_002" not in packed
    assert np.array_equal(packed["object_003"], NumpyClouds(folder)["object_003"])

    with pytest.raises(DataError, match="2 of 10"):
        pack_clouds(folder, out)
    assert not (out / INDEX_FILE).exists()

    for name, content in whole.items():
        (folder / f"{name}_8192.npy").write_bytes(content)
    assert read_again(folder, out, monkeypatch) == [f"object_00{index}" for index in (0, 1, 2, 3, 8, 9)]
    assert_same(PackedClouds(out), folder)
    assert not (out / pack.BROKEN_FILE).exists()


def test_a_shard_of_broken_files_alone(folder, out):
    for index in range(4, 8):
        (folder / f"object_00{index}_8192.npy").write_bytes(b"")
    assert pack_clouds(folder, out, skip_broken=True)["clouds"] == 6
    assert list(PackedClouds(out)) == [f"object_00{index}" for index in (0, 1, 2, 3, 8, 9)]
    assert len(pd.read_parquet(out)) == 6
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="10 of 10 clouds could not be read"):
        pack_clouds(folder, out, skip_broken=True)


def test_folders_that_are_not_to_be_touched(folder, out, tmp_path):
    pack_clouds(folder, out)
    fill(tmp_path / "other", 3)
    with pytest.raises(ConfigError, match=r"was packed from another folder than .*other"):
        pack_clouds(tmp_path / "other", out)
    assert_same(PackedClouds(out), folder)
    (out / JOURNAL_FILE).unlink()
    assert_same(open_clouds(out), folder)
    with pytest.raises(ConfigError, match=r"holds shards but no _pack\.jsonl"):
        pack_clouds(folder, out)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*file") as error:
        pack_clouds(folder, tmp_path / "file")
    one_line(error)
    with pytest.raises(DataError, match="no folder"):
        pack_clouds(tmp_path / "nowhere", out)
    with pytest.raises(ConfigError, match="--readers 0"):
        pack_clouds(folder, out, readers=0)


def test_one_process_packs_into_a_folder_at_a_time(folder, out):
    pack_clouds(folder, out)
    with taken_lock(out / JOURNAL_FILE), pytest.raises(DataError, match=r"another process is writing .*_pack\.jsonl"):
        pack_clouds(folder, out)
    assert_same(PackedClouds(out), folder)
    pack_clouds(folder, out)


def test_a_disk_that_is_full(folder, out, monkeypatch):
    def full(table):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack, "_table", full)
    with pytest.raises(
        DataError, match=r"cannot write .*No space left on device.*free some space, and run the same"
    ) as error:
        pack_clouds(folder, out)
    one_line(error)
    assert [path.name for path in out.iterdir()] == [JOURNAL_FILE]
