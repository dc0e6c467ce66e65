"""From answers and a judge to a benchmark's result: the numbers with their uncertainty, and a row for every answer."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pointalign.errors import DataError
from pointalign.evaluation.benchmarks import Benchmark, Question
from pointalign.evaluation.judges import CLASS_STEM, LikelihoodJudge
from pointalign.evaluation.judging.scoring import summarize_verdicts, verdict_rows
from pointalign.evaluation.metrics import class_accuracies, mean_class_accuracy
from pointalign.evaluation.records import Answer, AnswersFile, Judge, Task
from pointalign.evaluation.statistics import summarize
from pointalign.evaluation.text_metrics import caption_metrics
from pointalign.progress import say

RESULTS_FILE = "results.json"

Row = dict[str, Any]
Result = Mapping[str, Any]


def judge_question(
    benchmark: Benchmark,
    question: Question,
    answers: AnswersFile,
    generated: Mapping[str, Mapping[str, Any]],
    judge: Judge | None,
    seed: int,
    embedders: Sequence[str],
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[dict[str, Any], list[Row]]:
    """Score the answers to one question.

    Args:
        benchmark: what was asked about.
        question: what was asked.
        answers: by the model.
        generated: by object id, how each answer came about: its `tokens`, and whether it was `truncated`.
        judge: who scores them; None for captions, which have metrics.
        seed: of the classes that stand in for answers without one.
        embedders: that captions are held against their references with.
        advance: called with the number of answers done.

    Returns:
        The numbers of `summarize_verdicts` and of the answers as such, and one row per answer: what `verdict_rows` gives;
        `question`, `tokens`, `truncated`; `right`, whether it counts as right (None where it does not count); by the
        likelihood judge `log_likelihood` of the class that it chose, and `margin` of the true class over the best
        other, 0 without one; of captions `metrics` by name.

    Raises:
        PointAlignError: as the judge.
    """
    task = benchmark.task
    numbers: dict[str, Any] = {"prompt": question.text, "n": len(answers.results), "invalid": 0}
    if judge is None:
        rows = [_plain_row(answer) for answer in answers.results]
        advance(len(rows))
    else:
        verdicts = judge(task, answers.results, advance)
        numbers |= summarize_verdicts(task, answers.results, verdicts, seed)
        rows = verdict_rows(task, answers.results, verdicts, seed)
    for row in rows:
        made = generated[row["object_id"]]
        row |= {"question": question.key, "tokens": made["tokens"], "truncated": made["truncated"]}
        if task.kind != "captioning":
            row["right"] = _is_right(row)
        if isinstance(judge, LikelihoodJudge):
            row |= _likelihoods(task, row, judge.scores[row["object_id"]])
    if isinstance(judge, LikelihoodJudge):
        numbers["scored"] = f"{question.class_text or question.text} {CLASS_STEM} ..."
    if task.kind == "closed-set":
        classes = class_accuracies([row["label"] for row in rows], [row["right"] for row in rows])
        numbers |= {"mean_class_accuracy": mean_class_accuracy(classes), "classes": classes}
    if task.kind == "captioning":
        numbers["metrics"] = _add_metrics(rows, embedders)
    return {**numbers, **_answer_numbers(rows)}, rows


def _plain_row(answer: Answer) -> Row:
    return {"object_id": answer.object_id, "ground_truth": answer.ground_truth, "model_output": answer.model_output}


def _is_right(row: Row) -> bool | None:
    """Whether an answer counts as right: in the closed set a random class stands in for none; None: left out."""
    if "counted" in row:
        return row["counted"] == row["label"]
    return row["correct"] if row["valid"] else None


def _likelihoods(task: Task, row: Row, scores: Sequence[float]) -> dict[str, float]:
    true = task.labels.index(row["label"])
    others = [score for index, score in enumerate(scores) if index != true]
    return {"log_likelihood": max(scores), "margin": scores[true] - max(others, default=scores[true])}


def _add_metrics(rows: Sequence[Row], embedders: Sequence[str]) -> dict[str, Any]:
    """Hold captions against their references; each answer's own values go into its row."""
    references = [row["ground_truth"] for row in rows]
    found = caption_metrics([row["model_output"] for row in rows], references, embedders)["metrics"]
    for index, row in enumerate(rows):
        row["metrics"] = {name: metric["per_object"][index] for name, metric in found.items() if "absent" not in metric}
    return {name: {k: v for k, v in metric.items() if k != "per_object"} for name, metric in found.items()}


