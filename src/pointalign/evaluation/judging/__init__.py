"""Judging answers: one constructor for every judge, one function that scores a file of answers."""

from pointalign.evaluation.judging.build import build_judge
from pointalign.evaluation.judging.label_sets import load_task
from pointalign.evaluation.judging.scoring import judge_answers

__all__ = ["build_judge", "judge_answers", "load_task"]
