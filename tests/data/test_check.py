"""What is missing from the field's layout, file by file."""

import json
import pickle

import numpy as np
import pytest

from pointalign.cli import main
from pointalign.data import check
from pointalign.data.check import CLOUDS, HELD_OUT, INSTRUCTIONS, MODELNET, check_data
from pointalign.data.modelnet import MODELNET_FILE
from pointalign.data.objaverse import BROKEN_OBJECTS
from pointalign.data.pack import pack_clouds
from pointalign.errors import DataError

FILTERED, WHOLE, COMPLEX, ANSWERS = (
    f"anno_data/{name}"
    for name in (
        "PointLLM_brief_description_660K_filtered.json",
        "PointLLM_brief_description_660K.json",
        "PointLLM_complex_instruction_70K.json",
        "PointLLM_brief_description_val_200_GT.json",
    )
)
IDS = "anno_data/val_object_ids_3000.txt"
DAT = f"modelnet40_data/{MODELNET_FILE}"


def write_instructions(path, object_ids):
    turns = [{"from": "human", "value": "<point>\nWhat?"}, {"from": "gpt", "value": "A mug."}]
    path.write_text(json.dumps([{"object_id": object_id, "conversations": turns} for object_id in object_ids]))


def cloud(seed, count=check.NUM_POINTS):
    return np.random.default_rng(seed).random((count, 6), dtype=np.float32)


@pytest.fixture
def layout(tmp_path, monkeypatch):
    """A complete folder: 200 clouds of 64 points, and 4 of ModelNet's instead of 2,468."""
    monkeypatch.setattr(check, "NUM_POINTS", 64)
    monkeypatch.setattr(check, "MODELNET", check.Expected(MODELNET.name, MODELNET.purpose, count=4))
    root = tmp_path / "data"
    for name in ("objaverse_data", "anno_data", "modelnet40_data"):
        (root / name).mkdir(parents=True)
    names = [f"{index:03d}" for index in range(200)]
    for index, name in enumerate(names):
        np.save(root / "objaverse_data" / f"{name}_8192.npy", cloud(index, 64))
    write_instructions(root / FILTERED, [*names[:150], *BROKEN_OBJECTS])
    write_instructions(root / COMPLEX, names[:50])
    write_instructions(root / ANSWERS, names)
    (root / IDS).write_text("\n".join(f"held-out-{index}" for index in range(3000)) + "\n")
    (root / DAT).write_bytes(pickle.dumps(([cloud(index, 64) for index in range(4)], [0, 1, 2, 39])))
    return root


def states(report):
    return {entry["file"].rpartition("/data/")[2]: entry["state"] for entry in report["files"]}


def detail(report, name):
    (found,) = [entry for entry in report["files"] if entry["file"].endswith(name)]
    assert "\n" not in found["detail"]
    return found["detail"]


def test_the_layout_is_the_published_one():
    assert [expected.name for expected in (CLOUDS, *INSTRUCTIONS, HELD_OUT, MODELNET)] == [
        "objaverse_data/",
        FILTERED,
        WHOLE,
        COMPLEX,
        ANSWERS,
        IDS,
        DAT,
    ]
    assert [expected.name for expected in INSTRUCTIONS if not expected.needed] == [WHOLE]
    assert (HELD_OUT.count, MODELNET.count, check.NUM_POINTS) == (3000, 2468, 8192)


def test_a_complete_folder(layout, capsys):
    report = check_data(layout)
    assert report["complete"]
    assert states(report) == {
        name: "missing" if name == WHOLE else "present"
        for name in ("objaverse_data", FILTERED, WHOLE, COMPLEX, ANSWERS, IDS, DAT)
    }
    assert (report["missing_clouds"], report["first_missing"], report["list"]) == (0, [], None)
    sizes = {entry["file"].rpartition("/data/")[2]: entry["bytes"] for entry in report["files"]}
    assert sizes[COMPLEX] == (layout / COMPLEX).stat().st_size
    assert sizes["objaverse_data"] == sum(path.stat().st_size for path in (layout / "objaverse_data").iterdir())
    assert detail(report, COMPLEX) == "50 conversations about 50 objects"
    assert detail(report, DAT) == "4 clouds of 4 classes"
    assert detail(report, "objaverse_data") == "200 clouds, 20 of them read"
    shown = capsys.readouterr().err
    assert shown.count("present") == 6
    assert shown.count("optional") == 1


def test_an_empty_folder_says_where_everything_is(tmp_path, capsys):
    report = check_data(tmp_path)
    assert not report["complete"]
    assert {entry["state"] for entry in report["files"]} == {"missing"}
    assert len(report["files"]) == 7
    for entry in report["files"]:
        assert "Hugging Face dataset RunsenXu/PointLLM" in entry["detail"]
        assert entry["purpose"]
    assert "Objaverse_660K_8192_npy_split_a*" in detail(report, "objaverse_data")
    shown = "".join(capsys.readouterr().err.split())
    for expected in (*INSTRUCTIONS, HELD_OUT, MODELNET):
        assert expected.name in shown


