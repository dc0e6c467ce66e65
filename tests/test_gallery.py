"""docs/build_gallery.py: which objects are shown, and that the page holds what the evaluation says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarking import load_script
from pointalign.data.household import load_household

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "gallery.md"


def load_gallery() -> Any:
    return load_script(ROOT / "docs" / "build_gallery.py")


def rows() -> list[dict[str, Any]]:
    """Made-up verdicts on the held-out objects; every third is wrong, the later the surer."""
    return [
        {
            "object_id": thing.id,
            "label": thing.label,
            "predicted": thing.label if number % 3 else "nothing",
            "right": bool(number % 3),
            "margin": float(-number),
            "model_output": f"An answer {number}.",
        }
        for number, thing in enumerate(load_household("test"))
    ]


def test_the_rule_shows_firsts_of_every_other_class_and_the_surest_mistakes() -> None:
    found = rows()
    firsts, mistakes = load_gallery().shown(found)
    labels = [found[number]["label"] for number in firsts]
    assert len(set(labels)) == len(labels) == (len({row["label"] for row in found}) + 1) // 2
    assert all(found[number]["label"] not in {row["label"] for row in found[:number]} for number in firsts)
    assert len(mistakes) == 4
    assert not any(found[number]["right"] for number in mistakes)
    assert mistakes == sorted(mistakes, reverse=True)


def test_the_page_holds_what_was_said(tmp_path: Path, tiny_model: Path) -> None:
    common = {"judge": None, "questions": {}}
    classified = {**common, "benchmark": "household-classification", "accuracy": 0.66, "interval": [0.5, 0.7], "n": 100}
    captions = [{"object_id": row["object_id"], "model_output": f"A caption | {row['object_id']}"} for row in rows()]
    for name, values in {
        "household-classification/likelihood": {**classified, "objects": rows()},
        "household-captioning/metrics": {**common, "benchmark": "household-captioning", "objects": captions},
    }.items():
        (tmp_path / "evaluation" / name).mkdir(parents=True)
        (tmp_path / "evaluation" / name / "results.json").write_text(json.dumps(values))
    load_gallery().build(tmp_path / "evaluation", tmp_path, ROOT / "examples", str(tiny_model))
    page = (tmp_path / "gallery.md").read_text()
    assert "66.0 % (50.0 to 70.0), n = 100" in page
    assert "**nothing**, not" in page
    assert f"A caption \\| {rows()[0]['object_id']}" in page
    pictures = re.findall(r"!\[\]\((.*?)\)", page)
    assert len(pictures) == len(set(pictures)) > 10
    sizes = [(tmp_path / picture).stat().st_size for picture in pictures]
    assert min(sizes) > 500
    assert sum(sizes) < 2**20


@pytest.mark.skipif(not PAGE.is_file(), reason="this checkout lacks docs/gallery.md")
def test_the_committed_pages_pictures_are_there_and_small() -> None:
    pictures = [PAGE.parent / name for name in re.findall(r"!\[\]\((.*?)\)", PAGE.read_text(encoding="utf-8"))]
    assert all(picture.is_file() for picture in pictures)
    assert sum(picture.stat().st_size for picture in pictures) < 2**20
    assert {*pictures} == {*(PAGE.parent / "images" / "gallery").iterdir()}
