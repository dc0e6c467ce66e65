"""The cache of the frozen half: written once, whole or not at all, and never read stale."""

import pickle
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from torch import nn

from pointalign.data import features
from pointalign.data.features import FeatureCache, weights_fingerprint
from pointalign.errors import DataError


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(features, "SHARD_SIZE", 4)


IDS = [f"object-{i}" for i in range(10)]


def value_of(object_id):
    number = float(object_id.rpartition("-")[2])
    return {"point_features": torch.full((3, 2), number), "point_tokens": torch.tensor([number, -number])}


class Computed:
    """Computes features and remembers of what."""

    def __init__(self):
        self.batches = []

    def __call__(self, batch):
        self.batches.append(list(batch))
        rows = [value_of(object_id) for object_id in batch]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def fill(cache, batch_size=3):
    compute, done = Computed(), []
    cache.fill(compute, batch_size, done.append)
    assert sum(done) == len(cache.object_ids)
    return compute.batches


def assert_right(cache, ids=IDS):
    for object_id in ids:
        got, wanted = cache[object_id], value_of(object_id)
        assert got.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(got[name], tensor)


def test_fill_computes_each_object_once_and_reads_it_back(tmp_path):
    cache = FeatureCache(tmp_path, IDS, {"weights": "a"})
    assert cache.num_shards == 3
    assert fill(cache) == [IDS[0:3], IDS[3:4], IDS[4:7], IDS[7:8], IDS[8:10]]
    assert_right(cache)
    assert sorted(p.name for p in cache.folder.iterdir()) == [
        f"features-0000{i}-of-00003.safetensors" for i in range(3)
    ]
    assert fill(cache) == []
    again = FeatureCache(tmp_path, IDS, {"weights": "a"})
    assert fill(again) == []
    assert_right(again, reversed(IDS))


def test_a_deleted_shard_alone_is_computed_again(tmp_path):
    fill(FeatureCache(tmp_path, IDS, {}))
    cache = FeatureCache(tmp_path, IDS, {})
    (cache.folder / "features-00001-of-00003.safetensors").unlink()
    assert fill(cache, 4) == [IDS[4:8]]
    assert_right(cache)


def test_an_interruption_leaves_the_whole_shards_and_nothing_else(tmp_path):
    cache = FeatureCache(tmp_path, IDS, {})
    compute = Computed()

    def interrupted(batch):
        if IDS[5] in batch:
            raise KeyboardInterrupt
        return compute(batch)

    with pytest.raises(KeyboardInterrupt):
        cache.fill(interrupted, 2, lambda n: None)
    assert [p.name for p in cache.folder.iterdir()] == ["features-00000-of-00003.safetensors"]
    assert fill(cache, 4) == [IDS[4:8], IDS[8:10]]
    assert_right(cache)


def test_a_write_that_fails_leaves_no_temporary_file(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path, IDS, {})

    def full(tensors, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "save_file", full)
    with pytest.raises(DataError, match=r"cannot write the feature cache .*No space left.*POINTALIGN_CACHE") as error:
        fill(cache)
    assert "\n" not in str(error.value)
    assert list(cache.folder.iterdir()) == []


def test_too_little_room_is_said_before_the_work(tmp_path, monkeypatch):
    """Of 10 objects of 32 bytes, 4 are there; the other 6 need 192 bytes."""
    fill(FeatureCache(tmp_path, IDS, {}))
    cache = FeatureCache(tmp_path, IDS, {})
    for shard in (0, 2):
        (cache.folder / f"features-0000{shard}-of-00003.safetensors").unlink()
    compute = Computed()
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: SimpleNamespace(free=191))
    with pytest.raises(DataError, match=r"of 6 objects needs 0\.0 GiB \(32 bytes each\), but .* free in .*") as error:
        cache.fill(compute, 2, lambda n: None)
    for remedy in ("POINTALIGN_CACHE", "--no-cache-features", "`cache_features: false`"):
        assert remedy in str(error.value)
    assert "\n" not in str(error.value)
    assert compute.batches == [IDS[:2]]
    assert len(list(cache.folder.iterdir())) == 1
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: SimpleNamespace(free=192))
    fill(cache)
    assert_right(cache)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the feature cache"):
        fill(FeatureCache(tmp_path / "file", IDS, {}))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_broken_shard_is_named(tmp_path, share):
    fill(FeatureCache(tmp_path, IDS, {}))
    cache = FeatureCache(tmp_path, IDS, {})
    path = cache.folder / "features-00000-of-00003.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=r"features-00000-of-00003\.safetensors is broken .*; delete it") as error:
        cache[IDS[0]]
    assert "\n" not in str(error.value)
    assert torch.equal(cache[IDS[4]]["point_tokens"], value_of(IDS[4])["point_tokens"])


def test_an_unknown_object(tmp_path):
    cache = FeatureCache(tmp_path, IDS, {})
    assert IDS[3] in cache
    assert "nobody" not in cache
    with pytest.raises(DataError, match="object nobody is not in the feature cache"):
        cache["nobody"]


