"""Two models over the same objects: how far apart they are, whether that is more than noise, and where they disagree."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pointalign.errors import DataError
from pointalign.evaluation.comparison_report import comparison_lines
from pointalign.evaluation.results import RESULTS_FILE, read_results
from pointalign.evaluation.statistics import pooled_difference
from pointalign.progress import say
from pointalign.storage import write_text

VERSUS = "vs"
ACCURACY, SCORE = "accuracy", "score"
REPORT_FILE = "report.md"

Result = Mapping[str, Any]
# An object and a question about it.
AnswerKey = tuple[str, str]


def split_sides(results: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's arguments as two sides: two results, or several a side with `vs` between them.

    Raises:
        DataError: when there are not two sides.
    """
    listed = list(results)
    if VERSUS not in listed and len(listed) == 2:
        listed.insert(1, VERSUS)
    middle = listed.index(VERSUS) if listed.count(VERSUS) == 1 else 0
    first, second = listed[:middle], listed[middle + 1 :]
    if not first or not second:
        raise DataError(
            "give two results, or several seeds a side with vs between the sides: pointalign compare A1 A2 A3 vs B1 B2 B3"
        )
    return first, second


def compare(
    first: Sequence[str | Path], second: Sequence[str | Path], out: str | Path, seed: int = 0
) -> dict[str, Any]:
    """Compare two models, each evaluated once or for several seeds of training.

    Args:
        first: results of the one model, see `read_results`.
        second: results of the other; with equally many a side, the i-th of both belong together.
        out: folder for `report.md` and `results.json`.
        seed: of the resampling.

    Returns:
        `benchmark`, `judge`, `first` and `second` (models and mean), of the main measure what `measure_difference` gives,
        `measures` with the same for each, and `report`.

    Raises:
        DataError: when the results are of different benchmarks, judges, questions or objects.
    """
    folder = Path(out)
    _check_place(folder)
    before, after = ([read_results(path) for path in paths] for paths in (first, second))
    check_comparable([*before, *after])
    names = common_measures([*before, *after])
    measures = {name: measure_difference(before, after, name, seed) for name in names}
    main = measures[names[0]]
    result = {
        "benchmark": before[0]["benchmark"],
        "judge": before[0]["judge"],
        "first": {"models": [one["model"] for one in before], "mean": main["first_mean"]},
        "second": {"models": [one["model"] for one in after], "mean": main["second_mean"]},
        "measure": names[0],
        **{name: value for name, value in main.items() if name not in ("first_mean", "second_mean")},
        "measures": measures,
    }
    rows = disagreements(before, after, names[0])
    content = {**result, "disagreements": rows}
    write_text(folder / RESULTS_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / REPORT_FILE, "\n".join(comparison_lines(result, rows)) + "\n")
    for warning in warnings_of(result):
        say(f"warning: {warning}")
    return {**result, "report": str(folder / REPORT_FILE)}


def _check_place(folder: Path) -> None:
    """Refuse a folder whose result or report is no comparison's."""
    try:
        is_ours = "measures" in json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        is_ours = not (folder / REPORT_FILE).exists()
    except ValueError:
        is_ours = False
    if not is_ours:
        raise DataError(f"{folder} holds an evaluation's result or report, which would be lost; name another --out")


