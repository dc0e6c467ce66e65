"""The main job in one command: train, fine-tune twice with and without alignment, compare on unseen objects, report."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from pointalign.config import Recipe, load_recipe
from pointalign.data.household import load_household
from pointalign.demo_report import write_report
from pointalign.evaluation.metrics import paired_difference
from pointalign.evaluation.run import RESULTS_FILE, evaluate
from pointalign.run_folder import RunFolder
from pointalign.runs import train

ARMS = ("baseline", "aligned")


def demo_recipes(out: Path, fast: bool) -> dict[str, Recipe]:
    """The demo's four runs in order, each starting from what came before.

    Args:
        out: the demo's folder.
        fast: two steps each.
    """
    encoder = load_recipe("household-encoder")
    pretrain = load_recipe("household-pretrain")
    pretrain.model.start_from = str(out / "encoder" / "model")
    aligned = load_recipe("household-align")
    aligned.model.start_from = str(out / "pretrain" / "model")
    aligned.name = "aligned"
    baseline = replace(aligned, name="baseline", alignment=replace(aligned.alignment, weight=0.0))
    recipes = {"encoder": encoder, "pretrain": pretrain, "baseline": baseline, "aligned": aligned}
    if fast:
        for recipe in recipes.values():
            recipe.optimizer = replace(recipe.optimizer, max_steps=2, warmup_steps=1)
            recipe.logging_steps = 1
    return recipes


def run_demo(out: str | Path, fast: bool = False) -> dict[str, Any]:
    """Run the demo, going on where an earlier one in the same folder stopped.

    Args:
        out: its folder; `report.md` is written there.
        fast: a few steps and objects only.

    Returns:
        `baseline` and `aligned`, each with accuracy, n, interval and majority_rate; their paired difference; the report.

    Raises:
        PointAlignError: for anything expected that goes wrong.
    """
    folder, start = Path(out), time.monotonic()
    recipes = demo_recipes(folder, fast)
    summaries = {}
    for name, recipe in recipes.items():
        summary_file = folder / name / "summary.json"
        if not summary_file.is_file():
            summary = train(recipe, folder / name, resume=True)
            summary_file.write_text(json.dumps(summary) + "\n", encoding="utf-8")
        summaries[name] = json.loads(summary_file.read_text(encoding="utf-8"))
    results = {}
    for name in ARMS:
        results_file = folder / name / "evaluation" / RESULTS_FILE
        if not results_file.is_file():
            evaluate(folder / name / "model", results_file.parent, 6 if fast else None)
        results[name] = json.loads(results_file.read_text(encoding="utf-8"))
    difference = {}
    for metric in ("correct", "caption_similarity"):
        first, second = ([float(row[metric]) for row in results[name]["objects"]] for name in ARMS)
        difference[metric] = paired_difference(first, second)
    metrics = {name: RunFolder(folder / name).metrics() for name in ARMS}
    write_report(folder, recipes, summaries, results, difference, metrics, load_household("test"))
    keys = ("accuracy", "n", "interval", "majority_rate")
    return {
        **{name: {key: results[name][key] for key in keys} for name in ARMS},
        "difference": difference["correct"],
        "report": str(folder / "report.md"),
        "seconds": round(time.monotonic() - start, 1),
    }
