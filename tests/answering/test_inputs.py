"""Files, folders and patterns become a list that names each object once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pointalign.answering.inputs import find_inputs
from pointalign.errors import ConfigError


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "a.ply",
        "b.GLB",
        "notes.md",
        ".hidden.ply",
        "sub/c.npy",
        "sub/deep/d.xyz",
        ".cache/e.ply",
        "odd[1].obj",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a.ply"], ["a.ply"]),
        (["a.ply", "./a.ply", "sub/../a.ply"], ["a.ply"]),
        (["."], ["./a.ply", "./b.GLB", "./odd[1].obj", "./sub/c.npy", "./sub/deep/d.xyz"]),
        (["sub/", "sub"], ["sub/c.npy", "sub/deep/d.xyz"]),
        (["*.ply"], ["a.ply"]),
        (["**/*.npy", "sub/c.npy"], ["sub/c.npy"]),
        (["s*"], ["sub/c.npy", "sub/deep/d.xyz"]),
        (["odd[1].obj"], ["odd[1].obj"]),
        (["notes.md"], ["notes.md"]),
        (["missing.ply"], ["missing.ply"]),
        (["-"], ["-"]),
    ],
)
def test_what_paths_mean(tree: Path, given: list[str], expected: list[str]) -> None:
    found = find_inputs(given)
    assert [thing.path for thing in found] == expected
    assert all(thing.error is None for thing in found)


def test_the_order_is_that_of_the_arguments(tree: Path) -> None:
    assert [thing.path for thing in find_inputs(["sub", "b.GLB", "a.ply", "*.GLB"])] == [
        "sub/c.npy",
        "sub/deep/d.xyz",
        "b.GLB",
        "a.ply",
    ]


def test_what_names_nothing_keeps_its_line(tree: Path) -> None:
    nothing, folder = find_inputs(["*.stl", "empty"])
    assert nothing == ("*.stl", "no file matches *.stl; check the path")
    assert folder.path == "empty"
    assert "empty holds no 3D file; known endings are ply" in str(folder.error)


def test_no_input_and_standard_input_among_others_are_refused() -> None:
    with pytest.raises(ConfigError, match="no object is named"):
        find_inputs([])
    with pytest.raises(ConfigError, match="goes alone"):
        find_inputs(["-", "a.ply"])
