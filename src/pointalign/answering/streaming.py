"""One answer piece by piece, as it is written."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from pointalign.answering.generation import chance, end_symbols, memory_told, told_ends
from pointalign.options import Decoding


class _Pieces(BaseStreamer):
    """Turns tokens into text that will not change any more; joined, the pieces are the answer without outer space.

    Args:
        tokenizer: the model's.
        ends: ids at which an answer ends, which are no part of it.

    The text is decoded as a whole each time, because a token alone may be half a letter.
    """

    def __init__(self, tokenizer: Any, ends: set[int]) -> None:
        self.tokenizer, self.ends = tokenizer, ends
        self.queue: SimpleQueue[str | BaseException | None] = SimpleQueue()
        self.ids: list[int] = []
        self.sent = ""
        self.prompt_came = False

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token at a time."""
        if not self.prompt_came:
            self.prompt_came = True
            return
        self.ids += [token for token in value.flatten().tolist() if token not in self.ends]
        text = self.text
        # The end of the text may be half a letter, or space that the answer is going to end with.
        if not text.endswith("\ufffd") and text.startswith(self.sent) and len(text) > len(self.sent):
            self.queue.put(text[len(self.sent) :])
            self.sent = text

    @property
    def text(self) -> str:
        """The whole answer so far, without outer space."""
        return self.tokenizer.decode(self.ids, skip_special_tokens=True).strip()

    def end(self) -> None:
        """Hand on what was held back."""
        text = self.text
        if text != self.sent and text.startswith(self.sent):
            self.queue.put(text[len(self.sent) :])


class _Stopped(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


class Stream:
    """An answer that is being written by a thread of its own, which ends when nobody reads any more.

    Iterate over it for the pieces; whoever stops early closes the iterator, and the thread stops at its next token.

    Args:
        model: a `PointAlignForConditionalGeneration` in evaluation mode.
        processor: its processor.
        inputs: of one prompt, as `Answerer.inputs` gives them.
        decoding: how the words are chosen.
        number: of the turn, for sampling.
        given: further arguments of `generate`, a key-value cache for instance.

    Attributes:
        text: the answer as far as it was written.
        output: what `generate` gave, with `sequences` and `past_key_values`, once the iterator has ended or was closed.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        inputs: Mapping[str, Tensor],
        decoding: Decoding,
        number: int = 0,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.decoding = decoding
        self.number = number
        ends = end_symbols(model, processor)
        wanted = {**told_ends(model, ends), **decoding.options(), **(given or {})}
        self.arguments = {**inputs, **wanted, "return_dict_in_generate": True}
        self.output: Any = None
        self._pieces = _Pieces(processor.tokenizer, ends)

    @property
    def text(self) -> str:
        """The answer as far as it was written, without outer space."""
        return self._pieces.text

    def __iter__(self) -> Generator[str, None, None]:
        leave = threading.Event()
        thread = threading.Thread(target=self._write, args=(leave,), daemon=True)
        thread.start()
        try:
            while isinstance(piece := self._pieces.queue.get(), str):
                yield piece
        finally:
            leave.set()
            thread.join()
        if isinstance(piece, BaseException):
            raise piece

    def _write(self, leave: threading.Event) -> None:
        stopping = StoppingCriteriaList([_Stopped(leave)])
        ended: BaseException | None = None
        try:
            device = self.model.get_input_embeddings().weight.device
            with memory_told(1), chance(self.decoding, device, self.number):
                moved = {
                    name: value.to(device) if isinstance(value, Tensor) else value
                    for name, value in self.arguments.items()
                }
                self.output = self.model.generate(**moved, streamer=self._pieces, stopping_criteria=stopping)
        except BaseException as error:  # handed to the reader, whose thread it concerns
            ended = error
        self._pieces.queue.put(ended)
