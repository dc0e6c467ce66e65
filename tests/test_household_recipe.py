"""The cross-validation of the bundled model's recipe: what each stage starts from and leaves out, and how folds are joined."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarking import BENCHMARKS, load_script
from pointalign.config import load_recipe


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(BENCHMARKS / "household_recipe.py")


def test_stages_follow_each_other_and_hold_out_the_same_part(script: ModuleType, tmp_path: Path) -> None:
    changes = {"pretrain": {"optimizer": {"max_steps": 7}}}
    recipes = {
        name: script.stage_recipe(name, "fold-3", tmp_path, Path("x.parquet"), changes) for name in script.STAGES
    }
    assert {recipe.data.held_out for recipe in recipes.values()} == {"fold-3"}
    assert [recipe.model.start_from for recipe in recipes.values()] == [
        None,
        str(tmp_path / "encoder" / "model"),
        str(tmp_path / "pretrain" / "model"),
        str(tmp_path / "align" / "model"),
    ]
    assert recipes["encoder"].data.extra == "x.parquet"
    assert recipes["pretrain"].optimizer.max_steps == 7
    bundled = load_recipe("household-135m-align")
    bundled.data.held_out, bundled.model.start_from = "fold-3", recipes["align"].model.start_from
    assert recipes["align"] == bundled, "nothing else differs from the bundled recipe"


def test_the_summary_pairs_objects_with_each_baseline(script: ModuleType, tmp_path: Path) -> None:
    found = {"classification": {"a": 1.0, "b": 1.0, "c": 0.0, "d": 1.0}, "captioning": {"a": 60.0, "b": 40.0}}
    for name, rows in {
        "classification": [{"right": right} for right in (True, False, False, False)],
        "captioning": [{"metrics": {script.MEASURES["captioning"]: value}} for value in (50.0, 50.0)],
    }.items():
        folder = tmp_path / "forest" / name
        folder.mkdir(parents=True)
        objects: list[dict[str, Any]] = [
            {"object_id": key, "question": "I", **row} for key, row in zip("abcd", rows, strict=False)
        ]
        content = {"benchmark": name, "judge": None, "questions": {}, "objects": objects}
        (folder / "results.json").write_text(json.dumps(content))
    told = script.summary(found, tmp_path)
    assert (told["accuracy"]["mean"], told["accuracy"]["n"]) == (0.75, 4)
    assert told["minus_forest"]["classification"]["mean"] == 0.5
    assert told["minus_forest"]["captioning"]["mean"] == 0.0
    assert told["minus_forest"]["captioning"]["n"] == 2


def test_a_fold_is_read_where_its_evaluation_lies(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training and asking take hours; a baseline's answers about the same fold lie in the same folders."""
    monkeypatch.setattr(script, "train", lambda *given, **named: None)
    asked = script.evaluate
    monkeypatch.setattr(script, "evaluate", lambda model, *given: asked("baseline:most-frequent", *given))
    found = script.run_part("fold-0", tmp_path, Path("x.parquet"), {})
    assert found.keys() == script.MEASURES.keys()
    assert found["classification"].keys() == found["captioning"].keys()
    assert len(found["captioning"]) > 100


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--extra", "none.parquet"], "none.parquet is not there; build it with"),
        (["--parts", "foo"], "there is no part 'foo' of household to hold out"),
        (["--changes", '{"pretrian": {}}'], "there is no stage 'pretrian'; the stages are encoder, pretrain"),
        (["--changes", '{"align": {"lora": {"ranks": 1}}}'], "unknown key 'ranks'; did you mean 'rank'?"),
        (["--baselines", "nope"], "nope is not there; household_baselines.py writes it"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    arguments: list[str], told: str, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "extra.parquet").touch()
    monkeypatch.setattr(script, "run_part", lambda *given: pytest.fail("trained"))
    with pytest.raises(SystemExit) as ended:
        script.main(["--extra", str(tmp_path / "extra.parquet"), *arguments])
    assert told in str(ended.value)
