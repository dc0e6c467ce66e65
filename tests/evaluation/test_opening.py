"""Benchmarks from the field's files, the bundled objects and a user's own folder; and one line for what is wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pointalign.data.files import PointCloud, load_point_cloud
from pointalign.data.household_split import household_sides
from pointalign.data.modelnet import CLASS_NAMES
from pointalign.errors import ConfigError, DataError
from pointalign.evaluation.opening import BENCHMARKS, Sources, open_benchmark
from pointalign.evaluation.own_data import FolderClouds, read_classes, read_truth
from pointalign.options import Reading

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_household_is_asked_about_the_held_out_objects() -> None:
    classified, captioned = (open_benchmark(f"household-{kind}") for kind in ("classification", "captioning"))
    assert len(classified.items) == len(captioned.items) == 100
    assert len(classified.task.labels) == 30
    item = classified.items[0]
    assert classified.task.labels[item.ground_truth] == item.label_name == "chair"
    assert captioned.items[0].ground_truth.startswith("This is a chair: an armchair.")
    assert classified.points(item.object_id).shape == (2048, 7)
    assert (classified.judge, captioned.judge) == ("likelihood", None)


def test_modelnet40_is_black_and_asked_two_questions(field_data: Path) -> None:
    benchmark = open_benchmark("modelnet40", Sources(field_data))
    assert [question.text for question in benchmark.questions] == ["What is this?", "This is an object of "]
    assert [item.object_id for item in benchmark.items] == ["0", "1", "2", "3", "4"]
    assert [(item.ground_truth, item.label_name) for item in benchmark.items[2:]] == [
        (8, "chair"),
        (39, "xbox"),
        (19, "lamp"),
    ]
    assert benchmark.task.labels == CLASS_NAMES
    assert not benchmark.points("0")[:, 3:].any()
    assert benchmark.max_new_tokens == 100


def test_objaverse_takes_200_or_all_held_out_objects(field_data: Path) -> None:
    some = open_benchmark("objaverse-captioning", Sources(field_data))
    assert [(item.object_id, item.ground_truth) for item in some.items] == [
        ("aa", "The object aa."),
        ("bb", "The object bb."),
    ]
    everything = open_benchmark("objaverse-classification", Sources(field_data, val_objects=3000))
    assert [item.object_id for item in everything.items] == ["aa", "bb", "cc", "dd"]
    assert [question.key for question in everything.questions] == ["I", "C"]
    assert everything.task.kind == "open-vocabulary"
    assert some.max_new_tokens == 150


def test_own_data_from_csv_and_json_are_the_same(own: Path) -> None:
    rows = [
        dict(zip(("object_id", "label", "caption"), (f"o{n}", "lamp", f"Lamp {n}."), strict=True)) for n in range(7)
    ]
    (own / "truth.json").write_text(json.dumps(rows))
    (own / "lamps.csv").write_text(
        "\ufeffobject_id,label,caption,note\r\n" + "".join(f"o{n},lamp,Lamp {n}.,\r\n" for n in range(7)),
        encoding="utf-8",
    )
    assert read_truth(own / "truth.json") == read_truth(own / "lamps.csv")
    for name in ("truth.json", "lamps.csv"):
        sources = Sources(clouds=own / "clouds", truth=own / name, classes=own / "classes.txt")
        benchmark = open_benchmark("own-classification", sources)
        assert benchmark.task.labels == ("chair", "lamp", "table")
        assert {(item.ground_truth, item.label_name) for item in benchmark.items} == {(1, "lamp")}
        assert open_benchmark("own-captioning", sources).items[3].ground_truth == "Lamp 3."
    assert open_benchmark(
        "own-classification", Sources(clouds=own / "clouds", truth=own / "lamps.csv")
    ).task.labels == ("lamp",)


def test_own_clouds_are_found_with_and_without_their_number_of_points(own: Path) -> None:
    np.save(own / "clouds" / "plain.npy", np.zeros((9, 3)))
    np.save(own / "clouds" / "vase_2.npy", np.ones((9, 3)))
    (own / "truth.csv").write_text("object_id,label\nplain,chair\no3,lamp\nvase_2,table\n")
    benchmark = open_benchmark("own-classification", Sources(clouds=own / "clouds", truth=own / "truth.csv"))
    assert benchmark.points("plain").shape == (9, 3)
    assert benchmark.points("o3").shape == (60, 6)
    assert benchmark.points("vase_2").all()


def test_sizes_that_files_tell_are_told(own: Path) -> None:
    shutil.copy(EXAMPLES / "chair.glb", own / "clouds")
    shutil.copy(EXAMPLES / "oak_table.ply", own / "clouds")
    clouds = FolderClouds(own / "clouds")
    chair, told = clouds["chair"], load_point_cloud(EXAMPLES / "chair.glb")
    assert isinstance(chair, PointCloud)
    assert chair.unit == told.unit == 1.0  # glTF is in metres
    np.testing.assert_array_equal(chair.array(), told.array())
    table = clouds["oak_table"]
    assert isinstance(table, PointCloud)
    assert table.unit is None


def test_own_files_are_read_as_they_are_said_to_be(own: Path) -> None:
    """Lying on its back and in millimetres: read standing, and as large as it is, with colours or without."""
    lying = np.random.default_rng(0).random((64, 3)).astype(np.float32) * np.float32([100, 200, 300])
    np.save(own / "clouds" / "lying.npy", lying)
    red = np.concatenate([lying, np.tile(np.float32([1, 0, 0, 0.01]), (64, 1))], axis=1)
    np.save(own / "clouds" / "red.npy", red)
    Path(own / "clouds" / "text.xyz").write_text("\n".join(f"{x} {y} {z}" for x, y, z in lying) + "\n")
    plain, said = (FolderClouds(own / "clouds", how) for how in (Reading(), Reading(up="z", unit=0.001)))
    np.testing.assert_array_equal(plain["lying"], lying)
    assert plain.fingerprint != said.fingerprint
    for name in ("lying", "text"):
        cloud = said[name]
        assert isinstance(cloud, PointCloud)
        assert (cloud.colors, cloud.unit) == (None, 0.001)
        np.testing.assert_allclose(np.ptp(cloud.points, axis=0), np.ptp(lying, axis=0)[[0, 2, 1]], rtol=1e-4)
    standing = np.stack([lying[:, 0], lying[:, 2], -lying[:, 1]], axis=1)
    turned = FolderClouds(own / "clouds", Reading(up="z"))
    np.testing.assert_array_equal(turned["red"], np.concatenate([standing, red[:, 3:]], axis=1))
    np.testing.assert_array_equal(turned["lying"], standing)
    np.testing.assert_array_equal(said["red"], np.concatenate([standing, red[:, 3:6], 0 * red[:, 6:] + 0.001], axis=1))
    given = Sources(clouds=own / "clouds", truth=own / "truth.csv", reading=Reading(up="z"))
    benchmark = open_benchmark("own-captioning", given)
    assert isinstance(benchmark.clouds, FolderClouds)
    assert benchmark.clouds.reading.up == "z"


def test_numbered_objects_are_not_one_object_of_a_shorter_name(own: Path) -> None:
    for number in (1, 2):
        np.save(own / "clouds" / f"stool_{number}.npy", np.full((9, 3), number))
    clouds = FolderClouds(own / "clouds")
    assert "stool" not in clouds
    assert [clouds[f"stool_{number}"][0, 0] for number in (1, 2)] == [1, 2]
    assert "o3" in clouds


def test_own_clouds_may_be_any_3d_files(own: Path) -> None:
    corners = "\n".join(f"{x} {y} {z} {255 * x} 0 0" for x in (0, 1) for y in (0, 1) for z in (0, 1))
    names = ("x", "y", "z", "red", "green", "blue")
    header = ["ply", "format ascii 1.0", "element vertex 8", *(f"property float {name}" for name in names[:3])]
    header += [*(f"property uchar {name}" for name in names[3:]), "end_header"]
    (own / "clouds" / "cube.ply").write_text("\n".join(header) + "\n" + corners + "\n")
    (own / "truth.csv").write_text("object_id,label\ncube,chair\no3,lamp\n")
    sources = Sources(clouds=own / "clouds", truth=own / "truth.csv")
    cube = open_benchmark("own-classification", sources).points("cube")
    assert sorted(map(tuple, cube.tolist())) == sorted(
        (float(x), float(y), float(z), float(x), 0.0, 0.0) for x in (0, 1) for y in (0, 1) for z in (0, 1)
    )
    np.save(own / "clouds" / "cube.npy", np.zeros((9, 3)))
    with pytest.raises(DataError, match=r"cube\.npy and cube\.ply are about one object; keep one"):
        open_benchmark("own-classification", sources)


def test_a_limit_takes_the_first_and_leaves_the_fingerprint(own: Path) -> None:
    sources = Sources(clouds=own / "clouds", truth=own / "truth.csv")
    some, everything = open_benchmark("own-captioning", sources, 2), open_benchmark("own-captioning", sources)
    assert some.items == everything.items[:2]
    assert some.fingerprint == everything.fingerprint
    np.save(own / "clouds" / "o5_8192.npy", np.zeros((8, 6)))
    assert open_benchmark("own-captioning", sources, 2).fingerprint != everything.fingerprint


def test_the_fingerprint_of_a_large_folder_is_that_of_the_objects_in_it(field_data: Path) -> None:
    before = open_benchmark("objaverse-captioning", Sources(field_data)).fingerprint
    np.save(field_data / "objaverse_data" / "ee_8192.npy", np.zeros((8, 6)))
    assert open_benchmark("objaverse-captioning", Sources(field_data), 1).fingerprint == before
    np.save(field_data / "objaverse_data" / "bb_8192.npy", np.zeros((8, 6)))
    assert open_benchmark("objaverse-captioning", Sources(field_data), 1).fingerprint != before


BAD_FIELD_DATA: dict[str, tuple[str, Any, str]] = {
    "no folder": ("objaverse-captioning", lambda d: d.rename(d.with_name("gone")), "give an instruction file"),
    "no clouds": (
        "objaverse-captioning",
        lambda d: (d / "objaverse_data").rename(d / "elsewhere"),
        "no folder .*objaverse_data",
    ),
    "a cloud is missing": (
        "objaverse-classification",
        lambda d: (d / "objaverse_data" / "bb_8192.npy").unlink(),
        r"1 of 2 objects of .*val_200_GT.json have no cloud \(first: bb\); complete",
    ),
    "no list of 3000": (
        "objaverse-captioning",
        lambda d: (d / "anno_data" / "val_object_ids_3000.txt").unlink(),
        "give PointLLM's list of held-out objects",
    ),
    "captions are missing": (
        "objaverse-captioning",
        lambda d: (d / "anno_data" / "PointLLM_brief_description_660K.json").write_text(
            json.dumps([{"object_id": "aa", "conversations": [{"from": "gpt", "value": "A."}]}])
        ),
        r"no caption for 3 of 4 objects of .* \(first: bb\); give PointLLM's unfiltered file",
    ),
    "cut short": (
        "objaverse-captioning",
        lambda d: (d / "anno_data" / "PointLLM_brief_description_660K.json").write_text('[{"object_id": "aa"'),
        "is not JSON",
    ),
    "no ModelNet40": (
        "modelnet40",
        lambda d: (d / "modelnet40_data" / "modelnet40_test_8192pts_fps.dat").unlink(),
        "give modelnet40_test_8192pts_fps.dat",
    ),
    "malicious ModelNet40": (
        "modelnet40",
        lambda d: (d / "modelnet40_data" / "modelnet40_test_8192pts_fps.dat").write_bytes(
            b"cos\nsystem\n(S'true'\ntR."
        ),
        "may be malicious",
    ),
}


@pytest.mark.parametrize("case", BAD_FIELD_DATA)
def test_what_is_wrong_with_the_fields_files_is_said_in_one_line(case: str, field_data: Path) -> None:
    name, break_it, message = BAD_FIELD_DATA[case]
    break_it(field_data)
    objects = 200 if case == "a cloud is missing" else 3000
    with pytest.raises(DataError, match=message) as caught:
        open_benchmark(name, Sources(field_data, val_objects=objects))
    assert "\n" not in str(caught.value)


BAD_OWN_DATA: dict[str, tuple[Any, str]] = {
    "missing": (
        lambda o: (o / "truth.csv").unlink(),
        "give a CSV or JSON file of object_id and label, caption or both",
    ),
    "wrong columns": (
        lambda o: (o / "truth.csv").write_text("id;label\no1;chair\n"),
        "has the columns id;label; it needs object_id and label, caption or both, separated by commas",
    ),
    "empty": (lambda o: (o / "truth.csv").write_text(""), r"has the columns \(none\)"),
    "no rows": (lambda o: (o / "truth.csv").write_text("object_id,label\n"), "lists no object"),
    "twice": (lambda o: (o / "truth.csv").write_text("object_id,label\no1,lamp\no1,lamp\n"), "lists o1 twice"),
    "blank label": (
        lambda o: (o / "truth.csv").write_text("object_id,label\no1,lamp\no2,\n"),
        r"gives no label for 1 of 2 objects \(first: o2\)",
    ),
    "blank id": (lambda o: (o / "truth.csv").write_text("object_id,label\n ,lamp\n"), "1 rows without an object_id"),
    "no labels": (
        lambda o: (o / "truth.csv").write_text("object_id,caption\no1,A lamp.\n"),
        "has no labels; add a column",
    ),
    "not UTF-8": (
        lambda o: (o / "truth.csv").write_bytes("object_id,label\no1,Sofa für zwei".encode("latin-1")),
        "UTF-8",
    ),
    "unknown label": (
        lambda o: (o / "truth.csv").write_text("object_id,label\no1,sofa\n"),
        "the label 'sofa' of o1 is not one of the 3 classes",
    ),
    "classes alike": (
        lambda o: (o / "classes.txt").write_text("lamp\nLamp\n"),
        "the classes 'lamp' and 'Lamp' read alike; write them in one way",
    ),
    "no cloud": (
        lambda o: (o / "truth.csv").write_text("object_id,label\no1,lamp\no99,lamp\n"),
        r"1 of 2 objects of .*truth.csv have no cloud \(first: o99\); complete the folder of clouds",
    ),
    "no folder": (lambda o: (o / "clouds").rename(o / "elsewhere"), "no folder .*clouds; give one that holds"),
    "empty folder": (
        lambda o: [path.unlink() for path in (o / "clouds").iterdir()],
        "holds no {object_id}.npy and no other 3D file; check the path",
    ),
    "empty classes": (lambda o: (o / "classes.txt").write_text("\n"), "is empty; give one class per line"),
    "class twice": (lambda o: (o / "classes.txt").write_text("lamp\nlamp\n"), "names lamp twice"),
    "quote left open": (
        lambda o: (o / "truth.csv").write_text('object_id,label\no1,"lamp\no2,' + "lamp " * 30_000),
        r"line \d+: field larger than .*; look for a quote that is not closed",
    ),
    "classes not UTF-8": (lambda o: (o / "classes.txt").write_bytes("Stühle".encode("latin-1")), "save it as UTF-8"),
    "no classes": (lambda o: (o / "classes.txt").unlink(), "give a text file with one class per line"),
}


@pytest.mark.parametrize("case", BAD_OWN_DATA)
def test_what_is_wrong_with_own_data_is_said_in_one_line(case: str, own: Path) -> None:
    break_it, message = BAD_OWN_DATA[case]
    break_it(own)
    sources = Sources(clouds=own / "clouds", truth=own / "truth.csv", classes=own / "classes.txt")
    with pytest.raises(DataError, match=message) as caught:
        open_benchmark("own-classification", sources)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("nothing", ["null", "NaN", '""'])
def test_no_label_in_json_is_none(nothing: str, own: Path) -> None:
    rows = f'[{{"object_id": "o1", "label": "lamp"}}, {{"object_id": "o2", "label": {nothing}}}]'
    (own / "truth.json").write_text(rows)
    with pytest.raises(DataError, match=r"gives no label for 1 of 2 objects \(first: o2\)"):
        open_benchmark("own-classification", Sources(clouds=own / "clouds", truth=own / "truth.json"))


@pytest.mark.parametrize("text", ["{", '{"o1": "lamp"}', '[{"label": "lamp"}]', '[{"object_id": 1}]', "[1]"])
def test_json_of_another_layout_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "truth.json").write_text(text)
    with pytest.raises(DataError, match=r"is not (JSON|a JSON list of objects)"):
        read_truth(tmp_path / "truth.json")


def test_json_labels_may_be_numbers(tmp_path: Path) -> None:
    (tmp_path / "truth.json").write_text('[{"object_id": 1, "label": 0}, {"object_id": 2, "label": 1}]')
    assert read_truth(tmp_path / "truth.json").labels == {"1": "0", "2": "1"}


def test_a_broken_own_cloud_is_named(own: Path) -> None:
    (own / "clouds" / "o2_8192.npy").write_bytes(b"\x93NUMPY")
    benchmark = open_benchmark("own-captioning", Sources(clouds=own / "clouds", truth=own / "truth.csv"))
    with pytest.raises(DataError, match=r"o2_8192\.npy is broken .*; copy it again"):
        benchmark.points("o2")


def test_other_mistakes(own: Path) -> None:
    with pytest.raises(ConfigError, match="no benchmark 'modelnet'; known are household-classification"):
        open_benchmark("modelnet")
    with pytest.raises(ConfigError, match="--clouds FOLDER and --truth FILE"):
        open_benchmark("own-captioning", Sources(clouds=own))
    assert read_classes(own / "classes.txt") == ["chair", "lamp", "table"]
    assert len(BENCHMARKS) == 7


def test_a_fold_of_household_is_a_benchmark_of_its_own() -> None:
    fold = open_benchmark("household-classification", Sources(held_out="fold-3"))
    assert fold.name == "household-classification-fold-3"
    assert [item.object_id for item in fold.items] == [thing.id for thing in household_sides("fold-3")[1]]
    assert open_benchmark("household-captioning", Sources(held_out="validation-0")).name.endswith("-validation-0")
    with pytest.raises(ConfigError, match="no part 'fold-9'"):
        open_benchmark("household-classification", Sources(held_out="fold-9"))
