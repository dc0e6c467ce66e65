"""What `pointalign judge` does: judge a file of answers, or show what a judge would be asked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pointalign.errors import ConfigError
from pointalign.evaluation.judging.build import build_judge
from pointalign.evaluation.judging.label_sets import load_task
from pointalign.evaluation.judging.prompted import PromptedJudge
from pointalign.evaluation.judging.scoring import judge_answers
from pointalign.evaluation.records import Judge, Task, TaskKind, read_answers
from pointalign.judge_settings import JudgeName
from pointalign.progress import say


def judge_file(
    answers: Path,
    task: TaskKind,
    judge: JudgeName,
    labels: str,
    out: Path | None,
    seed: int,
    dry_run: bool,
    **options: Any,
) -> dict[str, Any]:
    """Judge a file of answers and tell the result in a line.

    Args:
        answers: in the field's format.
        task: what is judged.
        judge: who judges.
        labels: the closed set, see `load_task`.
        out: JSON file to write; beside the answers, named by task, classes and judge, when None.
        seed: of the random classes.
        dry_run: show the prompts and how many there are, and ask nothing.
        options: of `build_judge`.

    Returns:
        What `judge_answers` or `preview` gives.

    Raises:
        PointAlignError: as `judge_answers`.
    """
    built, what = build_judge(judge, **options), load_task(task, labels)
    if dry_run:
        return preview(answers, what, built)
    classes = f".{_slug(Path(labels).stem)}" if task == "closed-set" else ""
    target = out or answers.with_name(f"{answers.stem}.{task}{classes}.{_slug(built.name)}.json")
    summary = judge_answers(answers, what, built, target, seed)
    say(tell(summary))
    return summary


def preview(answers: Path, task: Task, judge: Judge) -> dict[str, Any]:
    """Show the first prompt, and count the prompts, those whose reply is kept, and the letters still to be sent.

    Raises:
        ConfigError: for a judge that is not asked in words.
        DataError: when the answers do not suit the task.
    """
    if not isinstance(judge, PromptedJudge):
        raise ConfigError(f"the {judge.name} judge has no prompts to show; leave --dry-run out, it costs nothing")
    prompts, known = judge.prepare(task, read_answers(answers).results)
    distinct = list(dict.fromkeys(prompt for prompt in prompts if prompt is not None))
    waiting = [prompt for prompt in distinct if prompt not in known]
    for prompt in distinct[:1]:
        say(f"{prompt}\n")
    return {
        "judge": judge.name,
        "judge_details": judge.details(),
        "answers": len(prompts),
        "empty_answers": prompts.count(None),
        "prompts": len(distinct),
        "replies_kept": len(known),
        "to_ask": len(waiting),
        "letters_to_ask": sum(map(len, waiting)),
    }


def tell(summary: dict[str, Any]) -> str:
    """The result in one line, always with the number of answers that have no valid verdict."""
    invalid = summary["invalid"]
    if summary["interval"] is None:
        return f"{summary['judge']}: none of {invalid} replies can be read"
    captions = summary["task"] == "captioning"
    value, factor, unit = (summary["score"], 1, "") if captions else (summary["accuracy"], 100, " %")
    low, high = (factor * end for end in summary["interval"])
    line = f"{summary['judge']}: {factor * value:.1f}{unit} ({low:.1f} to {high:.1f}), n = {summary['n']}, {invalid} "
    if summary["task"] != "closed-set":
        return line + "replies cannot be read and are left out"
    without = 100 * summary["accuracy_without_random"]
    return line + f"without a class (a random one counts; {without:.1f} % without it)"


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)
