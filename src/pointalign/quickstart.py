"""The main job in one command: fine-tune twice, with and without alignment, compare on unseen objects, report."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from pointalign.config import Recipe, load_recipe
from pointalign.data.household import load_household
from pointalign.evaluation.asking import EvaluationSettings
from pointalign.evaluation.results import RESULTS_FILE
from pointalign.evaluation.run import evaluate
from pointalign.evaluation.statistics import paired_difference
from pointalign.evaluation.text_metrics import measure_name
from pointalign.quickstart_report import write_report
from pointalign.run_folder import RunFolder
from pointalign.run_loop import SAME_COMMAND, RunStopped
from pointalign.runs import train
from pointalign.sentence_embedding import MINILM
from pointalign.storage import write_text

# The bundled model as it was before alignment.
START = "household-135m-pretrain"
ARMS = ("baseline", "aligned")
CLASSIFIED = Path("household-classification", "likelihood", RESULTS_FILE)
CAPTIONED = Path("household-captioning", "metrics", RESULTS_FILE)


def quickstart_recipes(fast: bool) -> dict[str, Recipe]:
    """The quick start's two runs: the bundled model's third stage, with alignment and without it.

    Args:
        fast: two steps each of two conversations, on a twentieth of the objects.
    """
    aligned = load_recipe("household-135m-align")
    aligned.model.start_from = START
    aligned.name = "aligned"
    baseline = replace(aligned, name="baseline", alignment=replace(aligned.alignment, weight=0.0))
    recipes = {"baseline": baseline, "aligned": aligned}
    if fast:
        for recipe in recipes.values():
            recipe.optimizer = replace(recipe.optimizer, max_steps=2, warmup_steps=1)
            recipe.logging_steps = 1
            recipe.data.fraction = 0.05
            recipe.data.sets = [replace(part, batch_size=2) for part in recipe.data.sets]
    return recipes


def _train_arm(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train one fine-tune, unless that is done; what `train` told when it was."""
    try:
        summary = train(recipe, folder, resume=True)
    except RunStopped as stopped:
        raise RunStopped(f"{recipe.name}: {stopped.done}", SAME_COMMAND) from None
    file = folder / "summary.json"
    if not file.is_file():
        write_text(file, json.dumps(summary) + "\n")
    return json.loads(file.read_text(encoding="utf-8"))


def evaluate_arm(folder: Path, limit: int | None = None) -> dict[str, Any]:
    """Evaluate one fine-tune, unless that is done, and put what is known of each object together.

    Args:
        folder: the run's.
        limit: only so many objects.

    Returns:
        The classification's numbers; `caption_similarity` with mean and interval, `distinct_captions`; and `objects`: for each
        its `label`, the class `predicted` by likelihood and whether that is `correct`, the free `answer`, the `caption`, its
        `reference` and its `caption_similarity`.
    """
    out = folder / "evaluation"
    if not all((out / file).is_file() for file in (CLASSIFIED, CAPTIONED)):
        evaluate(folder / "model", out, EvaluationSettings(limit=limit))
    classified, captioned = (json.loads((out / file).read_text(encoding="utf-8")) for file in (CLASSIFIED, CAPTIONED))
    measure = measure_name(MINILM)
    rows = [
        {
            "object_id": row["object_id"],
            "label": row["label"],
            "predicted": row["predicted"],
            "correct": row["right"],
            "answer": row["model_output"],
            "caption": captioned_row["model_output"],
            "reference": captioned_row["ground_truth"],
            "caption_similarity": captioned_row["metrics"][measure],
        }
        for row, captioned_row in zip(classified["objects"], captioned["objects"], strict=True)
    ]
    return {
        **classified,
        "caption_similarity": captioned["metrics"][measure],
        "distinct_captions": captioned["distinct_answers"],
        "objects": rows,
    }


def run_quickstart(out: str | Path, fast: bool = False) -> dict[str, Any]:
    """Run the quick start, going on where an earlier one in the same folder stopped.

    Args:
        out: its folder; `report.md` is written there.
        fast: a few steps and objects only.

    Returns:
        `baseline` and `aligned`, each with accuracy, n, interval and majority_rate; their paired difference; the report.

    Raises:
        PointAlignError: for anything expected that goes wrong.
    """
    folder, start = Path(out), time.monotonic()
    recipes = quickstart_recipes(fast)
    summaries = {}
    for name, recipe in recipes.items():
        summaries[name] = _train_arm(recipe, folder / name)
    results = {name: evaluate_arm(folder / name, 4 if fast else None) for name in ARMS}
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
