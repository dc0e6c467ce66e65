"""Prompts, their placeholders, and how replies are read."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pointalign.errors import ConfigError, DataError
from pointalign.evaluation.judging import load_task
from pointalign.evaluation.judging.prompts import KINDS, admissible_replies, load_prompts, read_reply
from pointalign.evaluation.records import Answer, Task

CHAIR = Answer("a", 8, "a seat", "chair")
CAPTION = Answer("a", "A red chair.", "a red seat")
UNREADABLE: dict[str, Any] = {"valid": False, "correct": None, "predicted": None}

CLASS_REPLIES: dict[str, dict[str, Any]] = {
    "8#chair#it says seat": {"valid": True, "correct": True, "predicted": "chair"},
    " 8 # Chair # x\nmore": {"valid": True, "correct": True, "predicted": "chair"},
    "8#chair": {"valid": True, "correct": True, "predicted": "chair"},
    "8#'chair'#x": {"valid": True, "correct": True, "predicted": "chair"},
    "33#table#x": {"valid": True, "correct": False, "predicted": "table"},
    "23#night_stand#x": {"valid": True, "correct": False, "predicted": "night stand"},
    "-1#none#nothing fits": {"valid": True, "correct": False, "predicted": None},
    "-1#NA#nothing fits": {"valid": True, "correct": False, "predicted": None},
    "<think>8 or 33? 33#table#no\n</think>\n\n8#chair#x": {"valid": True, "correct": True, "predicted": "chair"},
    "8#table#x": UNREADABLE,
    "40#chair#x": UNREADABLE,
    "-2#chair#x": UNREADABLE,
    "8": UNREADABLE,
    "chair": UNREADABLE,
    "chair#8#x": UNREADABLE,
    "The answer is 8#chair#x": UNREADABLE,
    "8##x": UNREADABLE,
    "": UNREADABLE,
    "<think>8#chair#x": UNREADABLE,
}
SAME_REPLIES: dict[str, bool | None] = {
    "T": True,
    "F": False,
    "T#both are chairs": True,
    " F # a vase": False,
    "T.": True,
    "F\nbecause": False,
    "<think>F</think>T#x": True,
    "F, or is it?\n</think>\n\nT#x": True,
    "True": None,
    "t": None,
    "T or F": None,
    "The same": None,
    "Yes": None,
    "": None,
}
SCORE_REPLIES: dict[str, float | None] = {
    "50": 50,
    "0#nothing": 0,
    "100#all": 100,
    " 66.5 # x": 66.5,
    "85%": 85,
    "85 / 100#x": 85,
    "<think>10</think>20#x": 20,
    "101#x": None,
    "-5": None,
    "3 of the 5 aspects": None,
    "Score: 50": None,
    "fifty": None,
    "": None,
}


def test_no_end_of_digits_is_no_index() -> None:
    assert not read_reply(load_task("closed-set"), CHAIR, "9" * 5000 + "#chair").valid


@pytest.mark.parametrize("text", CLASS_REPLIES)
def test_class_replies(text: str) -> None:
    verdict = read_reply(load_task("closed-set"), CHAIR, text)
    assert {name: getattr(verdict, name) for name in UNREADABLE} == CLASS_REPLIES[text]
    assert verdict.reply == text


@pytest.mark.parametrize("text", SAME_REPLIES)
def test_replies_to_same_or_not(text: str) -> None:
    verdict = read_reply(Task("open-vocabulary"), CAPTION, text)
    assert (verdict.correct, verdict.valid) == (SAME_REPLIES[text], SAME_REPLIES[text] is not None)


@pytest.mark.parametrize("text", SCORE_REPLIES)
def test_score_replies(text: str) -> None:
    verdict = read_reply(Task("captioning"), CAPTION, text)
    assert (verdict.score, verdict.valid) == (SCORE_REPLIES[text], SCORE_REPLIES[text] is not None)


def test_our_prompts_hold_answer_and_reference_or_classes() -> None:
    prompts = load_prompts()
    closed = prompts.fill(load_task("closed-set"), CHAIR)
    assert "Answer: a seat\n" in closed
    assert "\n0: airplane\n1: bathtub\n" in closed
    assert "\n39: xbox\n" in closed
    for kind in ("open-vocabulary", "captioning"):
        filled = prompts.fill(Task(kind), CAPTION)
        assert "A red chair." in filled
        assert "a red seat" in filled
    for kind in KINDS:
        assert "{" not in prompts.fill(load_task(kind), CHAIR if kind == "closed-set" else CAPTION)


def test_an_answer_cannot_fill_in_placeholders() -> None:
    answer = Answer("a", "A {answer}.", "a {reference} {labels} {other}")
    filled = load_prompts().fill(Task("captioning"), answer)
    assert "A {answer}." in filled
    assert "a {reference} {labels} {other}" in filled


def test_own_prompts(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("Is {answer} {reference}? {json: {}}\n")
    prompts = load_prompts(str(file))
    assert prompts.fill(Task("captioning"), CAPTION) == "Is a red seat A red chair.? {json: {}}"
    assert prompts.fingerprint != load_prompts().fingerprint
    file.write_text("Which of 0 airplane, 1 bathtub ... is {answer}?")
    assert load_prompts(str(file)).fill(load_task("closed-set"), CHAIR).endswith("is a seat?")
    with pytest.raises(ConfigError, match=r"the captioning prompt of .*mine.txt lacks \{reference\}; write it where"):
        load_prompts(str(file)).fill(Task("captioning"), CAPTION)


def test_a_folder_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "captioning.txt").write_text("{answer} {reference}")
    prompts = load_prompts(str(tmp_path))
    assert prompts.fill(Task("captioning"), CAPTION) == "a red seat A red chair."
    with pytest.raises(ConfigError, match=r"has no open-vocabulary.txt; add that prompt"):
        prompts.fill(Task("open-vocabulary"), CAPTION)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no prompt; name one of them closed-set.txt or open-vocabulary.txt"):
        load_prompts(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="cannot read the prompt"):
        load_prompts(str(tmp_path / "nothing.txt"))
    (tmp_path / "latin.txt").write_bytes(b"\xe9 {answer}")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_prompts(str(tmp_path / "latin.txt"))


def test_a_class_is_no_description() -> None:
    with pytest.raises(
        DataError, match="the ground_truth of a is 8, not a description; for a file of classes use --task"
    ):
        load_prompts().fill(Task("captioning"), CHAIR)


@pytest.mark.parametrize("label", ["misc.", "c#", "cafe\u0301", "'quoted'", "a#b"])
def test_every_admissible_reply_can_be_read(label: str) -> None:
    task, answer = Task("closed-set", ("chair", label)), replace(CHAIR, ground_truth=0)
    for reply in admissible_replies(task):
        for text in (reply, f"{reply}#because", f"{reply}\nbecause", unicodedata.normalize("NFC", reply)):
            verdict = read_reply(task, answer, text)
            index = int(reply.partition("#")[0])
            assert (verdict.valid, verdict.predicted) == (True, None if index < 0 else task.labels[index]), text
    assert not read_reply(task, answer, "1#chair").valid
