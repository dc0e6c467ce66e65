"""Turns about one cloud: what is taken over from earlier turns changes nothing but the time they take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralConfig

from pointalign.answering.answerer import Answerer, about_cloud
from pointalign.answering.conversation import Conversation, Turn
from pointalign.errors import DataError
from pointalign.models.pointalign import PointAlignConfig, PointAlignForConditionalGeneration
from pointalign.options import Decoding

SHORT = Decoding(max_new_tokens=12)
QUESTIONS = ("What is this?", "And its colour?", "Why do you think so? Tell me in full.", "What is this?")


@pytest.fixture
def cloud() -> np.ndarray:
    return np.random.default_rng(2).random((60, 6))


@pytest.fixture
def talk(model: Any, processor: Any, cloud: np.ndarray) -> Conversation:
    return Conversation(Answerer(model, processor), cloud, SHORT)


def recomputed(talk: Conversation, cloud: np.ndarray, earlier: list[Turn], question: str) -> str:
    """The same answer from the whole conversation at once, without any cache from before."""
    messages: list[Any] = []
    for turn in earlier:
        messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    messages.append({"role": "user", "content": question})
    messages[0] = about_cloud(messages[0]["content"])
    return talk.answerer.reply([messages], [talk.answerer.prepare(cloud)], talk.decoding)[0].text


def test_every_turn_answers_as_if_all_were_computed_again(talk: Conversation, cloud: np.ndarray) -> None:
    answers = []
    for number, question in enumerate(QUESTIONS):
        said = "".join(talk.ask(question))
        assert said == recomputed(talk, cloud, talk.turns[:-1], question)
        assert talk.turns[-1] == Turn(question, said)
        answers.append(said)
        prompt = len(talk.answerer.processor.encode([about_cloud(question)], add_generation_prompt=True)["input_ids"])
        # A later turn computes no cloud and no system prompt again, only itself and what an answer spells differently.
        assert talk.computed <= prompt + 30 if number else talk.computed == prompt
    assert len(set(answers)) > 2
    assert answers[0] != answers[3]  # the same question, in the light of what was said


def test_the_cache_gives_the_logits_of_a_full_computation(talk: Conversation, cloud: np.ndarray) -> None:
    for question in QUESTIONS[:3]:
        list(talk.ask(question))
    assert talk._cache is not None
    ids, cache = talk._cache
    model = talk.answerer.model
    with torch.inference_mode():
        full = model(input_ids=torch.tensor([ids]), point_tokens=talk._point_tokens, use_cache=True)
    assert cache.get_seq_length() == len(ids)
    for kept, computed in zip(cache.layers, full.past_key_values.layers, strict=True):
        torch.testing.assert_close(kept.keys, computed.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(kept.values, computed.values, rtol=1e-4, atol=1e-5)


def test_a_window_that_cannot_go_back_is_computed_again(model: Any, processor: Any, cloud: np.ndarray) -> None:
    window = MistralConfig(**{**model.config.text_config.to_dict(), "model_type": "mistral", "sliding_window": 16})
    config = PointAlignConfig(
        point_encoder_config=model.config.point_encoder_config,
        connector_config=model.config.connector_config,
        text_config=window.to_dict(),
        point_token_id=model.config.point_token_id,
    )
    mistral = PointAlignForConditionalGeneration(config)
    mistral.load_state_dict(model.state_dict())
    talk = Conversation(Answerer(mistral.eval(), processor), cloud, SHORT)
    for question in QUESTIONS[:3]:
        assert "".join(talk.ask(question)) == recomputed(talk, cloud, talk.turns[:-1], question)
        assert talk._cache is None


def test_the_oldest_turns_make_room(talk: Conversation, cloud: np.ndarray) -> None:
    for letter in "abc":
        list(talk.ask(letter * 110))
        assert talk.forgotten == 0
    said = "".join(talk.ask("d" * 110))
    assert talk.forgotten == 1
    assert [turn.question[0] for turn in talk.turns] == ["b", "c", "d"]
    assert said == recomputed(talk, cloud, talk.turns[:-1], "d" * 110)
    list(talk.ask("short"))
    assert talk.forgotten == 0


def test_a_question_too_long_by_itself_changes_nothing(talk: Conversation, cloud: np.ndarray) -> None:
    list(talk.ask("What is this?"))
    before = list(talk.turns)
    with pytest.raises(DataError, match="shorten the question"):
        list(talk.ask("x" * 500))
    assert talk.turns == before
    assert "".join(talk.ask("And now?")) == recomputed(talk, cloud, before, "And now?")


def test_an_answer_that_was_stopped_is_remembered_as_far_as_it_came(talk: Conversation, cloud: np.ndarray) -> None:
    talk.decoding = Decoding(max_new_tokens=200)
    pieces = talk.ask("What is this?")
    first = next(pieces)
    pieces.close()
    assert talk.turns[0].answer.startswith(first)
    talk.decoding = SHORT
    assert "".join(talk.ask("Go on.")) == recomputed(talk, cloud, talk.turns[:1], "Go on.")


def test_reset_forgets_all_but_the_cloud(talk: Conversation) -> None:
    first = "".join(talk.ask("What is this?"))
    list(talk.ask("And its colour?"))
    talk.reset()
    assert talk.turns == []
    assert "".join(talk.ask("What is this?")) == first


def test_reset_forgets_the_answer_that_is_being_written(talk: Conversation) -> None:
    talk.decoding = Decoding(max_new_tokens=200)
    pieces = talk.ask("What is this?")
    next(pieces)
    talk.reset()
    pieces.close()
    assert talk.turns == []
    assert talk._cache is None


def test_a_bad_cloud_is_refused(model: Any, processor: Any) -> None:
    with pytest.raises(DataError, match="the cloud has 2 points"):
        Conversation(Answerer(model, processor), np.zeros((2, 6)))