def warnings_of(result: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing a difference."""
    low, high = result["interval"]
    told = []
    if result["inside_noise"]:
        why = (
            f"its 95 % interval, {low:+.4g} to {high:+.4g}, holds zero"
            if low <= 0 <= high
            else f"chance alone makes one as large with probability {result['p_value']:.3g} (sign flips over the objects)"
        )
        told.append(f"the difference is inside the noise: {why}")
    if result["seeds"] == [1, 1]:
        told.append("one seed of training a side: how much another seed would change is not in the interval")
    elif result["few_seeds"]:
        told.append(f"{min(result['seeds'])} seeds of training on one side say little about how much training varies")
    return told


def check_comparable(results: Sequence[Result]) -> None:
    """Refuse results that cannot be compared.

    Raises:
        DataError: when benchmark, judge, classes, questions, objects or their truth differ.
    """
    head = results[0]
    for other in results[1:]:
        for name in ("benchmark", "judge"):
            if other[name] != head[name]:
                raise DataError(
                    f"{head['file']} is of {name} {head[name]!r}, {other['file']} of {other[name]!r}; compare results of one "
                    f"{name}"
                )
        classes, classes_there = head.get("labels"), other.get("labels")
        if classes and classes_there and classes != classes_there:
            raise DataError(
                f"{head['file']} and {other['file']} chose among different classes ({len(classes)} and {len(classes_there)}); "
                "evaluate both models with the same --classes"
            )
        asked, asked_there = ({k: q["prompt"] for k, q in one["questions"].items()} for one in (head, other))
        truth, truth_there = (
            {row["object_id"]: row["ground_truth"] for row in one["objects"]} for one in (head, other)
        )
        differing = sorted(key for key in {**truth, **truth_there} if truth.get(key) != truth_there.get(key))
        if asked != asked_there or differing:
            what = f"objects ({len(differing)} of them, first: {differing[0]})" if differing else "questions"
            raise DataError(
                f"{head['file']} and {other['file']} have different {what}; evaluate both models on the same ones"
            )


def common_measures(results: Sequence[Result]) -> list[str]:
    """What all results can be compared by, the most telling first.

    Raises:
        DataError: when there is nothing.
    """
    head = results[0]
    if head["task"] != "captioning":
        keys = list(head["questions"])
        return [ACCURACY, *(f"{ACCURACY} ({key})" for key in keys)] if len(keys) > 1 else [ACCURACY]
    names = [SCORE] if head["judge"] is not None else []
    metrics = [{name for row in one["objects"] for name in row["metrics"]} for one in results]
    names += [name for name in head["objects"][0]["metrics"] if all(name in found for found in metrics)]
    if not names:
        raise DataError(
            f"{head['file']} and the others have no measure in common; evaluate them with the same embedders"
        )
    return names


def answer_values(result: Result, measure: str) -> dict[AnswerKey, float | None]:
    """One number per answer, by object and question; None where the answer does not count.

    Args:
        result: of a benchmark.
        measure: one of `common_measures`; by "accuracy" an answer is right or not.
    """
    found: dict[AnswerKey, float | None] = {}
    for row in result["objects"]:
        if measure == SCORE:
            value = row["score"]
        elif not measure.startswith(ACCURACY):
            value = row["metrics"][measure]
        elif measure in (ACCURACY, f"{ACCURACY} ({row['question']})"):
            value = row["right"]
        else:
            continue
        found[row["object_id"], row["question"]] = None if value is None else float(value)
    return found


def object_values(result: Result, measure: str, counted: Collection[AnswerKey] | None = None) -> dict[str, float]:
    """One number per object, the mean over its answers; an object of which none counts is left out.

    Args:
        result: of a benchmark.
        measure: see `answer_values`.
        counted: the answers that are to count; all that do when None.
    """
    found: dict[str, list[float]] = {}
    for key, value in answer_values(result, measure).items():
        if value is not None and (counted is None or key in counted):
            found.setdefault(key[0], []).append(value)
    return {object_id: float(np.mean(values)) for object_id, values in found.items()}


def counted_in_all(results: Sequence[Result], measure: str) -> set[AnswerKey]:
    """The answers that count in all results: the same ones are then held against each other."""
    answers = [answer_values(result, measure) for result in results]
    return {key for key in answers[0] if all(found.get(key) is not None for found in answers)}


def measure_difference(first: Sequence[Result], second: Sequence[Result], measure: str, seed: int) -> dict[str, Any]:
    """Second minus first by one measure.

    Returns:
        `difference`, `interval`, `n`, `inside_noise` and the rest of `pooled_difference`; `first_mean`, `second_mean`;
        `left_out`, objects of which an answer does not count in some result, and so in none; with one result a side and
        answers that are right or wrong
        `only_first`, `only_second` (objects that only this side has right), whose `p_value` is McNemar's exact one.

    Raises:
        DataError: when no object counts in all results.
    """
    counted = counted_in_all([*first, *second], measure)
    if not counted:
        raise DataError(f"no object has {measure} in all results; judge them again")
    values = [[object_values(result, measure, counted) for result in side] for side in (first, second)]
    shared = sorted(values[0][0])
    before, after = ([[found[object_id] for object_id in shared] for found in side] for side in values)
    pooled = pooled_difference(before, after, seed)
    found = {
        "difference": pooled.pop("mean"),
        **pooled,
        "first_mean": float(np.mean(before)),
        "second_mean": float(np.mean(after)),
        "left_out": len({object_id for object_id, _ in answer_values(first[0], measure).keys() - counted}),
    }
    if pooled["seeds"] == [1, 1] and {*before[0], *after[0]} <= {0.0, 1.0}:
        changes = np.asarray(after[0]) - np.asarray(before[0])
        found |= {"only_first": int((changes < 0).sum()), "only_second": int((changes > 0).sum())}
    return found


def disagreements(first: Sequence[Result], second: Sequence[Result], measure: str) -> list[dict[str, Any]]:
    """Every object that the two sides do not do equally well on, the largest differences first.

    Returns:
        `object_id`, `truth`, the mean values `first` and `second`, and what the first result of each side said and was
        taken to mean: `first_answers` and `second_answers`.
    """
    counted = counted_in_all([*first, *second], measure)
    means = []
    for side in (first, second):
        values = [object_values(result, measure, counted) for result in side]
        means.append({key: float(np.mean([one[key] for one in values])) for key in values[0]})
    truths = {row["object_id"]: row.get("label") or row["ground_truth"] for row in first[0]["objects"]}
    changed = [key for key in truths if key in means[0] and means[0][key] != means[1][key]]
    said = [_said(side[0]) for side in (first, second)]
    return [
        {
            "object_id": key,
            "truth": truths[key],
            "first": means[0][key],
            "second": means[1][key],
            "first_answers": said[0][key],
            "second_answers": said[1][key],
        }
        for key in sorted(changed, key=lambda key: (-abs(means[1][key] - means[0][key]), key))
    ]


def _said(result: Result) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in result["objects"]:
        taken = f" [{row['predicted'] or 'no class'}]" if "label" in row else ""
        found.setdefault(row["object_id"], []).append(row["model_output"] + taken)
    return found
