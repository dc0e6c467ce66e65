"""docs/experiments: the page's tables are what the sweeps found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pointalign.sweep.settings import load_sweep
from pointalign.sweep.table import table_lines

EXPERIMENTS = Path(__file__).resolve().parents[1] / "docs" / "experiments"


@pytest.mark.parametrize("name", sorted(file.stem for file in EXPERIMENTS.glob("*.json")))
def test_the_page_holds_the_results(name: str) -> None:
    results = json.loads((EXPERIMENTS / f"{name}.json").read_text(encoding="utf-8"))
    page = (EXPERIMENTS / "alignment.md").read_text(encoding="utf-8")
    sweep, recipes = load_sweep(EXPERIMENTS / f"{name}.yaml")
    rows = [
        line
        for line in table_lines(results["measures"], results["against"], results["missing"])
        if line.startswith("| ")
    ]
    assert len(rows) >= 5 * len(results["measures"])
    assert [row for row in rows if row not in page] == []
    assert results["against"] == sweep.reference
    done = {(arm, seed) for arm, row in results["measures"]["accuracy"].items() for seed in row["seeds"]}
    missing = {f"{arm}, seed {seed}" for arm, seed in recipes.keys() - done}
    assert done <= recipes.keys()
    assert missing == set(results["missing"])
