"""From verdicts to numbers: what `pointalign judge` writes about one answers file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pointalign.errors import DataError
from pointalign.evaluation.judging.label_sets import reference_text, true_label
from pointalign.evaluation.judging.prompted import PromptedJudge
from pointalign.evaluation.metrics import majority_rate
from pointalign.evaluation.records import Answer, Judge, Task, TaskKind, Verdict, read_answers
from pointalign.evaluation.statistics import summarize, summarize_share
from pointalign.progress import progress, say
from pointalign.storage import write_text


def judge_answers(answers_file: str | Path, task: Task, judge: Judge, out: str | Path, seed: int = 0) -> dict[str, Any]:
    """Judge a file of answers, ours or a peer's, and write every verdict and the summary.

    Stopped in the middle and run again it gives the file of an unbroken run: language models' replies are kept.

    Args:
        answers_file: in the field's format.
        task: what is to be judged, see `load_task`.
        judge: see `build_judge`.
        out: JSON file to write: `summary`, and `verdicts`, one per answer.
        seed: of the random classes that stand in for answers without a class, see `random_label`.

    Returns:
        The summary: `task`, `judge`, `n`, `interval`, `invalid`, and for each task what `closed_set_summary`,
        `open_vocabulary_summary` or `captioning_summary` adds; for judges that are language models also `judge_details`,
        `usage` over all replies, and, not in the file, `asked`, the usage of the replies that were not kept before.

    Raises:
        DataError: when the file is not in the field's format, its truth does not suit the task, or `out` is the file itself.
        PointAlignError: when the judge cannot be reached or loaded, or does not suit the task.
    """
    path = Path(answers_file)
    if Path(out).resolve() == path.resolve():
        raise DataError(f"--out {out} is the answers file itself, which would be lost; name another")
    answers = read_answers(path)
    again = len(answers.results) - len({answer.object_id for answer in answers.results})
    if again:
        say(
            f"warning: {again} of {len(answers.results)} answers of {path} are about an object that has one; each counts"
        )
    # Before anything is asked, and perhaps paid for.
    for answer in answers.results:
        (true_label(task, answer) if task.kind == "closed-set" else reference_text(answer))
    with progress(f"judging {path.name} with {judge.name}", len(answers.results)) as advance:
        verdicts = judge(task, answers.results, advance)
    numbers = summarize_verdicts(task, answers.results, verdicts, seed)
    summary = {
        "answers": path.name,
        "answers_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "question": answers.prompt,
        "task": task.kind,
        "judge": judge.name,
        **numbers,
    }
    asked = {}
    if isinstance(judge, PromptedJudge):
        summary |= {"judge_details": judge.details(), "usage": judge.usage}
        asked = {"asked": judge.asked_usage}
    rows = verdict_rows(task, answers.results, verdicts, seed)
    write_text(Path(out), json.dumps({"summary": summary, "verdicts": rows}, indent=1) + "\n")
    return {**summary, **asked, "results": str(out)}


def random_label(labels: Sequence[str], object_id: str, seed: int) -> str:
    """The class that counts for an answer without one: random, but the same for an object and a seed in every run.

    Source: closed-set protocol of PointLLM (arXiv 2308.16911).
    """
    digest = hashlib.sha256(f"{seed} {object_id}".encode()).digest()
    return labels[int.from_bytes(digest[:8]) % len(labels)]


def counted_label(task: Task, verdict: Verdict, seed: int) -> str:
    """The class that counts in the accuracy: the judge's, or a random one."""
    return verdict.predicted or random_label(task.labels, verdict.object_id, seed)


def summarize_verdicts(task: Task, answers: Sequence[Answer], verdicts: Sequence[Verdict], seed: int) -> dict[str, Any]:
    """The numbers of a task; arguments as its own summary below."""
    return _SUMMARIES[task.kind](task, answers, verdicts, seed)


def closed_set_summary(task: Task, answers: Sequence[Answer], verdicts: Sequence[Verdict], seed: int) -> dict[str, Any]:
    """Accuracy by the field's protocol, in which a random class stands in for an answer without one, and without that.

    Returns:
        `accuracy`, `n`, Wilson `interval`; `accuracy_without_random` and `interval_without_random`, where answers without
        a class are wrong; `accuracy_of_valid`, where they are left out, None when none is valid; `majority_rate`;
        `invalid`, the number of answers without a class, `unreadable` of them because the judge's reply could not be read;
        `seed`.
    """
    truth = [true_label(task, answer) for answer in answers]
    pairs = list(zip(truth, verdicts, strict=True))
    counted = summarize_share([counted_label(task, verdict, seed) == label for label, verdict in pairs])
    without = summarize_share([verdict.predicted == label for label, verdict in pairs])
    valid = [verdict.predicted == label for label, verdict in pairs if verdict.predicted is not None]
    return {
        "accuracy": counted["mean"],
        "n": counted["n"],
        "interval": counted["interval"],
        "accuracy_without_random": without["mean"],
        "interval_without_random": without["interval"],
        "accuracy_of_valid": sum(valid) / len(valid) if valid else None,
        "majority_rate": majority_rate(truth),
        "invalid": len(verdicts) - len(valid),
        "unreadable": sum(not verdict.valid for verdict in verdicts),
        "seed": seed,
    }


def open_vocabulary_summary(
    task: Task, answers: Sequence[Answer], verdicts: Sequence[Verdict], seed: int
) -> dict[str, Any]:
    """Accuracy over the verdicts that can be read; the others are counted.

    Returns:
        `accuracy`, its `n` and Wilson `interval` (None when no verdict can be read), `majority_rate` None, for there are no
        classes, and `invalid`.
    """
    flags = [bool(verdict.correct) for verdict in verdicts if verdict.valid]
    share = summarize_share(flags) if flags else {"mean": None, "n": 0, "interval": None}
    return {
        "accuracy": share["mean"],
        "n": share["n"],
        "interval": share["interval"],
        "majority_rate": None,
        "invalid": len(verdicts) - len(flags),
    }


def captioning_summary(task: Task, answers: Sequence[Answer], verdicts: Sequence[Verdict], seed: int) -> dict[str, Any]:
    """Mean score, 0 to 100, over the verdicts that can be read; the others are counted.

    Returns:
        `score`, its `n` and bootstrap `interval` (None when no verdict can be read), and `invalid`.
    """
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    summary = summarize(scores) if scores else {"mean": None, "n": 0, "interval": None}
    return {
        "score": summary["mean"],
        "n": summary["n"],
        "interval": summary["interval"],
        "invalid": len(verdicts) - len(scores),
    }


_SUMMARIES: dict[TaskKind, Callable[[Task, Sequence[Answer], Sequence[Verdict], int], dict[str, Any]]] = {
    "closed-set": closed_set_summary,
    "open-vocabulary": open_vocabulary_summary,
    "captioning": captioning_summary,
}


def verdict_rows(task: Task, answers: Sequence[Answer], verdicts: Sequence[Verdict], seed: int) -> list[dict[str, Any]]:
    """One row per answer: truth, answer and verdict; in the closed set also the class that counts."""
    rows = []
    for answer, verdict in zip(answers, verdicts, strict=True):
        row = {"object_id": answer.object_id, "ground_truth": answer.ground_truth, "model_output": answer.model_output}
        if task.kind == "closed-set":
            row |= {"label": true_label(task, answer), "counted": counted_label(task, verdict, seed)}
        rows.append({**row, **asdict(verdict)})
    return rows
