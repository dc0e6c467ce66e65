"""Evaluating one model: its answers to every benchmark first, then who judges them, then the reports."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from pointalign.answering.loading import quiet_transformers
from pointalign.errors import PointAlignError
from pointalign.evaluation.asking import EvaluationSettings, RawAnswers, load_model
from pointalign.evaluation.baseline_answers import BaselineAnswers, baseline_name, check_baseline
from pointalign.evaluation.benchmarks import Question
from pointalign.evaluation.judges import LikelihoodJudge
from pointalign.evaluation.judging import build_judge
from pointalign.evaluation.judging.prompted import PromptedJudge
from pointalign.evaluation.plan import METRICS, NONE, RETENTION, Plan, make_plan
from pointalign.evaluation.processes import Processes, joined_processes
from pointalign.evaluation.provenance import environment
from pointalign.evaluation.records import Judge
from pointalign.evaluation.report import write_overview, write_report
from pointalign.evaluation.results import RESULTS_FILE, join_questions, judge_question, model_hash, with_earlier
from pointalign.evaluation.retention_run import evaluate_retention
from pointalign.judge_settings import JudgeName
from pointalign.progress import progress, say
from pointalign.storage import write_text

CLASSIFICATION = ("accuracy", "n", "interval", "majority_rate", "invalid")
NOT_TOLD = ("labels", "objects", "provenance", "questions", "replies")


def evaluate(model: str | Path, out: str | Path, settings: EvaluationSettings | None = None) -> dict[str, Any]:
    """Evaluate a model; stopped at any time and run again with the same settings, it goes on where it was.

    Args:
        model: folder or Hub id; or `baseline:NAME`, see `baselines.BASELINES`.
        out: folder. For each benchmark it holds the raw answers, `answers-QUESTION.json` in the field's format, and in a
            folder per judge `results.json` and `report.md`; `report.md` sums up.
        settings: what is evaluated, and how; the household objects, and all defaults, when None.

    Returns:
        `model`, `benchmarks` (the numbers by name), `skipped` (why, by name), `report`; with one classification among the
        benchmarks also its `CLASSIFICATION` numbers. Empty in all processes but the first.

    Raises:
        PointAlignError: for anything expected that goes wrong.
    """
    folder, settings = Path(out), settings or EvaluationSettings()
    plan = make_plan(settings.benchmarks, settings.judge, settings.sources, settings.limit)
    check_baseline(model, plan, settings)
    # A judge that cannot be had is told of before hours of answering.
    needed = {planned.judge for planned in plan.planned} & set(get_args(JudgeName))
    judges = {name: build_judge(name, **settings.judge_options) for name in needed}  # pyright: ignore[reportArgumentType]
    with quiet_transformers(), joined_processes() as processes:
        results, hashes = (
            _answer_and_judge(model, folder, plan, settings, judges, processes) if plan.planned else ({}, set())
        )
        if not processes.is_first:
            return {}
    if plan.retention:
        try:
            results[RETENTION] = evaluate_retention(model, folder / RETENTION, settings.base_language_model)
        except PointAlignError as error:
            if not plan.lenient:
                raise
            plan.skipped[RETENTION] = str(error)
    for name, reason in plan.skipped.items():
        say(f"skipped {name}: {reason}")
    shown = with_earlier(folder, list(results.values()), hashes)
    write_overview(folder / "report.md", str(model), shown, plan.skipped)
    told = {name: told_numbers(result) for name, result in results.items()}
    classified = [numbers for numbers in told.values() if "accuracy" in numbers]
    return {
        **({name: classified[0][name] for name in CLASSIFICATION} if len(classified) == 1 else {}),
        "model": str(model),
        "benchmarks": told,
        "skipped": plan.skipped,
        "report": str(folder / "report.md"),
    }


def default_out(model: str) -> Path:
    """Where an evaluation goes when nobody says: beside a model's folder, else under runs by the Hub id."""
    folder = Path(model)
    return (
        folder.parent / "evaluation" if folder.is_dir() else Path("runs") / "evaluation" / re.sub("[/:]", "--", model)
    )


