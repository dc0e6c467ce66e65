"""A conversation of several turns about one cloud, whose tokens and earlier turns are computed once."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from pointalign.answering.answerer import Answerer, about_cloud
from pointalign.answering.generation import check_room, memory_told
from pointalign.answering.streaming import Stream
from pointalign.errors import DataError
from pointalign.options import GREEDY, Decoding


class Turn(NamedTuple):
    """A question and what was answered."""

    question: str
    answer: str


class Conversation:
    """Questions about one cloud, each answered in the light of those before.

    The keys and values of what the next prompt has in common with what was computed before are taken over, so that a turn
    costs its own tokens only. Where turns do not fit into the language model's context any more, the oldest are forgotten.

    Args:
        answerer: the model.
        cloud: as `Answerer.prepare` takes it.
        decoding: how answers are written.

    Attributes:
        turns: what was said and is still remembered.
        forgotten: how many turns were forgotten to make room for the last question.
        computed: how many tokens of the last prompt were computed anew.

    Raises:
        DataError: for a bad cloud.
    """

    def __init__(self, answerer: Answerer, cloud: Any, decoding: Decoding = GREEDY) -> None:
        self.answerer = answerer
        self.decoding = decoding
        self.turns: list[Turn] = []
        self.forgotten = 0
        self.computed = 0
        self._number = 0
        self._cache: tuple[list[int], Any] | None = None
        points = answerer.prepare(cloud)[None].to(answerer.device)
        with torch.inference_mode(), memory_told(1):
            tokens = answerer.model.encode_points(points).point_tokens
        self._point_tokens: Tensor = tokens.clone()

    def reset(self) -> None:
        """Forget what was said, and what is being answered when that ends; the cloud stays."""
        self.turns, self.forgotten, self._cache = [], 0, None

    def release(self) -> None:
        """Give back the memory of what was computed; the next question computes it again."""
        self._cache = None

    def ask(self, question: str) -> Generator[str, None, None]:
        """Ask something; the answer comes piece by piece.

        Closing the iterator stops the answer, and what was said of it by then is remembered.

        Raises:
            DataError: when the question is too long even without earlier turns; the conversation is then as it was.
        """
        turns, ids = self._remembered(question)
        self.forgotten, self.turns = len(self.turns) - len(turns), turns
        given = self._taken_over(ids)
        self.computed = len(ids) - (given["past_key_values"].get_seq_length() if given else 0)
        inputs = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            "point_tokens": self._point_tokens,
        }
        stream = Stream(
            self.answerer.model,
            self.answerer.processor,
            inputs,
            self.decoding,
            self._number,
            {"use_cache": True, **given},
        )
        self._number += 1
        pieces = stream.__iter__()
        try:
            yield from pieces
        finally:
            pieces.close()
            if stream.output is not None:
                turns.append(Turn(question, stream.text))
                if self.turns is turns:  # else it was reset meanwhile
                    self._keep(stream.output)

    def _remembered(self, question: str) -> tuple[list[Turn], list[int]]:
        """The newest turns that fit into the context with the question, and the ids of the prompt."""
        for first in range(len(self.turns) + 1):
            turns = self.turns[first:]
            ids = self.answerer.processor.encode(_messages(turns, question), add_generation_prompt=True)["input_ids"]
            try:
                check_room(self.answerer.model, len(ids), self.decoding.max_new_tokens)
            except DataError:
                if first == len(self.turns):
                    raise
            else:
                return turns, ids
        raise AssertionError

    def _taken_over(self, ids: list[int]) -> dict[str, Any]:
        """The cache cut back to what the prompt has in common with it, as an argument of `generate`."""
        if self._cache is None:
            return {}
        (known, cache), self._cache = self._cache, None
        common = 0
        # At least one token of the prompt must be computed, for its logits.
        while common < min(len(known), len(ids) - 1) and known[common] == ids[common]:
            common += 1
        if common == 0:
            return {}
        if common < len(known):
            cache.crop(common - len(known))
        return {"past_key_values": cache}

    def _keep(self, output: Any) -> None:
        cache = output.past_key_values
        # Layers that keep a window or a running state cannot go back to an earlier token.
        if cache is not None and all(type(layer) is DynamicLayer for layer in cache.layers):
            self._cache = output.sequences[0].tolist()[: cache.get_seq_length()], cache


def _messages(turns: Sequence[Turn], question: str) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for asked, answer in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": question})
    messages[0] = about_cloud(messages[0]["content"])
    return messages
