"""docs/experiments: the page's tables are what the sweeps found."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarking import load_script
from pointalign.sweep.settings import load_sweep
from pointalign.sweep.table import table_lines

EXPERIMENTS = Path(__file__).resolve().parents[1] / "docs" / "experiments"


@pytest.mark.parametrize("name", ["alignment", "alignment-grids"])
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


def test_performance_tells_what_8_bit_products_changed() -> None:
    page = (EXPERIMENTS.parent / "performance.md").read_text(encoding="utf-8")
    results = json.loads((EXPERIMENTS / "float8.json").read_text(encoding="utf-8"))
    assert results["against"] == load_sweep(EXPERIMENTS / "float8.yaml")[0].reference == "aligned"
    for measure, digits in (("accuracy", 1), ("caption_similarity", 1), ("next_token_loss", 3)):
        found = results["measures"][measure]["float8"]["difference"]
        assert f"{found['seeds'][1]} seeds" in page
        scale = 100 if measure == "accuracy" else 1
        mean, low, high = (f"{scale * value:+.{digits}f}" for value in (found["mean"], *found["interval"]))
        assert f"{mean} ({low} to {high})" in page


def test_the_curve_over_objects_is_what_the_command_told() -> None:
    page = (EXPERIMENTS / "bars.md").read_text(encoding="utf-8")
    told = json.loads((EXPERIMENTS / "bars" / "curve.json").read_text(encoding="utf-8"))
    for point in told["points"]:
        low, high = point["interval"]
        assert f"{100 * point['mean']:.1f} ({100 * low:.0f} to {100 * high:.0f})" in page
    assert len(told["points"]) == 15


def test_the_table_of_folds_is_what_the_commands_told() -> None:
    page = (EXPERIMENTS / "bars.md").read_text(encoding="utf-8")
    told = json.loads((EXPERIMENTS / "bars" / "folds.json").read_text(encoding="utf-8"))
    recipe, baselines = told["recipe"], told["baselines"]["baselines"]

    def cell(mean: float, interval: Sequence[float], factor: float = 1, sign: str = "") -> str:
        value, low, high = (factor * number for number in (mean, *interval))
        return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"

    accuracy, similarity = recipe["accuracy"], recipe["caption_similarity"]
    accuracy, similarity = cell(accuracy["mean"], accuracy["interval"], 100), cell(**without_n(similarity))
    rows = [f"| {accuracy} | | {similarity} | |"]
    for name, numbers in baselines.items():
        minus = {measure: without_n(found) for measure, found in recipe[f"minus_{name}"].items()}
        cells = (
            cell(numbers["accuracy"], numbers["interval"], 100),
            cell(**minus["classification"], factor=100, sign="+"),
            cell(numbers["caption_similarity"], numbers["caption_interval"]),
            cell(**minus["captioning"], sign="+"),
        )
        rows.append(f"| {' | '.join(cells)} |")
    assert [row for row in rows if row not in page] == []
    assert len(rows) == 5
    assert {recipe["accuracy"]["n"], recipe["caption_similarity"]["n"], told["baselines"]["n"]} == {820}


def without_n(found: dict[str, Any]) -> dict[str, Any]:
    """The mean and its interval."""
    return {name: found[name] for name in ("mean", "interval")}


def test_the_table_of_geometry_is_what_the_probes_told() -> None:
    builder = load_script(EXPERIMENTS.parent / "build_geometry.py")
    probes = json.loads(builder.PROBES.read_text(encoding="utf-8"))
    page = builder.PAGE.read_text(encoding="utf-8")
    assert builder.write_table(page, builder.table(probes)) == page
    assert len(probes) == 5

    def ends(row: str, layers: slice = slice(None), factor: int = 100) -> list[str]:
        """Least and largest mean over seeds of all layers and both models, as the page rounds them."""
        found = [
            statistics.mean(probe[row][which][layer] for probe in probes)
            for which in ("plain", "aligned")
            for layer in range(*layers.indices(31))
        ]
        return [f"{factor * end:.{0 if factor == 100 else 2}f}" for end in (min(found), max(found))]

    assert ends("knn_class") == ["40", "44"]
    assert (ends("linear_class", slice(1)), ends("linear_class", slice(1, None))) == (["48", "48"], ["43", "47"])
    assert ends("linear_color", slice(10, 11)) == ["41", "41"]
    assert (ends("linear_color", slice(19, 20)), ends("linear_color")[0]) == (["44", "45"], "38")
    assert [ends("heights_r2", slice(layer, layer + 1), 1)[0] for layer in (0, 3, 30)] == ["0.33", "0.40", "0.36"]
    assert ends("box_r2", slice(10, None), 1) == ["0.66", "0.69"]
    assert ends("cknna", factor=1) == ["0.51", "0.54"]
    assert (
        f"{max(probe['cknna'][f'{which}_null_95'][0] for probe in probes for which in ('plain', 'aligned')):.2f}"
        == "0.12"
    )


def test_a_difference_over_seeds_has_students_interval() -> None:
    """Of 1, 2, 3, 4, 5: mean 3, standard error sqrt(2.5 / 5) = 0.7071, t of four degrees of freedom 2.7764."""
    builder = load_script(EXPERIMENTS.parent / "build_geometry.py")
    assert builder.mean_interval([1, 2, 3, 4, 5]) == pytest.approx((3, 3 - 1.9632, 3 + 1.9632), abs=1e-4)