def test_objects_without_cloud_are_counted_and_listed(layout, tmp_path):
    for name in ("002", "149", "007"):
        (layout / "objaverse_data" / f"{name}_8192.npy").unlink()
    report = check_data(layout, listed=tmp_path / "missing.txt")
    assert not report["complete"]
    assert report["missing_clouds"] == 3
    assert report["first_missing"] == ["002", "007", "149"]
    assert (tmp_path / "missing.txt").read_text() == "002\n007\n149\n"
    assert detail(report, "objaverse_data") == (
        "197 clouds, 20 of them read; 3 of 200 objects that the instruction files name have none (first: 002, 007, 149)"
    )


def test_clouds_that_lie_elsewhere_or_are_packed(layout, tmp_path):
    pack_clouds(layout / "objaverse_data", tmp_path / "packed")
    (layout / "objaverse_data").rename(layout / "8192_npy")
    assert check_data(layout)["complete"]
    (layout / "8192_npy").rename(tmp_path / "elsewhere")
    report = check_data(layout)
    assert (states(report)["objaverse_data"], report["missing_clouds"]) == ("missing", 200)
    assert check_data(layout, str(tmp_path / "elsewhere"))["complete"]
    assert check_data(layout, str(tmp_path / "packed"))["complete"]
    assert check_data(layout, (tmp_path / "packed").as_uri())["complete"]
    report = check_data(layout, "memory://nowhere")
    assert not report["complete"]
    assert "holds no _clouds.index" in report["files"][0]["detail"]


def write_cloud(layout, points):
    np.save(layout / "objaverse_data" / "000_8192.npy", points)


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


WRONG = {
    "too few points": (lambda root: write_cloud(root, cloud(0, 63)), "objaverse_data", "shape (63, 6), not (64, 6)"),
    "no colour": (lambda root: write_cloud(root, cloud(0, 64)[:, :3]), "objaverse_data", "shape (64, 3), not (64, 6)"),
    "NaN": (lambda root: write_cloud(root, cloud(0, 64) * np.nan), "objaverse_data", "NaN or infinite"),
    "bright": (lambda root: write_cloud(root, cloud(0, 64) * 255), "objaverse_data", "colours outside [0, 1]"),
    "cut cloud": (lambda root: cut(root / "objaverse_data" / "000_8192.npy"), "objaverse_data", "is broken ("),
    "no cloud": (
        lambda root: [path.unlink() for path in (root / "objaverse_data").iterdir()],
        "objaverse_data",
        "holds no {object_id}_8192.npy file",
    ),
    "cut instructions": (lambda root: cut(root / FILTERED), FILTERED, "is not JSON ("),
    "other instructions": (
        lambda root: (root / COMPLEX).write_text('[{"a": 1}]'),
        COMPLEX,
        "entry 0 is not in PointLLM's format",
    ),
    "optional but broken": (lambda root: (root / WHOLE).write_text("{}"), WHOLE, "holds a dict, not a list"),
    "too few answers": (
        lambda root: write_instructions(root / ANSWERS, ["000"]),
        ANSWERS,
        "is about 1 objects, not 200",
    ),
    "too few held out": (lambda root: (root / IDS).write_text("a\nb\na\n"), IDS, "names 2 objects, not 3000"),
    "no text": (lambda root: (root / IDS).write_bytes(b"\xff"), IDS, "is broken ("),
    "cut pickle": (lambda root: cut(root / DAT), DAT, "is not ModelNet40's test set (a broken pickle"),
    "few clouds": (
        lambda root: (root / DAT).write_bytes(pickle.dumps(([cloud(0, 5)], [3]))),
        DAT,
        "holds 1 clouds of 5 points, not 4 of 64",
    ),
    "malicious": (
        lambda root: (root / DAT).write_bytes(b"cos\nsystem\n(S'false'\ntR."),
        DAT,
        "asks for 'os.system'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_and_the_rest_is_checked(layout, case):
    break_it, name, message = WRONG[case]
    break_it(layout)
    report = check_data(layout)
    assert not report["complete"]
    assert message in detail(report, name)
    wrong = [file for file, state in states(report).items() if state == "wrong"]
    assert wrong == [name]


def test_the_verb_ends_with_1_when_something_is_missing(layout, tmp_path, capsys):
    for damage, status in ((lambda: None, 0), (lambda: (layout / COMPLEX).unlink(), 1)):
        damage()
        with pytest.raises(SystemExit) as ended:
            main(["data", "check", str(layout), "--list", str(tmp_path / "list.txt")])
        assert ended.value.code == status
        out = capsys.readouterr().out
        assert json.loads(out)["complete"] is (status == 0)
        assert out.count("\n") == 1
    with pytest.raises(DataError, match=r"no folder .*nowhere; make it, and run the same again"):
        check_data(tmp_path / "nowhere")


def test_the_verb_that_packs(layout, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["data", "pack", str(layout / "objaverse_data"), "--out", str(tmp_path / "packed"), "--readers", "2"])
    assert ended.value.code == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["clouds"] == 200
    assert "packing clouds: 200/200" in captured.err
