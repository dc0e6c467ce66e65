"""Reports of an evaluation as Markdown: numbers with their uncertainty, figures, what was said, what it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pointalign.evaluation.benchmarks import Benchmark
from pointalign.evaluation.figures import Panel, draw_class_accuracy, draw_confusion, draw_contact_sheet
from pointalign.evaluation.published import paper_table
from pointalign.storage import write_text

SHOWN = 8
SHEET, CONFUSION, CLASSES = "answers.png", "confusion.png", "classes.png"
JUDGED_BY_SELF = "likelihood"


def cell(text: Any) -> str:
    """Text as a cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ") or "(empty)"


def percent(value: float | None, interval: Sequence[float] | None) -> str:
    """A share with its interval; a dash where there is none."""
    if value is None or interval is None:
        return "-"
    return f"{100 * value:.1f} % ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def points(value: float | None, interval: Sequence[float] | None) -> str:
    """A score of 0 to 100 with its interval; a dash where there is none."""
    return "-" if value is None or interval is None else f"{value:.1f} ({interval[0]:.1f} to {interval[1]:.1f})"


def write_report(folder: Path, result: Mapping[str, Any], benchmark: Benchmark) -> None:
    """Write `report.md` and its figures beside a benchmark's `results.json`.

    Args:
        folder: where they go.
        result: what `results.json` holds.
        benchmark: gives the clouds.
    """
    judge = result["judge"]
    title = f"{result['benchmark']}, {f'judge {judge}' if judge else 'no judge'}"
    lines = [f"# {result['benchmark']}: {result['model']}", ""]
    lines += _captions(result) if result["task"] == "captioning" else _accuracies(result)
    lines += ["", _answers_told(result)]
    if result["task"] == "closed-set":
        labels, right = ([row[name] for row in result["objects"]] for name in ("label", "right"))
        draw_confusion(labels, [row["predicted"] for row in result["objects"]], folder / CONFUSION, title)
        draw_class_accuracy(labels, right, folder / CLASSES, title)
        lines += ["", "## Classes", "", f"![accuracy by class]({CLASSES})", "", f"![confusion]({CONFUSION})"]
    table = paper_table([result], cell(result["model"]))
    if table:
        lines += ["", "## Beside the published results", "", *table]
    sheet = _sheet(result, benchmark)
    if any(sheet.values()):
        draw_contact_sheet(sheet, folder / SHEET, title)
        lines += ["", "## Best and worst answers", "", _sheet_rule(result), "", f"![answers]({SHEET})"]
    lines += ["", "## What it came from", "", *_provenance(result["provenance"])]
    write_text(folder / "report.md", "\n".join(lines) + "\n")