def _answer_numbers(rows: Sequence[Row]) -> dict[str, Any]:
    said = [row["model_output"] for row in rows]
    return {
        "distinct_answers": len(set(said)),
        "empty_answers": said.count(""),
        "truncated_answers": sum(row["truncated"] for row in rows),
        "mean_answer_tokens": float(np.mean([row["tokens"] for row in rows])),
    }


def join_questions(
    benchmark: Benchmark, questions: Mapping[str, Mapping[str, Any]], rows: Sequence[Row]
) -> dict[str, Any]:
    """A benchmark's numbers from those of its questions.

    With one question they are its numbers. With several, the accuracy is the mean over objects of the share of an object's
    answers that are right, and its interval a bootstrap over objects, since answers about one object go together.

    Args:
        benchmark: what was asked.
        questions: the numbers by the questions' keys.
        rows: of all answers.
    """
    if len(questions) == 1:
        [numbers] = questions.values()
        return {name: value for name, value in numbers.items() if name not in ("prompt", "scored", "classes")}
    shares = defaultdict(list)
    for row in rows:
        if row["right"] is not None:
            shares[row["object_id"]].append(float(row["right"]))
    means = [float(np.mean(values)) for values in shares.values()]
    joined = summarize(means) if means else {"mean": None, "n": 0, "interval": None}
    first = next(iter(questions.values()))
    return {
        "accuracy": joined["mean"],
        "n": joined["n"],
        "interval": joined["interval"],
        "majority_rate": first["majority_rate"],
        "invalid": sum(numbers["invalid"] for numbers in questions.values()),
    }


def read_results(path: str | Path) -> dict[str, Any]:
    """Read a benchmark's result.

    Args:
        path: `results.json`, or the folder that holds it; of a folder that holds one further down, that one.

    Raises:
        DataError: when there is none, there are several, or it is not a result.
    """
    file = Path(path)
    if file.is_dir():
        found = sorted(file.rglob(RESULTS_FILE))
        if len(found) != 1:
            listed = ", ".join(str(one.parent) for one in found[:4])
            told = (
                f"{len(found)} results ({listed}); name one of them" if found else f"no {RESULTS_FILE}; evaluate first"
            )
            raise DataError(f"{file} holds {told}")
        file = found[0]
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not {"benchmark", "judge", "objects", "questions"} <= values.keys():
            raise ValueError("it lacks benchmark, judge, questions or objects")
    except OSError as error:
        raise DataError(
            f"cannot read {file}: {error.strerror}; give a results.json of `pointalign evaluate`"
        ) from error
    except (ValueError, AttributeError) as error:
        raise DataError(f"{file} is not a result of `pointalign evaluate` ({error}); give another file") from error
    return {**values, "file": str(file)}


def with_earlier(folder: Path, results: Sequence[Result], hashes: Collection[str] = ()) -> list[Result]:
    """An evaluation's results and those that earlier runs of the same model left in its folder, by other judges for instance.

    Args:
        folder: of the evaluation.
        results: of this run, each with the file that holds it (`results`).
        hashes: of the model, where answers were written that nobody judged.

    Returns:
        All of them with their file, ordered by it.
    """
    known = {str(result["results"]): result for result in results}
    hashes = {*hashes, *(model_hash(result["provenance"]) for result in results)}
    for file in sorted(folder.rglob(RESULTS_FILE)):
        if str(file) not in known:
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
                # A comparison, which a user may put here too, has no model of its own.
                same = "provenance" in found and model_hash(found["provenance"]) in hashes
            except (OSError, ValueError, TypeError, LookupError, AttributeError, StopIteration):
                say(f"{file} is not a result of `pointalign evaluate`; the overview goes without it")
                continue
            if same:
                known[str(file)] = {**found, "results": str(file)}
    return [known[name] for name in sorted(known)]


def model_hash(told: Mapping[str, Any]) -> str:
    """Whose answers a result is about, from what the result came from (`provenance`)."""
    return told["model"] if "model" in told else next(iter(told["answers"].values()))["model"]
