"""Answers whose rows make room for one another against `generate`, one prompt at a time."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig

from pointalign.answering import refill
from pointalign.answering.answerer import Answerer, about_cloud
from pointalign.answering.refill import can_refill, refilled_ids

LONGEST = 12
GREEDY = {"do_sample": False, "max_new_tokens": LONGEST}
TALKS = [
    ([about_cloud("What is this?")], 1),
    ([about_cloud("Colour?"), {"role": "assistant", "content": "red"}, {"role": "user", "content": "Sure?"}], 1),
    ([{"role": "user", "content": "No cloud here."}], 0),
    ([about_cloud("x" * 70)], 1),
    ([about_cloud("And these two?"), about_cloud("")], 2),
    ([about_cloud("Why?")], 1),
    ([about_cloud("Who?")], 1),
]


@pytest.fixture
def answerer(build_model: Callable[..., Any], processor: Any) -> Answerer:
    model = build_model()
    model.generation_config.suppress_tokens = [259]
    return Answerer(model, processor)


@pytest.fixture
def shown(clouds: Tensor) -> list[Tensor]:
    return [*clouds, *clouds.flip(1)][: sum(count for _, count in TALKS)]


def one_by_one(answerer: Answerer, clouds: list[Tensor]) -> list[list[int]]:
    """Each prompt's answer by transformers' own loop, without padding and without an end."""
    found, left = [], list(clouds)
    for talk, count in TALKS:
        inputs = answerer.inputs([talk], [left.pop(0) for _ in range(count)])
        ids = answerer.model.generate(**inputs, **GREEDY, eos_token_id=-1)
        found.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    return found


def cut(answers: list[list[int]], end: int) -> list[list[int]]:
    """The answers up to an end symbol."""
    return [answer[: answer.index(end) + 1] if end in answer else answer for answer in answers]


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 20])
def test_each_answer_is_the_one_it_gets_alone(rows: int, answerer: Answerer, shown: list[Tensor]) -> None:
    inputs = answerer.inputs([talk for talk, _ in TALKS], shown)
    whole = one_by_one(answerer, shown)
    # The token that makes the answers' lengths differ most is taken for the end symbol.
    tokens = {token for answer in whole for token in answer}
    end = max(sorted(tokens), key=lambda token: len({len(answer) for answer in cut(whole, token)}))
    expected = cut(whole, end)
    assert refilled_ids(answerer.model, inputs, rows, LONGEST, {end}) == expected
    assert len({len(answer) for answer in expected}) > 2


def test_rows_that_have_ended_stay_within_the_context(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    """`check_room` saw to it that the longest prompt and the longest answer fit; no position may lie beyond."""
    end, going_on, lengths, used = 200, refill._next_tokens, random.Random(0), []

    def scheduled(model: Any, cache: Any, mask: Tensor, **inputs: Tensor) -> Tensor:
        """Answers of 1 to 12 tokens: ids that count up to the end symbol."""
        used.append(int(mask.sum(dim=1).max()))
        first = going_on(model, cache, mask, **inputs)
        if "input_ids" in inputs:
            return (inputs["input_ids"] + 1).clamp(max=end + 1)
        return torch.tensor([[end - lengths.choice([0, 3, 9, 11, 11, 11])] for _ in first])

    monkeypatch.setattr(refill, "_next_tokens", scheduled)
    inputs = answerer.inputs([[{"role": "user", "content": f"{number:03}"}] for number in range(60)], [])
    answers = refilled_ids(answerer.model, inputs, 16, LONGEST, {end})
    assert {len(answer) for answer in answers} == {1, 4, 10, 12}
    assert all(answer[-1] == end for answer in answers)
    assert max(used) <= inputs["input_ids"].shape[1] + LONGEST


def test_what_is_common_is_computed_once_and_rows_stay_full(
    answerer: Answerer, clouds: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = answerer.model
    inputs = answerer.inputs([[about_cloud(f"Question {n}?")] for n in range(4)], list(clouds))
    fed: list[tuple[int, int]] = []
    forward = model.language_model.forward

    def watched(*arguments: Any, **given: Any) -> Any:
        fed.append(tuple(given["inputs_embeds"].shape[:2]))
        return forward(*arguments, **given)

    assert can_refill(model, GREEDY)
    monkeypatch.setattr(model.language_model, "forward", watched)
    refilled_ids(model, inputs, 2, LONGEST, set())
    before_cloud = int((inputs["input_ids"][0] == 259).int().argmax())
    assert fed[0] == (1, before_cloud)
    assert fed[1] == (2, inputs["input_ids"].shape[1] - before_cloud)
    assert sum(rows for rows, length in fed if length == 1) == 4 * (LONGEST - 1)


def test_other_ways_of_generating_are_left_to_transformers(answerer: Answerer) -> None:
    model = answerer.model
    assert can_refill(model, GREEDY)
    assert not can_refill(model, {**GREEDY, "num_beams": 2})
    assert not can_refill(model, {**GREEDY, "do_sample": True})
    assert not can_refill(model, {**GREEDY, "eos_token_id": -1})
    model.generation_config.repetition_penalty = 1.2
    assert not can_refill(model, GREEDY)
    model.generation_config.repetition_penalty = None
    model.config.text_config.sliding_window = 8
    model.config.text_config.layer_types = ["sliding_attention"] * 4
    assert not can_refill(model, GREEDY)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_cache_of_fixed_size_gives_the_same_answers(compiled: bool, answerer: Answerer, shown: list[Tensor]) -> None:
    """transformers compiles the step on a GPU; here it is made to on the CPU, with a compiler that only traces."""
    inputs = answerer.inputs([talk for talk, _ in TALKS], shown)
    given = {**GREEDY, "eos_token_id": -1}
    plain = answerer.model.generate(**inputs, **given)
    if compiled:
        given["compile_config"] = CompileConfig(backend="eager", mode=None, fullgraph=True)
        given["compile_config"]._compile_all_devices = True
    fixed = answerer.model.generate(**inputs, **given, cache_implementation="static")
    assert fixed.tolist() == plain.tolist()
