"""The published results as data, and our own beside them: rows of different judges are never mixed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

COLUMNS = {
    "modelnet40_I": "MN40 (I)",
    "modelnet40_C": "MN40 (C)",
    "objaverse_I": "Objaverse (I)",
    "objaverse_C": "Objaverse (C)",
    "classification_mean": "mean",
    "caption_judge": "caption, judge",
    "caption_sentence_bert": "S-BERT",
    "caption_simcse": "SimCSE",
}
CLASSIFICATION = {"modelnet40": "modelnet40", "objaverse-classification": "objaverse"}
CAPTIONING = "objaverse-captioning"
IN_THE_TABLE = (*CLASSIFICATION, CAPTIONING)
# By column: the metric of a captioning result.
EMBEDDED = {"caption_sentence_bert": "sentence-bert", "caption_simcse": "simcse"}


@cache
def published_results() -> dict[str, Any]:
    """The tables of the paper: `main` (rows by model), `ablations`, `nearest_neighbour_peak`, `scan2cap`.

    Source: PointAlign (arXiv 2603.00412).
    """
    file = resources.files("pointalign") / "assets" / "published_results.json"
    return json.loads(file.read_text(encoding="utf-8"))


def paper_table(results: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Our results in the layout of the paper's table, with the published rows, as Markdown; one table per judge.

    Args:
        results: as `evaluate` writes them, any number by benchmark and judge; those that are not in the paper's table are
            passed over.
        name: of our model.

    Returns:
        Lines; none when no result belongs in the table.
    """
    ours = [result for result in results if result["benchmark"] in IN_THE_TABLE]
    if not ours:
        return []
    main = published_results()["main"]
    lines = [f"Judge {main['judge']}, published rows:", "", *_header()]
    for model, values in main["rows"].items():
        lines.append(f"| {model} | {' | '.join(f'{value:.2f}' for value in values)} |")
    notes: list[str] = []
    for judge in dict.fromkeys(result["judge"] for result in ours):
        told = f"Judge {judge}, ours" if judge else "No judge, ours"
        cells = _cells({result["benchmark"]: result for result in ours if result["judge"] == judge}, notes)
        lines += ["", f"{told}:", "", *_header(), f"| {name} | {' | '.join(cells)} |"]
    sizes = ", ".join(dict.fromkeys(f"{result['benchmark']} {result['n']}" for result in ours))
    told = (
        f"In brackets, 95 % intervals. Objects: {sizes}; published {main['n']['modelnet40']} and {main['n']['objaverse']}. "
        "Accuracies compare only with those of the same judge and prompts."
    )
    return [*lines, "", " ".join([told, *dict.fromkeys(notes)])]


def _header() -> list[str]:
    return [f"| model | {' | '.join(COLUMNS.values())} |", f"| --- |{' ---: |' * len(COLUMNS)}"]


def _cells(results: Mapping[str, Mapping[str, Any]], notes: list[str]) -> list[str]:
    """One cell per column from one judge's results by benchmark; what was not measured is a dash."""
    cells = dict.fromkeys(COLUMNS, "-")
    accuracies = []
    for benchmark, prefix in CLASSIFICATION.items():
        result = results.get(benchmark)
        if result is None:
            continue
        for key, asked in result["questions"].items():
            if asked["accuracy"] is not None:
                cells[f"{prefix}_{key}"] = _cell(asked["accuracy"], asked["interval"], 100)
                accuracies.append(100 * asked["accuracy"])
    if len(accuracies) == 2 * len(CLASSIFICATION):
        cells["classification_mean"] = f"{sum(accuracies) / len(accuracies):.2f}"
    captions = results.get(CAPTIONING)
    if captions is not None:
        if captions.get("score") is not None:
            cells["caption_judge"] = _cell(captions["score"], captions["interval"], 1)
        for column, metric in EMBEDDED.items():
            measured = captions["metrics"].get(metric, {"absent": "not asked for"})
            if "absent" not in measured:
                cells[column] = _cell(measured["mean"], measured["interval"], 1)
            else:
                notes.append(f"{COLUMNS[column]} is missing: {measured['absent']}.")
    return list(cells.values())


def _cell(value: float, interval: tuple[float, float], scale: float) -> str:
    low, high = interval
    return f"{scale * value:.2f} ({scale * low:.1f}-{scale * high:.1f})"
