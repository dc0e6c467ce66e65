"""The bundled household objects: what the file holds, how it is split, and that a build is repeatable."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pointalign.data.household import (
    HOUSEHOLD_FILE,
    HouseholdObject,
    LabelRow,
    class_sizes,
    household_classes,
    load_household,
    majority_rate,
    read_labels,
)
from pointalign.data.household_build import build_household, thin_clouds
from pointalign.data.household_catalog import COLLECTIONS, NOTICE_MARK, parse_properties
from pointalign.data.household_split import assign_splits, family_folds, household_sides, near_duplicates
from pointalign.errors import ConfigError, DataError
from pointalign.geometry import farthest_point_sample, normalize_point_cloud

REAL_SOURCE = Path("/usr/share/sweethome3d/furniture")
NOTICE = Path(__file__).parents[2] / "NOTICE"
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def objects() -> list[HouseholdObject]:
    return load_household()


def test_what_the_file_holds(objects: list[HouseholdObject]) -> None:
    assert len(objects) == 820
    assert [thing.id for thing in objects] == sorted({thing.id for thing in objects})
    assert HOUSEHOLD_FILE.stat().st_size <= 14 * MEBIBYTE
    assert {thing.licence for thing in objects} == {"CC0-1.0", "CC-BY-3.0", "CC-BY-3.0-US"}
    points = np.stack([thing.points for thing in objects])
    assert points.shape == (820, 2048, 6)
    assert points.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(points[..., :3], axis=-1).max(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(points[..., :3].mean(axis=1), 0, atol=1e-5)
    assert points[..., 3:].min() >= 0
    assert points[..., 3:].max() <= 1
    for thing in objects:
        assert thing.name
        assert thing.creator
        assert thing.source
        assert min(thing.size_cm) > 0


def test_pandas_opens_it_as_it_is() -> None:
    frame = pytest.importorskip("pandas").read_parquet(HOUSEHOLD_FILE)
    assert len(frame) == 820
    assert frame["xyz"].iloc[0].dtype == np.int16
    assert frame["rgb"].iloc[0].dtype == np.uint8
    assert len(frame["xyz"].iloc[0]) == 3 * 2048


def test_box_has_the_catalogue_proportions(objects: list[HouseholdObject]) -> None:
    for thing in objects:
        extent, size = np.ptp(thing.points[:, :3], axis=0), np.array(thing.size_cm)
        longest = size.argmax()
        np.testing.assert_allclose(extent / extent[longest], size / size[longest], atol=0.15, err_msg=thing.id)


def test_stored_order_is_farthest_point_order() -> None:
    column = pq.ParquetFile(HOUSEHOLD_FILE).read(["xyz"])["xyz"].combine_chunks().flatten().to_numpy()
    xyz = torch.from_numpy(column.reshape(-1, 2048, 3)[::100].astype(np.float64))
    order = farthest_point_sample(xyz, 2048)
    assert (order == torch.arange(2048)).all(), "each prefix is what sampling the cloud gives"


def test_quantisation_error_is_half_a_step() -> None:
    dense = np.random.default_rng(0).random((2, 8192, 6), dtype=np.float32)
    thin = thin_clouds(dense).astype(np.float64)
    exact = normalize_point_cloud(torch.from_numpy(dense).double()).numpy()
    for stored, cloud in zip(thin, exact, strict=True):
        distance = np.abs(stored[:64, None, :3] / 32767 - cloud[None, :, :3]).max(axis=-1)
        nearest = distance.argmin(axis=1)
        assert distance.min(axis=1).max() <= 0.5 / 32767 + 1e-12
        assert np.abs(stored[:64, 3:] / 255 - cloud[nearest, 3:]).max() <= 0.5 / 255 + 1e-6
    assert np.abs(thin[..., :3]).max() <= 32767


def test_split_is_720_and_100_and_stratified(objects: list[HouseholdObject]) -> None:
    assert len(load_household("train")) == 720
    assert len(load_household("test")) == 100
    assert Counter(thing.split for thing in objects) == {"train": 720, "test": 100}
    whole, held = class_sizes(), class_sizes("test")
    assert sum(held.values()) == 100
    exceptions = {label for label in whole if abs(held[label] - whole[label] * 100 / 820) >= 1}
    assert exceptions <= {"wall plate"}, "31 of its 32 objects are one family"
    assert all(held.values())


def test_split_column_is_what_the_table_gives(objects: list[HouseholdObject]) -> None:
    table = read_labels()
    assert {thing.id: (thing.label, thing.family, thing.noun) for thing in objects} == {
        row.id: (row.label, row.family, row.noun) for row in table.values()
    }
    assert {thing.id: thing.split for thing in objects} == assign_splits(table.values())


def test_no_family_straddles(objects: list[HouseholdObject]) -> None:
    splits = defaultdict(set)
    for thing in objects:
        splits[thing.family].add(thing.split)
    assert all(len(found) == 1 for found in splits.values())


def test_no_near_duplicate_straddles(objects: list[HouseholdObject]) -> None:
    pairs = []
    for label in household_classes():
        members = [thing for thing in objects if thing.label == label]
        clouds = np.stack([thing.points for thing in members])
        pairs += [(members[i], members[j]) for i, j, _ in near_duplicates(clouds)]
    assert len(pairs) > 50
    assert [(a.id, b.id) for a, b in pairs if a.split != b.split] == []
    assert [(a.id, b.id) for a, b in pairs if a.family != b.family] == []


def test_near_duplicates_sees_turns_mirrors_and_colors() -> None:
    rng = np.random.default_rng(0)
    cloud = np.concatenate(
        [rng.random((1024, 6)) * [1, 1, 0.2, 1, 1, 1], rng.random((1024, 6)) * [0.3, 0.2, 0.9, 1, 1, 1]]
    )
    turned = cloud.copy()
    turned[:, [0, 2]] = cloud[:, [2, 0]]
    turned[:, 3:] = 0
    other = rng.random((2048, 6))
    assert [(i, j) for i, j, _ in near_duplicates(np.stack([cloud, turned, other]))] == [(0, 1)]


def test_classes() -> None:
    assert 20 <= len(household_classes()) <= 30
    assert min(class_sizes().values()) >= 8
    assert sum(class_sizes().values()) == 820
    assert next(iter(class_sizes())) == "chair"
    assert majority_rate("test") == class_sizes("test")["chair"] / 100


def test_assign_splits_keeps_families_whole() -> None:
    rows = [LabelRow(f"a{k}", "a", "big" if k < 10 else f"a{k}", "") for k in range(20)]
    rows += [LabelRow(f"b{k}", "b", f"b{k}", "") for k in range(20)]
    splits = assign_splits(rows, share=0.2)
    held = [row for row in rows if splits[row.id] == "test"]
    assert Counter(row.label for row in held) == {"a": 4, "b": 4}
    assert "big" not in {row.family for row in held}


def test_notice_lists_every_object(objects: list[HouseholdObject]) -> None:
    text = " ".join(NOTICE.read_text(encoding="utf-8").split())
    assert text.startswith("PointAlign Copyright 2026 The PointAlign authors")
    for thing in objects:
        assert f"{' '.join(thing.name.split())} [{thing.id}]" in text
        assert f"by {' '.join(thing.creator.split())}: " in text


def test_loader_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split 'val'; use one of train, test"):
        load_household("val")
    with pytest.raises(DataError, match="pointalign data household --source DIR --out FILE"):
        load_household(path=tmp_path / "none.parquet")
    (tmp_path / "cut.parquet").write_bytes(HOUSEHOLD_FILE.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"cut\.parquet.*build it again") as caught:
        load_household(path=tmp_path / "cut.parquet")
    assert "\n" not in str(caught.value)


def test_labels_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no table of labels"):
        read_labels(tmp_path / "none.csv")
    (tmp_path / "short.csv").write_text("id,label\n")
    with pytest.raises(DataError, match="lacks the columns family, noun"):
        read_labels(tmp_path / "short.csv")
    (tmp_path / "twice.csv").write_text("id,label,family,noun\nx,chair,x,a chair\nx,chair,x,a chair\n")
    with pytest.raises(DataError, match="lists x twice"):
        read_labels(tmp_path / "twice.csv")


def test_properties_follow_java() -> None:
    text = "# note\nname#1=Caf\\u00e9 table\nmodel\\#2 : C\\:/x\nlong = one \\\n   two\n! note\nempty#3=\n"
    assert parse_properties(text) == {"name#1": "Café table", "model#2": "C:/x", "long": "one two", "empty#3": ""}


def write_source(folder: Path) -> Path:
    """Five tiny .sh3f files of one box each, the first with a turned model and the last with a texture-less material."""
    for k, collection in enumerate(COLLECTIONS):
        with zipfile.ZipFile(folder / collection.file, "w") as archive:
            rotation = "modelRotation#1=1 0 0 0 0 1 0 -1 0\n" if k == 0 else ""
            archive.writestr(
                "PluginFurnitureCatalog.properties",
                f"id#1={collection.name}#box{k}\nname#1=Box {k}\ntags#1=Storage, Wood\ncategory#1=Misc\n"
                f"model#1=/m/box/box.obj\nwidth#1=10\ndepth#1=20\nheight#1={10 + k}\ncreator#1=Someone\n{rotation}",
            )
            archive.writestr("m/box/box.mtl", "newmtl wood\nKd 0.6 0.4 0.2\n")
            corners = [f"v {x} {y} {z}" for x in (0, 1) for y in (0, 1) for z in (0, 1)]
            faces = ["1 2 4 3", "5 7 8 6", "1 5 6 2", "3 4 8 7", "1 3 7 5", "2 6 8 4"]
            lines = ["mtllib box.mtl", *corners, "usemtl wood", *(f"f {face}" for face in faces)]
            archive.writestr("m/box/box.obj", "\n".join(lines) + "\n")
    table = folder / "labels.csv"
    ids = [f"{c.name}-box{k}".lower() for k, c in enumerate(COLLECTIONS)]
    table.write_text("id,label,family,noun\n" + "".join(f"{i},container,{i},a box\n" for i in ids))
    return table


def test_rebuild_gives_the_same_bytes(tmp_path: Path) -> None:
    table = write_source(tmp_path)
    (tmp_path / "NOTICE").write_text("Above.\n\n")
    counts = build_household(tmp_path, tmp_path / "a.parquet", notice=tmp_path / "NOTICE", labels=table)
    build_household(tmp_path, tmp_path / "b.parquet", labels=table)
    assert counts == {"objects": 5, "train": 4, "test": 1}
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert not list(tmp_path.glob(".*.tmp"))
    objects = load_household(path=tmp_path / "a.parquet")
    assert objects[0].tags == ("Storage", "Wood")
    for thing in objects:
        extent = np.ptp(thing.points[:, :3], axis=0)
        np.testing.assert_allclose(extent / extent[2], np.array(thing.size_cm) / thing.size_cm[2], atol=0.02)
        np.testing.assert_allclose(thing.points[:, 3:], np.tile([0.6, 0.4, 0.2], (2048, 1)), atol=1 / 255)
    notice = (tmp_path / "NOTICE").read_text()
    assert notice.startswith(f"Above.\n\n{NOTICE_MARK}\n")
    assert all(f"Box {k} [" in notice for k in range(5))


def test_source_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="apt-get download sweethome3d-furniture && dpkg -x"):
        build_household(tmp_path / "none", tmp_path / "a.parquet")
    table = write_source(tmp_path)
    (tmp_path / "Scopia.sh3f").rename(tmp_path / "away")
    with pytest.raises(DataError, match=r"lacks Scopia\.sh3f; install the Debian package sweethome3d-furniture"):
        build_household(tmp_path, tmp_path / "a.parquet")
    (tmp_path / "Scopia.sh3f").write_bytes(b"not a zip")
    with pytest.raises(DataError, match=r"cannot open .*Scopia\.sh3f"):
        build_household(tmp_path, tmp_path / "a.parquet")
    (tmp_path / "away").replace(tmp_path / "Scopia.sh3f")
    table.write_text("id,label,family,noun\n")
    with pytest.raises(DataError, match="source and labels disagree on 5 objects"):
        build_household(tmp_path, tmp_path / "a.parquet", labels=table)
    assert not (tmp_path / "a.parquet").exists()


def test_loading_imports_no_mesh_library() -> None:
    code = "import sys, pointalign.data.household as h; h.load_household('test'); print('trimesh' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(
    not REAL_SOURCE.is_dir(),
    reason="the Debian package sweethome3d-furniture is not installed: nothing to rebuild from",
)
def test_rebuild_from_the_real_source(tmp_path: Path) -> None:
    build_household(REAL_SOURCE, tmp_path / "again.parquet")
    digests = {hashlib.sha256(p.read_bytes()).hexdigest() for p in (HOUSEHOLD_FILE, tmp_path / "again.parquet")}
    assert len(digests) == 1, "other bytes; pyarrow's version is part of them"


def test_folds_never_part_a_family_and_hold_every_label_evenly(objects: list[HouseholdObject]) -> None:
    folds = family_folds(objects)
    assert folds.keys() == {thing.id for thing in objects}
    families, chairs = defaultdict(set), Counter()
    for thing in objects:
        families[thing.family].add(folds[thing.id])
        chairs[folds[thing.id]] += thing.label == "chair"
    assert max(map(len, families.values())) == 1
    sizes = Counter(folds.values())
    assert (set(sizes), min(sizes.values()) >= 150, max(sizes.values()) <= 175) == ({0, 1, 2, 3, 4}, True, True)
    assert max(chairs.values()) - min(chairs.values()) <= 2
    assert family_folds(objects) == folds
    assert family_folds(objects, seed=1) != folds


def test_folds_are_the_same_everywhere() -> None:
    """Numbers of a cross-validation compare only over the same folds, whatever the version of scikit-learn."""
    folds = family_folds(list(read_labels().values()))
    listed = " ".join(f"{name} {folds[name]}" for name in sorted(folds))
    assert hashlib.sha256(listed.encode()).hexdigest()[:16] == "121ad7a282002b86"


def test_impossible_folds_are_refused() -> None:
    rows = [LabelRow(f"o{number}", "chair", "one family", "a chair") for number in range(4)]
    with pytest.raises(DataError, match="cannot part 1 families into 2 folds"):
        family_folds(rows, folds=2)


def test_points_with_their_unit_have_the_objects_size():
    for thing in load_household("test")[:20]:
        sized = thing.sized_points
        assert np.array_equal(sized[:, :6], thing.points)
        extents = np.ptp(sized[:, :3], axis=0) * sized[0, 6] * 100
        np.testing.assert_allclose(extents.max(), max(thing.size_cm), rtol=1e-5)
        np.testing.assert_allclose(extents, thing.size_cm, rtol=0.12, atol=2)


def test_what_is_held_out_shares_no_family_with_what_is_trained_on():
    everything = {thing.id for thing in load_household()}
    test = {thing.id for thing in load_household("test")}
    for kind, whole in (("fold", everything), ("validation", everything - test)):
        parts = [household_sides(f"{kind}-{number}") for number in range(5)]
        for train, held in parts:
            assert {thing.id for thing in train}.isdisjoint(thing.id for thing in held)
            assert {thing.id for thing in [*train, *held]} == whole
            assert {thing.family for thing in train}.isdisjoint(thing.family for thing in held)
            assert abs(len(held) - len(whole) / 5) < 20
        assert sorted(thing.id for _, held in parts for thing in held) == sorted(whole)
    train, held = household_sides()
    assert (len(train), {thing.id for thing in held}) == (720, test)


@pytest.mark.parametrize("part", ["train", "fold-5", "fold", "validation-x", ""])
def test_unknown_parts_are_refused(part):
    with pytest.raises(
        ConfigError, match=f"no part '{part}' of household to hold out; known are test, fold-0 to fold-4"
    ):
        household_sides(part)
