"""What needs no model: the baselines of `pointalign evaluate --model baseline:NAME`, cross-validated over all 820 objects.

    python benchmarks/household_baselines.py --out runs/baselines        # some ten minutes on two cores, chamfer most of them

Every object is predicted by a baseline that learnt from the other folds, which hold none of its family. Each baseline's
`classification/results.json` and `captioning/results.json` can be compared by `pointalign compare` with results of a recipe
that was trained on the same folds (`pointalign.data.household_split.family_folds`). It ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pointalign.data.household import HouseholdObject, household_classes, load_household
from pointalign.data.household_split import family_folds
from pointalign.data.household_text import reference_caption
from pointalign.evaluation.baselines import BASELINES, Prediction
from pointalign.evaluation.benchmarks import Benchmark, Item, closed_set_items
from pointalign.evaluation.judges import LikelihoodJudge
from pointalign.evaluation.opening import open_benchmark
from pointalign.evaluation.records import Answer, AnswersFile
from pointalign.evaluation.results import RESULTS_FILE, join_questions, judge_question
from pointalign.evaluation.statistics import wilson_interval
from pointalign.evaluation.text_metrics import measure_name
from pointalign.progress import progress, say
from pointalign.sentence_embedding import MINILM
from pointalign.storage import write_text


def cross_validate(
    name: str, objects: Sequence[HouseholdObject], folds: dict[str, int], classes: Sequence[str]
) -> dict[str, Prediction]:
    """A baseline's prediction about every object, learnt from the other folds."""
    found = {}
    with progress(f"baseline:{name}", len(objects)) as advance:
        for fold in sorted(set(folds.values())):
            train = [thing for thing in objects if folds[thing.id] != fold]
            held = [thing for thing in objects if folds[thing.id] == fold]
            told = BASELINES[name](train, held, classes, advance)
            found.update({thing.id: one for thing, one in zip(held, told, strict=True)})
    return found


def write_result(name: str, benchmark: Benchmark, said: dict[str, str], scores: dict[str, Any], out: Path) -> dict:
    """Judge as `pointalign evaluate` does, and write the result as it does."""
    [question] = benchmark.questions
    answers = AnswersFile(
        question.text,
        tuple(
            Answer(item.object_id, item.ground_truth, said[item.object_id], item.label_name) for item in benchmark.items
        ),
    )
    made = {item.object_id: {"tokens": 0, "truncated": False} for item in benchmark.items}
    judge = LikelihoodJudge(scores) if benchmark.task.labels else None
    numbers, rows = judge_question(benchmark, question, answers, made, judge, 0, benchmark.embedders)
    result = {
        "benchmark": benchmark.name,
        "task": benchmark.task.kind,
        "judge": judge.name if judge else None,
        "model": f"baseline:{name}",
        **join_questions(benchmark, {question.key: numbers}, rows),
        "questions": {question.key: numbers},
        "objects": rows,
    }
    write_text(out / RESULTS_FILE, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/baselines"), help="folder for the results")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the folds")
    parser.add_argument("--baselines", nargs="+", choices=list(BASELINES), default=list(BASELINES))
    given = parser.parse_args()
    objects, classes = load_household(), household_classes()
    folds = family_folds(objects, given.folds, given.seed)
    labels = [(thing.id, thing.label) for thing in objects]
    classification = replace(
        open_benchmark("household-classification"),
        name="household-classification-folds",
        items=closed_set_items(labels, classes, "household"),
    )
    captioning = replace(
        open_benchmark("household-captioning"),
        name="household-captioning-folds",
        items=tuple(Item(thing.id, reference_caption(thing)) for thing in objects),
    )
    told: dict[str, Any] = {}
    for name in given.baselines:
        found = cross_validate(name, objects, folds, classes)
        best = {key: classes[one.scores.index(max(one.scores))] for key, one in found.items()}
        scores = {key: one.scores for key, one in found.items()}
        classified = write_result(name, classification, best, scores, given.out / name / "classification")
        captions = {key: one.caption for key, one in found.items()}
        captioned = write_result(name, captioning, captions, {}, given.out / name / "captioning")
        similar = captioned["metrics"][measure_name(MINILM)]
        right = sum(row["right"] for row in classified["objects"])
        told[name] = {
            "accuracy": right / len(objects),
            "interval": list(wilson_interval(right, len(objects))),
            "caption_similarity": similar["mean"],
            "caption_interval": similar["interval"],
        }
        low, high = told[name]["interval"]
        say(
            f"{name}: {right / len(objects):.1%} ({low:.1%} to {high:.1%}), captions {similar['mean']:.1f} "
            f"({similar['interval'][0]:.1f} to {similar['interval'][1]:.1f}), n = {len(objects)}"
        )
    sizes = {"n": len(objects), "folds": given.folds, "seed": given.seed}
    print(json.dumps({**sizes, "baselines": told, "out": str(given.out)}))


if __name__ == "__main__":
    main()
