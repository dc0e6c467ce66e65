"""What visitors of the page do: look at a cloud, ask the models about it, compare labels. Nothing here knows of Gradio."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pointalign.answering.answerer import Answerer
from pointalign.answering.conversation import Conversation
from pointalign.answering.jobs import read_labels
from pointalign.answering.reading import TimedReader
from pointalign.chat import harmless
from pointalign.data.files import PointCloud
from pointalign.demo.uploads import Uploads
from pointalign.errors import ConfigError, DataError
from pointalign.options import Decoding, Page, Reading

Message = dict[str, Any]
LONGEST_QUESTION = 2000
LONGEST_LABELS = 2000
MOST_LABELS = 60
# Conversations whose computed tokens are kept, for all visitors together; older ones are computed again when they go on.
WARM_CONVERSATIONS = 6
SECONDS_BETWEEN_PIECES = 0.08
CLOSING_SECONDS = 5


@dataclass
class Talk:
    """One model's side of a visit.

    Attributes:
        answerer: the model.
        conversation: with it; None until the first question.
        messages: as the page shows them.
    """

    answerer: Answerer
    conversation: Conversation | None = None
    messages: list[Message] = field(default_factory=list)


@dataclass
class Visit:
    """What one visitor looks at, and has said about it with each model."""

    cloud: PointCloud
    talks: list[Talk]


class Desk:
    """Serves all visitors with the same models, one computation at a time.

    Args:
        answerers: one model, or two that answer side by side.
        uploads: where dropped files are.
        reader: reads them, from the folder of `uploads` on.
        page: limits.
        decoding: how answers are written.
        reading: how files become clouds.
    """

    def __init__(
        self,
        answerers: Sequence[Answerer],
        uploads: Uploads,
        reader: TimedReader,
        page: Page,
        decoding: Decoding,
        reading: Reading,
    ) -> None:
        self.answerers = list(answerers)
        self.uploads = uploads
        self.reader = reader
        self.page = page
        self.decoding = decoding
        self.reading = reading
        self._computing = threading.Lock()
        self._closed = threading.Event()
        self._warm: OrderedDict[int, Conversation] = OrderedDict()

    @property
    def names(self) -> list[str]:
        """What the page calls the models: names without the folders above them."""
        names = [short_name(answerer.name) for answerer in self.answerers]
        alike = len(set(names)) < len(names)
        return [f"{letter}: {name}" for letter, name in zip("AB", names, strict=False)] if alike else names

    def read(self, word: str) -> PointCloud:
        """The cloud of a dropped file, which is deleted.

        Args:
            word: that its upload was answered with.

        Raises:
            DataError: when it is not there any more, or cannot be read; the file is called as the visitor calls it.
        """
        num_points = max(answerer.processor.num_points for answerer in self.answerers)
        with self.uploads.taken(word) as (path, name):
            cloud = self.reader.read(path, self.reading.options(num_points))
        if isinstance(cloud, DataError):
            raise DataError(str(cloud).replace(path, name))
        return replace(cloud, source=name, notes=tuple(note.replace(path, name) for note in cloud.notes))

    def visit(self, cloud: PointCloud) -> Visit:
        """Turn to a cloud; nothing was said of it yet.

        Raises:
            DataError: when a model cannot take it.
        """
        for answerer in self.answerers:
            answerer.prepare(cloud)
        missing = self.answerers[0].processor.missing_color
        told = replace(cloud, notes=tuple(dict.fromkeys(cloud.filled(missing).notes)))
        return Visit(told, [Talk(answerer) for answerer in self.answerers])

    def turned(self, visit: Visit) -> Visit:
        """The same cloud with what pointed to the viewer pointing down: z up becomes y up, as the models are trained."""
        x, y, z = visit.cloud.points.T
        notes = (*visit.cloud.notes, "turned by hand: z was up")
        return self.visit(replace(visit.cloud, points=np.stack([x, z, -y], axis=1), notes=notes))

    def ask(self, visit: Visit, question: str) -> Iterator[str]:
        """Ask every model in turn; its side of the visit grows as the answer is written.

        Yields:
            After each change what there is to say about the answering, mostly nothing.

        Raises:
            DataError: when the question is too long for one of the models; nothing is then asked.
        """
        if len(question) > LONGEST_QUESTION:
            raise DataError(f"the question has {len(question):,} letters; ask in {LONGEST_QUESTION:,} or fewer")
        for talk in visit.talks:
            talk.answerer.check_question(question, self.decoding.max_new_tokens)
        for talk in visit.talks:
            talk.messages.append({"role": "user", "content": question})
        for talk, messages in [(talk, talk.messages) for talk in visit.talks]:
            yield from self._answer(visit, talk, messages, question)

    def _answer(self, visit: Visit, talk: Talk, messages: list[Message], question: str) -> Iterator[str]:
        answer: Message = {"role": "assistant", "content": ""}
        with self._computing:
            conversation = self._conversation(visit, talk)
            messages.append(answer)
            start = told = time.monotonic()
            with closing(conversation.ask(question)) as pieces:
                for piece in pieces:
                    if self._closed.is_set():
                        return
                    answer["content"] += harmless(piece)
                    now = time.monotonic()
                    if now - start > self.page.answer_seconds:
                        answer["content"] += f" ... (stopped after {self.page.answer_seconds:g} seconds)"
                        break
                    if now - told > SECONDS_BETWEEN_PIECES:
                        told = now
                        yield ""
        answer["content"] = answer["content"] or "(no words)"
        forgotten = conversation.forgotten
        yield f"turns forgotten to stay within the model's context: {forgotten}" if forgotten else ""

    def _conversation(self, visit: Visit, talk: Talk) -> Conversation:
        if talk.conversation is None:
            talk.conversation = Conversation(talk.answerer, visit.cloud, self.decoding)
        self._warm[id(talk.conversation)] = talk.conversation
        self._warm.move_to_end(id(talk.conversation))
        while len(self._warm) > WARM_CONVERSATIONS:
            self._warm.popitem(last=False)[1].release()
        return talk.conversation

    def close(self) -> None:
        """Stop at the next word of the answer that is being written, and wait for that, but not for long."""
        self._closed.set()
        if self._computing.acquire(timeout=CLOSING_SECONDS):
            self._computing.release()

    def clear(self, visit: Visit) -> None:
        """Forget what was said; the cloud stays."""
        for talk in visit.talks:
            talk.messages = []
            if talk.conversation is not None:
                talk.conversation.reset()

    def score(self, visit: Visit, text: str) -> list[dict[str, float]]:
        """How probable each label is for the cloud, for each model.

        Args:
            visit: holds the cloud.
            text: labels, separated by commas or on lines of their own.

        Raises:
            PointAlignError: for no label, or too many or too long ones.
        """
        if len(text) > LONGEST_LABELS:
            raise ConfigError(f"the labels have {len(text):,} letters; give {LONGEST_LABELS:,} or fewer")
        if not text.replace(",", " ").strip():
            raise ConfigError("no label is given; write some, separated by commas")
        labels = read_labels(text.replace("\n", ","), None)
        if len(labels) > MOST_LABELS:
            raise ConfigError(f"{len(labels)} labels are given; {MOST_LABELS} at most are compared here")
        scores = []
        for answerer in self.answerers:
            answerer.check_labels(labels)
            with self._computing:
                row = answerer.probabilities([answerer.prepare(visit.cloud)], labels)[0]
            scores.append(dict(zip(labels, row.tolist(), strict=True)))
        return scores


def short_name(name: str) -> str:
    """What people call a model: the folder of its run, or its Hub id; never the folders above."""
    path = Path(name)
    if not path.is_dir():
        return name
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name