def test_whatever_changes_the_tensors_changes_the_folder(tmp_path):
    linear, norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
    prints = {weights_fingerprint([linear, norm])}
    assert weights_fingerprint([linear, norm]) in prints
    with torch.no_grad():
        linear.weight[0, 0] += 1e-6
    prints.add(weights_fingerprint([linear, norm]))
    norm.running_mean[1] = 0.5
    prints.add(weights_fingerprint([linear, norm]))
    prints.add(weights_fingerprint([linear.half(), norm]))
    prints.add(weights_fingerprint([linear.bfloat16(), norm]))
    prints.add(weights_fingerprint([norm, linear]))
    assert len(prints) == 6
    folders = {FeatureCache(tmp_path, IDS, {"weights": p}).folder for p in prints}
    folders.add(FeatureCache(tmp_path, IDS[::-1], {"weights": sorted(prints)[0]}).folder)
    folders.add(FeatureCache(tmp_path, IDS[:-1], {"weights": sorted(prints)[0]}).folder)
    folders.add(FeatureCache(tmp_path, IDS, {"weights": sorted(prints)[0], "num_points": 8}).folder)
    assert len(folders) == 9
    assert FeatureCache(tmp_path, IDS, {"a": 1, "b": 2}).folder == FeatureCache(tmp_path, IDS, {"b": 2, "a": 1}).folder


def test_the_models_own_features_come_back_bit_for_bit(tmp_path, model, clouds):
    by_id = dict(zip("abcd", clouds, strict=True))
    cache = FeatureCache(
        tmp_path, list("abcd"), {"weights": weights_fingerprint([model.point_encoder, model.connector])}
    )

    @torch.no_grad()
    def compute(batch):
        points = model.encode_points(torch.stack([by_id[name] for name in batch]))
        return {"qformer_output": points.qformer_output, "point_tokens": points.point_tokens}

    cache.fill(compute, 4, lambda n: None)
    expected = model.encode_points(clouds)
    for row, name in enumerate("abcd"):
        assert torch.equal(cache[name]["qformer_output"], expected.qformer_output[row])
        assert torch.equal(cache[name]["point_tokens"], expected.point_tokens[row])


PROCESS = """
import sys, time
from pathlib import Path
import torch
from pointalign.data import features
features.SHARD_SIZE = 2
ids = [f"object-{i}" for i in range(40)]
cache = features.FeatureCache(Path(sys.argv[1]), ids, {})
Path(sys.argv[2]).touch()
while len(list(Path(sys.argv[2]).parent.glob("ready-*"))) < 2:
    time.sleep(0.01)
computed = []
def compute(batch):
    time.sleep(0.005)
    computed.extend(batch)
    return {"x": torch.tensor([[float(i.rpartition("-")[2])] * 1000 for i in batch])}
cache.fill(compute, 1, lambda n: None)
assert all(cache[i]["x"].eq(float(i.rpartition("-")[2])).all() for i in ids)
Path(sys.argv[2]).write_text(" ".join(computed))
"""


def test_two_processes_share_the_filling_of_a_cache(tmp_path):
    both = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path / "cache"), str(tmp_path / f"ready-{i}")])
        for i in range(2)
    ]
    assert [process.wait(60) for process in both] == [0, 0]
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(list(folder.iterdir())) == 20
    assert all(path.suffix == ".safetensors" for path in folder.iterdir())
    shares = [(tmp_path / f"ready-{i}").read_text().split() for i in range(2)]
    assert all(shares), "both are to work"
    assert sorted(shares[0] + shares[1]) == sorted(f"object-{i}" for i in range(40)), "each object once"


def test_a_killed_process_leaves_whole_shards_and_the_rest_is_filled(tmp_path, monkeypatch):
    (tmp_path / "ready-other").touch()
    process = subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path / "cache"), str(tmp_path / "ready-own")])
    while len(written := list((tmp_path / "cache").glob("*/features-*.safetensors"))) < 3:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert len(written) < 20
    monkeypatch.setattr(features, "SHARD_SIZE", 2)
    ids = [f"object-{i}" for i in range(40)]
    cache, computed = FeatureCache(tmp_path / "cache", ids, {}), []
    number = len(written)
    (cache.folder / f".0123456789ab-features-{number:05d}-of-00020.safetensors").write_bytes(b"half a shard")

    def compute(batch):
        computed.extend(batch)
        return {"x": torch.tensor([[float(i.rpartition("-")[2])] * 1000 for i in batch])}

    cache.fill(compute, 2, lambda n: None)
    assert 0 < len(computed) <= 34
    for number, object_id in enumerate(ids):
        assert cache[object_id]["x"].eq(float(number)).all()
    assert all(path.name.startswith("features-") for path in cache.folder.iterdir()), "nothing half done stays"


def test_a_shard_that_another_process_computes_is_waited_for_at_the_end(tmp_path):
    """It ends without being done, as one that is killed does; then the work is done here."""
    cache = FeatureCache(tmp_path, IDS, {})
    cache.folder.mkdir(parents=True)
    other = FileLock(cache.folder / "features-00000-of-00003.lock")
    other.acquire()
    compute = Computed()

    def computed(batch):
        if IDS[8] in batch:
            other.release()
        return compute(batch)

    cache.fill(computed, 4, lambda n: None)
    assert compute.batches == [IDS[4:8], IDS[8:10], IDS[0:4]]
    assert_right(cache)


def test_a_cache_that_goes_to_another_process_leaves_its_open_files_here(tmp_path):
    cache = FeatureCache(tmp_path, IDS, {})
    fill(cache)
    assert_right(cache)
    taken = pickle.dumps(cache)
    assert len(taken) < 2000
    assert_right(pickle.loads(taken))


def test_rows_are_read_from_the_mapped_file_and_belong_to_the_reader(tmp_path):
    cache = FeatureCache(tmp_path, IDS, {})
    fill(cache)
    row = cache[IDS[1]]["point_tokens"]
    assert row.untyped_storage().nbytes() == row.nbytes
    row.zero_()
    assert_right(cache)
    mapped = Path("/proc/self/maps")
    if mapped.is_file():
        assert "features-00000-of-00003.safetensors" in mapped.read_text()