def _accuracies(result: Mapping[str, Any]) -> list[str]:
    closed = result["task"] == "closed-set"
    lines = [
        f"Judge: **{cell(result['judge'])}**.",
        "",
        "| question | accuracy (95 % interval) | n | invalid | mean over classes | invalid counted as wrong |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for asked in result["questions"].values():
        by_class = f"{100 * asked['mean_class_accuracy']:.1f} %" if closed else "-"
        strict = percent(asked.get("accuracy_without_random"), asked.get("interval_without_random"))
        question, accuracy = cell(asked.get("scored", asked["prompt"])), percent(asked["accuracy"], asked["interval"])
        lines.append(f"| {question} | {accuracy} | {asked['n']} | {asked['invalid']} | {by_class} | {strict} |")
    if len(result["questions"]) > 1:
        lines.append(
            f"| together | {percent(result['accuracy'], result['interval'])} | {result['n']} | {result['invalid']} | | |"
        )
    told = (
        "An answer without a class counts as a random one, seeded, as the field does it. "
        f"Always answering the most frequent class gives {100 * result['majority_rate']:.1f} %."
        if closed
        else "Replies of the judge that cannot be read are left out."
    )
    scored = (
        " It was not judged by its words: the class with the highest score counts; a model's is the log-probability of the "
        "class as its answer."
        if result["judge"] == JUDGED_BY_SELF
        else ""
    )
    together = (
        " Together: mean over objects, interval by bootstrap over objects." if len(result["questions"]) > 1 else ""
    )
    return [*lines, "", f"Intervals are Wilson's. {told}{scored}{together}"]


def _captions(result: Mapping[str, Any]) -> list[str]:
    lines = [
        "| measure | mean (95 % interval) | n | compares with the field's | how |",
        "| --- | ---: | ---: | --- | --- |",
    ]
    if result["judge"] is not None:
        score = points(result["score"], result["interval"])
        lines.append(
            f"| judge {cell(result['judge'])} | {score}, {result['invalid']} invalid | {result['n']} | by the same judge and "
            "prompt | |"
        )
    for name, metric in result["metrics"].items():
        if "absent" in metric:
            lines.append(f"| {name} | - | | | not measured: {cell(metric['absent'])} |")
        else:
            value, compares = points(metric["mean"], metric["interval"]), "yes" if metric["comparable"] else "**no**"
            n = metric.get("n", result["n"])
            lines.append(f"| {name} | {value} | {n} | {compares} | {cell(metric['how'])} |")
    return [*lines, "", "Intervals are bootstraps over objects."]


def _answers_told(result: Mapping[str, Any]) -> str:
    told = []
    for key, asked in result["questions"].items():
        told.append(
            f"Answers ({key}): {asked['distinct_answers']} different ones, {asked['empty_answers']} empty, "
            f"{asked['truncated_answers']} cut off at the longest length, {asked['mean_answer_tokens']:.1f} tokens on average."
        )
    return " ".join(told)


def row_quality(row: Mapping[str, Any]) -> float:
    """What answers are ranked by: the likelihoods' margin, the judge's score, the first metric, right or wrong."""
    if "margin" in row:
        return row["margin"]
    if row.get("score") is not None:
        return row["score"]
    if row.get("metrics"):
        return next(iter(row["metrics"].values()))
    return float(bool(row.get("right")))


def pick_rows(rows: Sequence[Mapping[str, Any]], best: bool) -> list[Mapping[str, Any]]:
    """The best or worst answers to the first question, of different classes as far as there are: nothing is hand-picked."""
    ranked = sorted(
        (row for row in rows if row["question"] == rows[0]["question"] and row.get("right", best) == best),
        key=lambda row: (-row_quality(row) if best else row_quality(row), row["object_id"]),
    )
    first_of_class = {row.get("label", row["object_id"]): row for row in reversed(ranked)}.values()
    chosen = {row["object_id"] for row in [row for row in ranked if row in first_of_class][:SHOWN]}
    for row in ranked:
        if len(chosen) < SHOWN:
            chosen.add(row["object_id"])
    return [row for row in ranked if row["object_id"] in chosen]


def _sheet(result: Mapping[str, Any], benchmark: Benchmark) -> dict[str, list[Panel]]:
    rows = result["objects"]
    names = ("Best answers", "Worst answers") if result["task"] == "captioning" else ("Right answers", "Wrong answers")
    best, worst = pick_rows(rows, True), pick_rows(rows, False)
    shown = {row["object_id"] for row in best}
    worst = [row for row in worst if row["object_id"] not in shown]
    return {name: [_panel(row, benchmark) for row in part] for name, part in zip(names, (best, worst), strict=True)}


def _panel(row: Mapping[str, Any], benchmark: Benchmark) -> Panel:
    lines = [f"said: {row['model_output'] or '(nothing)'}"]
    if "label" in row:
        lines.append(f"taken for: {row['predicted'] or 'no class'}")
    else:
        lines.append(f"truth: {row['ground_truth']}")
    if row.get("score") is not None:
        lines.append(f"score: {row['score']:.0f}")
    if row.get("metrics"):
        name, value = next(iter(row["metrics"].items()))
        lines.append(f"{name}: {value:.0f}")
    title = row.get("label") or row["object_id"]
    return Panel(benchmark.points(row["object_id"]), title, tuple(lines), row.get("right"))


def _sheet_rule(result: Mapping[str, Any]) -> str:
    if result["judge"] == JUDGED_BY_SELF:
        return (
            "Ranked by how far the true class's log-probability lies above the best other class's; of each class first the "
            "extreme one."
        )
    if result["task"] == "captioning":
        return "Ranked by the judge's score, else by the first measure above."
    return "Of each class first one, in the order of their ids: the judge does not say how right an answer is."


def _provenance(values: Mapping[str, Any]) -> list[str]:
    """Two columns: what, and its value; nested values by dotted names."""
    lines = ["| | |", "| --- | --- |"]

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{name}.{key}" if name else key, inner)
        elif value is not None:
            lines.append(
                f"| {name} | {cell(', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value)} |"
            )

    add("", values)
    return lines


def write_overview(path: Path, model: str, results: Sequence[Mapping[str, Any]], skipped: Mapping[str, str]) -> None:
    """Write the report over all benchmarks and judges of an evaluation.

    Args:
        path: Markdown file to write.
        model: its name.
        results: each with the file that holds it (`results`), in the order of the table.
        skipped: why others were left out, by name.
    """
    lines = [
        f"# {model}",
        "",
        "| benchmark | judge | result (95 % interval) | n | invalid |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for result in results:
        benchmark = f"[{result['benchmark']}]({Path(result['results']).parent.relative_to(path.parent)}/report.md)"
        judge, invalid = cell(result.get("judge") or "-"), result.get("invalid", "")
        lines.append(f"| {benchmark} | {judge} | {_headline(result)} | {result['n']} | {invalid} |")
    table = paper_table(results, cell(model))
    if table:
        lines += ["", "## Beside the published results", "", *table]
    if skipped:
        lines += ["", "## Left out", "", *(f"* {name}: {cell(reason)}" for name, reason in skipped.items())]
    write_text(path, "\n".join(lines) + "\n")


def _headline(result: Mapping[str, Any]) -> str:
    if "accuracy" in result:
        return percent(result["accuracy"], result["interval"])
    if "perplexity_ratio" in result:
        low, high = result["interval"]
        return f"perplexity x {result['perplexity_ratio']:.3f} ({low:.3f} to {high:.3f})"
    if result.get("score") is not None:
        return points(result["score"], result["interval"])
    name, metric = next((item for item in result["metrics"].items() if "absent" not in item[1]), ("", {}))
    return f"{name} {points(metric['mean'], metric['interval'])}" if metric else "-"
