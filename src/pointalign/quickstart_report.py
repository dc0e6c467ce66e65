"""The quick start's report: what was trained, how the two models compare, and what they say of unseen objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pointalign.config import Recipe
from pointalign.data.household import HouseholdObject
from pointalign.figures import draw_cloud, draw_losses, save_figure
from pointalign.storage import write_text

SHOWN = 6


def _percent(summary: Mapping[str, Any]) -> str:
    low, high = summary["interval"]
    return f"{100 * summary['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _points(summary: Mapping[str, Any]) -> str:
    low, high = summary["interval"]
    return f"{summary['mean']:.1f} ({low:.1f} to {high:.1f})"


def _signed(summary: Mapping[str, Any], scale: float = 1.0) -> str:
    low, high = summary["interval"]
    return f"{scale * summary['mean']:+.1f} ({scale * low:+.1f} to {scale * high:+.1f})"


def pick_shown(objects: Sequence[Mapping[str, Any]]) -> list[int]:
    """Six held-out objects of different classes, spread evenly over the list: a fixed rule, so that none is hand-picked."""
    first_of_class = list({row["label"]: index for index, row in reversed(list(enumerate(objects)))}.values())
    candidates = sorted(first_of_class)
    step = max(len(candidates) // SHOWN, 1)
    return candidates[::step][:SHOWN]


def draw_objects(objects: Sequence[HouseholdObject], path: Path) -> None:
    """Draw clouds side by side, three in a row."""
    rows = -(-len(objects) // 3)
    figure = Figure(figsize=(9, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, thing in enumerate(objects):
        axes = figure.add_subplot(rows, 3, number + 1)
        draw_cloud(axes, thing.points)
        axes.set_title(f"{number + 1}. {thing.label}", fontsize=11)
    save_figure(figure, path)


def _training_table(recipes: Mapping[str, Recipe], summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["| run | what trains | trained weights | steps | seconds |", "| --- | --- | ---: | ---: | ---: |"]
    for name, summary in summaries.items():
        counts = summary["trained"] or {}
        lines.append(
            f"| {name} | {', '.join(counts) or ', '.join(recipes[name].trains)} | {sum(counts.values()):,} | "
            f"{summary['steps']} | {summary['seconds']:.0f} |"
        )
    return lines


def _comparison(results: Mapping[str, Mapping[str, Any]], difference: Mapping[str, Mapping[str, Any]]) -> list[str]:
    base, aligned = results["baseline"], results["aligned"]
    return [
        "| | baseline | aligned | aligned - baseline |",
        "| --- | ---: | ---: | ---: |",
        f"| closed-set accuracy | {_percent(base)} | {_percent(aligned)} | {_signed(difference['correct'], 100)} |",
        f"| caption similarity | {_points(base['caption_similarity'])} | {_points(aligned['caption_similarity'])} | "
        f"{_signed(difference['caption_similarity'])} |",
        f"| distinct answers | {base['distinct_answers']} | {aligned['distinct_answers']} | |",
        f"| distinct captions | {base['distinct_captions']} | {aligned['distinct_captions']} | |",
    ]


def _verdict(n: int, difference: Mapping[str, Mapping[str, Any]]) -> str:
    low, high = difference["correct"]["interval"]
    half = 50 * (high - low)
    told = "cannot tell" if difference["correct"]["inside_noise"] else "suggests, from one seed only,"
    return (
        f"**{n} objects prove little.** The 95 % interval of the difference in accuracy is {half:.1f} points wide on each "
        f"side ({100 * low:+.1f} to {100 * high:+.1f}; exact McNemar test, p = {difference['correct']['p_value']:.2g}), and "
        f"one object moves accuracy by {100 / n:.1f} points: this run "
        f"{told} whether alignment helps. It shows that both fine-tunes run and what they produce; a claim needs "
        "several seeds and more objects."
    )


def _answers(results: Mapping[str, Mapping[str, Any]], shown: Sequence[int]) -> list[str]:
    lines = []
    for number, index in enumerate(shown, start=1):
        base, aligned = (results[name]["objects"][index] for name in ("baseline", "aligned"))
        lines += [
            f"### {number}. {base['label']} (`{base['object_id']}`)",
            "",
            "| | |",
            "| --- | --- |",
            f"| truth | {_cell(base['reference'])} |",
        ]
        for name, row in (("baseline", base), ("aligned", aligned)):
            mark = "right" if row["correct"] else "wrong"
            lines += [
                f"| {name}: class | {row['predicted']} ({mark}) |",
                f"| {name}: What is this? | {_cell(row['answer'])} |",
                f"| {name}: caption | {_cell(row['caption'])} |",
            ]
        lines.append("")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ") or "(empty)"


def write_report(
    folder: Path,
    recipes: Mapping[str, Recipe],
    summaries: Mapping[str, Mapping[str, Any]],
    results: Mapping[str, Mapping[str, Any]],
    difference: Mapping[str, Mapping[str, Any]],
    metrics: Mapping[str, Sequence[dict[str, Any]]],
    objects: Sequence[HouseholdObject],
) -> None:
    """Write `report.md` with its two figures, readable by itself.

    Args:
        folder: the quick start's folder.
        recipes: of each run.
        summaries: what `train` returned for each run.
        results: what `evaluate_arm` gave for "baseline" and "aligned".
        difference: paired differences, aligned minus baseline.
        metrics: logged lines of both fine-tunes.
        objects: the held-out objects.
    """
    shown = pick_shown(results["baseline"]["objects"])
    by_id = {thing.id: thing for thing in objects}
    draw_objects([by_id[results["baseline"]["objects"][i]["object_id"]] for i in shown], folder / "objects.png")
    draw_losses(metrics, folder / "losses.png", "The two fine-tunes")
    base, alignment = results["baseline"], recipes["aligned"].alignment
    n = base["n"]
    lines = [
        "# Quick start: one model fine-tuned twice, with and without alignment",
        "",
        f"From one start, `{recipes['aligned'].model.start_from}` (the bundled model before alignment), the language model's "
        f"LoRA was fine-tuned twice on the same batches with the same seed: **baseline** by next-token loss alone, **aligned** "
        f"with PointAlign's loss (weight {alignment.weight:g}, hidden state {', '.join(map(str, alignment.layers))}) added.",
        "",
        "## What was trained",
        "",
        *_training_table(recipes, summaries),
        "",
        f"## How they compare on {n} objects neither has seen",
        "",
        *_comparison(results, difference),
        "",
        f"Accuracy: the most probable of {len({row['label'] for row in base['objects']})} present classes' names wins, scored "
        f"against all classes; always answering the most frequent class gives {100 * base['majority_rate']:.1f} %. Caption "
        "similarity: cosine x 100 of all-MiniLM-L6-v2 embeddings. In brackets, 95 % intervals over objects (accuracy: Wilson; "
        "similarity: bootstrap); the last column is a paired bootstrap. Each model's `evaluation` folder has the full reports.",
        "",
        _verdict(n, difference),
        "",
        "![losses](losses.png)",
        "",
        f"## {len(shown)} held-out objects",
        "",
        "![objects](objects.png)",
        "",
        *_answers(results, shown),
    ]
    write_text(folder / "report.md", "\n".join(lines))
