"""Lines on disk: what a stopped run leaves is gone on with, and never taken for something else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pointalign.answering.lines import LinesFile, json_line
from pointalign.errors import DataError

# A file that is refused is closed again.
pytestmark = pytest.mark.filterwarnings("error")
SETTINGS = {"model": "abc", "question": "What is this?"}


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def written(*rows: dict[str, Any], **options: Any) -> dict[str, bool]:
    lines = LinesFile(Path("out.jsonl"), SETTINGS, **options)
    done = dict(lines.done)
    lines.write(rows)
    lines.close()
    return {Path(key).name: failed for key, failed in done.items()}


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out.jsonl").read_bytes().splitlines()]


def test_rows_are_appended_and_known_the_next_time() -> None:
    assert written({"path": "a.ply", "caption": "ein Stuhl: 椅子"}) == {}
    assert written({"path": "sub/../b.ply", "error": "broken"}) == {"a.ply": False}
    assert written() == {"a.ply": False, "b.ply": True}
    assert [row["path"] for row in rows()] == ["a.ply", "sub/../b.ply"]
    assert "椅子" in Path("out.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("tail", [b'{"path": "b.pl', b"{", b'{"path": "b.ply", "caption": "x"}', b"\xff" * 200_000])
def test_a_line_that_a_kill_cut_short_is_dropped(tail: bytes) -> None:
    written({"path": "a.ply", "caption": "one"})
    with Path("out.jsonl").open("ab") as file:
        file.write(tail)
    assert written({"path": "c.ply", "caption": "three"}) == {"a.ply": False}
    assert [row["path"] for row in rows()] == ["a.ply", "c.ply"]


def test_a_file_that_is_nothing_but_a_cut_line_begins_anew() -> None:
    written()
    Path("out.jsonl").write_bytes(b'{"pa')
    assert written({"path": "a.ply", "caption": "one"}) == {}
    assert len(rows()) == 1


def test_errors_are_tried_again_when_asked() -> None:
    written({"path": "a", "error": "x"}, {"path": "b", "caption": "y"}, {"path": "c", "error": "z"})
    assert written({"path": "a", "caption": "now"}, retry_errors=True) == {"b": False}
    assert rows() == [{"path": "b", "caption": "y"}, {"path": "a", "caption": "now"}]


def test_names_that_are_no_text_come_back_as_they_were() -> None:
    name = os.fsdecode(b"sch\xf6n.ply")
    assert json.loads(json_line({"path": name}))["path"] == name
    written({"path": name, "caption": "one"})
    assert list(written()) == [name]


def test_rows_of_another_question_are_refused() -> None:
    written({"path": "a", "caption": "x"})
    with pytest.raises(
        DataError, match=r"out.jsonl holds answers with another question; name another --out, or delete it"
    ):
        LinesFile(Path("out.jsonl"), {**SETTINGS, "question": "Colour?"})
    with pytest.raises(DataError, match="another question and top"):
        LinesFile(Path("out.jsonl"), {"model": "abc", "top": 3})


def test_a_file_of_unknown_origin_is_left_alone() -> None:
    Path("out.jsonl").write_text('{"path": "a"}\n')
    with pytest.raises(DataError, match=r"out.jsonl.settings.json, which says how it was made, is missing"):
        LinesFile(Path("out.jsonl"), SETTINGS)
    assert Path("out.jsonl").read_text() == '{"path": "a"}\n'


@pytest.mark.parametrize("line", ["not json", '{"caption": "x"}', "[1]", "7"])
def test_a_broken_line_is_named(line: str) -> None:
    written({"path": "a", "caption": "x"})
    with Path("out.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"out\.jsonl, line 2 is broken"):
        LinesFile(Path("out.jsonl"), SETTINGS)


def test_two_runs_do_not_write_the_same_file() -> None:
    first = LinesFile(Path("out.jsonl"), SETTINGS)
    with pytest.raises(DataError, match=r"another process is writing out\.jsonl"):
        LinesFile(Path("./out.jsonl"), SETTINGS)
    first.close()
    LinesFile(Path("out.jsonl"), SETTINGS).close()


def test_a_folder_in_the_way_is_told() -> None:
    Path("out.jsonl").mkdir()
    with pytest.raises(DataError, match=r"cannot write out\.jsonl: Is a directory"):
        LinesFile(Path("out.jsonl"), SETTINGS)