def told_numbers(result: dict[str, Any]) -> dict[str, Any]:
    """A result without its rows and what it came from."""
    kept = {name: value for name, value in result.items() if name not in NOT_TOLD}
    questions = result.get("questions", {})
    if len(questions) < 2:
        return kept
    return {**kept, "questions": {key: {k: v for k, v in q.items() if k != "classes"} for key, q in questions.items()}}


def _answer_and_judge(
    name: str | Path,
    folder: Path,
    plan: Plan,
    settings: EvaluationSettings,
    judges: Mapping[str, Judge],
    processes: Processes,
) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """The results, and the hash of the model that answered."""
    raw, device = _answers(name, folder, plan, settings, processes)
    processes.wait()
    if not processes.is_first:
        return {}, set()
    machine = environment(device, processes.world)
    results = {}
    for name, answers in raw.items():
        result = judge_all(answers, judges, machine)
        if result is not None:
            results[name] = result
    return results, {model_hash(answers.provenance()) for answers in raw.values()}


def _answers(
    name: str | Path, folder: Path, plan: Plan, settings: EvaluationSettings, processes: Processes
) -> tuple[dict[str, RawAnswers], torch.device]:
    """What a model or baseline says in each benchmark, and where it computed; the model itself is gone: a judge may need
    the memory."""
    if (baseline := baseline_name(name)) is not None:
        raw = [BaselineAnswers(baseline, planned, folder, settings, processes) for planned in plan.planned]
        loaded, device = None, torch.device("cpu")
    else:
        loaded = load_model(name, settings.as_released)
        raw = [RawAnswers(loaded, planned, folder, settings, processes) for planned in plan.planned]
        device = loaded.device
    for answers in raw:
        answers.fill(loaded)
    return {answers.benchmark.name: answers for answers in raw}, device


def judge_all(raw: RawAnswers, judges: Mapping[str, Judge], machine: dict[str, Any]) -> dict[str, Any] | None:
    """Write a benchmark's answers files and, unless nobody is to judge, its result and report.

    Args:
        raw: the model's answers.
        judges: those that read answers, by the names that the plan gives them.
        machine: what they were made on.

    Returns:
        What `results.json` holds, and where it lies; None when nobody judges.

    Raises:
        PointAlignError: as the judge.
    """
    benchmark, collected = raw.benchmark, raw.collect()
    if raw.judge_name == NONE:
        say(f"{benchmark.name}: answers written to {raw.folder}; judge them with `pointalign judge`")
        return None
    numbers, rows, judge = {}, [], None
    embedders = raw.settings.embedders or benchmark.embedders
    for question in benchmark.questions:
        judge = _choose_judge(raw, judges, question)
        told = f"{benchmark.name}: {'judging by ' + judge.name if judge else 'measuring'} ({question.key})"
        with progress(told, len(benchmark.items)) as advance:
            made, answers = raw.answers[question.key].rows(), collected[question.key]
            asked, more = judge_question(
                benchmark, question, answers, made, judge, raw.settings.seed, embedders, advance
            )
        numbers[question.key] = {**asked, "judge_usage": judge.usage} if isinstance(judge, PromptedJudge) else asked
        rows += more
    told_judge = judge.details() if isinstance(judge, PromptedJudge) else None
    result = {
        "benchmark": benchmark.name,
        "task": benchmark.task.kind,
        "judge": judge.name if judge else None,
        "model": raw.model_name,
        **({"labels": list(benchmark.task.labels)} if benchmark.task.labels else {}),
        **join_questions(benchmark, numbers, rows),
        "questions": numbers,
        "provenance": {**raw.provenance(), "judge": told_judge, "environment": machine},
        "objects": rows,
    }
    target = raw.folder / judge_folder(judge.name if judge else METRICS)
    write_text(target / RESULTS_FILE, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write_report(target, result, benchmark)
    return {**result, "results": str(target / RESULTS_FILE)}


def _choose_judge(raw: RawAnswers, judges: Mapping[str, Judge], question: Question) -> Judge | None:
    if raw.judge_name == LikelihoodJudge.name:
        rows = raw.scores[question.key].rows()
        return LikelihoodJudge({object_id: row["log_likelihoods"] for object_id, row in rows.items()})
    return judges.get(raw.judge_name)


def judge_folder(name: str) -> str:
    """The name of a judge as that of a folder."""
    return re.sub(r"[^\w.-]+", "-", name)
