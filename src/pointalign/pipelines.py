"""Pipelines in the manner of transformers: a task, a model, and objects in; dicts out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from pointalign.answering.answerer import CAPTION_QUESTION, CLASS_QUESTION, Answerer, about_cloud
from pointalign.answering.conversation import Conversation
from pointalign.answering.jobs import ranked, read_labels
from pointalign.answering.loading import load_answerer
from pointalign.data.files import PointCloud, load_point_cloud
from pointalign.errors import ConfigError, DataError
from pointalign.options import Decoding, Reading

Message = Mapping[str, Any]
# One object or conversation, ready for the model: its messages, and the clouds that they show.
Prepared = tuple[list[Message], list[Tensor]]
ROLES = ("system", "user", "assistant")


class PointCloudPipeline:
    """What all tasks share: one object gives one result, a list a list, and any other iterable an iterator.

    An object is a path, a `PointCloud`, or an array or tensor (N, 3) xyz or (N, 6) xyz and rgb in [0, 1]. An iterator is
    read only as far as results are asked for, a batch at a time. The options of a call are `batch_size` and the fields of
    `Decoding`: `max_new_tokens`, `temperature`, `top_p`, `seed`.

    Args:
        answerer: the model.
        batch_size: objects that the model answers at a time.
        reading: how files become clouds.
        defaults: options that every call has unless it says otherwise.

    Attributes:
        model: the `PointAlignForConditionalGeneration`.
        processor: its `PointAlignProcessor`.

    Raises:
        ConfigError: for a batch size below 1 or an unknown option.
    """

    def __init__(self, answerer: Answerer, batch_size: int, reading: Reading, defaults: Mapping[str, Any]) -> None:
        self.answerer = answerer
        self.model = answerer.model
        self.processor = answerer.processor
        self.reading = reading
        self._defaults: dict[str, Any] = {"batch_size": batch_size, **defaults}
        self._options({})

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.answerer.device

    def _options(self, options: Mapping[str, Any]) -> tuple[int, Decoding]:
        """Batch size and decoding of a call."""
        given = {**self._defaults, **options}
        batch_size = given.pop("batch_size")
        known = [field.name for field in fields(Decoding)]
        if unknown := [name for name in given if name not in known]:
            near = get_close_matches(unknown[0], [*known, "batch_size"], n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join([*known, 'batch_size'])}"
            raise ConfigError(f"the pipeline has no option {unknown[0]!r}; {hint}")
        if batch_size < 1:
            raise ConfigError(f"batch_size {batch_size} leaves no object; give 1 or more")
        return batch_size, Decoding(**given)

    def _cloud(self, thing: Any) -> Tensor:
        if isinstance(thing, (str, Path)):
            thing = load_point_cloud(thing, **self.reading.options(self.processor.num_points))
        return self.answerer.prepare(thing)

    def _is_one(self, inputs: Any) -> bool:
        return isinstance(inputs, (str, Path, PointCloud)) or getattr(inputs, "ndim", None) == 2

    def _each(
        self,
        inputs: Any,
        prepare: Callable[[Any], Any],
        answer: Callable[[list[Any], int], list[Any]],
        batch_size: int,
    ) -> Any:
        if self._is_one(inputs):
            return answer([prepare(inputs)], 0)[0]
        if isinstance(inputs, Mapping) or not hasattr(inputs, "__iter__"):
            raise DataError(
                f"{type(inputs).__name__} is no kind of object; give a path, a PointCloud, an array (N, 3) or (N, 6), or a "
                "list of them"
            )
        results = _batches(iter(inputs), prepare, answer, batch_size)
        return list(results) if isinstance(inputs, (list, tuple, np.ndarray, Tensor)) else results


def _batches(
    things: Iterator[Any], prepare: Callable[[Any], Any], answer: Callable[[list[Any], int], list[Any]], size: int
) -> Iterator[Any]:
    number = 0
    while batch := [prepare(thing) for thing in islice(things, size)]:
        yield from answer(batch, number)
        number += 1


class CaptionPipeline(PointCloudPipeline):
    """Describes objects: `{"caption": ...}` for each."""

    def __call__(self, inputs: Any, question: str | None = None, **options: Any) -> Any:
        """Caption one object, a list of them, or whatever an iterable gives.

        Args:
            inputs: see `PointCloudPipeline`.
            question: what the model is asked instead of "Caption this 3D model in detail.".
            options: see `PointCloudPipeline`.

        Raises:
            PointAlignError: for a bad object or an unknown option.
        """
        batch_size, decoding = self._options(options)

        def answer(clouds: list[Tensor], number: int) -> list[dict[str, str]]:
            said = self.answerer.ask(clouds, question or CAPTION_QUESTION, decoding, number)
            return [{"caption": one.text} for one in said]

        return self._each(inputs, self._cloud, answer, batch_size)


class ClassifyPipeline(PointCloudPipeline):
    """Chooses among labels: `[{"label": ..., "score": ...}, ...]` for each object, most probable first.

    Args:
        labels: of calls that name none.
        rest: as `PointCloudPipeline`.
    """

    def __init__(self, *rest: Any, labels: Sequence[str] | str | None = None) -> None:
        super().__init__(*rest)
        self.labels = labels

    def __call__(
        self,
        inputs: Any,
        labels: Sequence[str] | str | None = None,
        top_k: int | None = None,
        question: str | None = None,
        **options: Any,
    ) -> Any:
        """Score labels for one object, a list of them, or whatever an iterable gives.

        Args:
            inputs: see `PointCloudPipeline`.
            labels: a list, or one text with commas; the pipeline's own when None.
            top_k: only so many labels of each object; all when None. The scores are those among all labels.
            question: what the labels answer, instead of "Which class of object is this?".
            options: `batch_size`.

        Raises:
            PointAlignError: for a bad object, an unknown option, or without labels.
        """
        batch_size, _ = self._options(options)
        named = self.labels if labels is None else labels
        if not named:
            raise ConfigError("no label is given; name some: labels=['chair', 'table']")
        chosen = read_labels(named, None) if isinstance(named, str) else list(dict.fromkeys(named))
        if top_k is not None and top_k < 1:
            raise ConfigError(f"top_k {top_k} leaves no label; give 1 or more")

        self.answerer.check_labels(chosen, question or CLASS_QUESTION)

        def answer(clouds: list[Tensor], number: int) -> list[list[dict[str, Any]]]:
            rows = self.answerer.probabilities(clouds, chosen, question or CLASS_QUESTION)
            return [ranked(chosen, row)[:top_k] for row in rows]

        return self._each(inputs, self._cloud, answer, batch_size)


class ChatPipeline(PointCloudPipeline):
    """Talks about objects: `{"answer": ..., "messages": [...]}` for each conversation, the answer being the last message.

    A conversation is a list of messages as transformers' chat templates take them, whose `content` is a text or a list of
    parts; a part of type "point_cloud" has the object as `path` or `points`.
    """

    def __call__(self, inputs: Any, question: str | None = None, **options: Any) -> Any:
        """Answer one conversation, a list of them, or whatever an iterable gives.

        Args:
            inputs: conversations; or objects, see `PointCloudPipeline`, with a question about each.
            question: about objects that come without messages.
            options: see `PointCloudPipeline`.

        Raises:
            PointAlignError: for bad messages, a bad object or an unknown option.
        """
        batch_size, decoding = self._options(options)

        def prepare(thing: Any) -> Prepared:
            return self._conversation(thing, question)

        def answer(batch: list[Prepared], number: int) -> list[dict[str, Any]]:
            clouds = [cloud for _, shown in batch for cloud in shown]
            said = self.answerer.reply([messages for messages, _ in batch], clouds, decoding, number)
            return [
                {"answer": one.text, "messages": [*messages, {"role": "assistant", "content": one.text}]}
                for (messages, _), one in zip(batch, said, strict=True)
            ]

        return self._each(inputs, prepare, answer, batch_size)

    def stream(self, inputs: Any, question: str | None = None, **options: Any) -> Iterator[str]:
        """Answer one conversation piece by piece; arguments and errors as in a call."""
        _, decoding = self._options(options)
        messages, clouds = self._conversation(inputs, question)
        return iter(self.answerer.stream(messages, clouds, decoding))

    def about(self, thing: Any, **options: Any) -> Conversation:
        """A conversation about one object, in which each turn costs its own tokens only.

        Args:
            thing: see `PointCloudPipeline`.
            options: see `PointCloudPipeline`.

        Raises:
            PointAlignError: for a bad object or an unknown option.
        """
        return Conversation(self.answerer, self._cloud(thing), self._options(options)[1])

    def _is_one(self, inputs: Any) -> bool:
        is_conversation = isinstance(inputs, (list, tuple)) and bool(inputs) and isinstance(inputs[0], Mapping)
        return is_conversation or super()._is_one(inputs)

    def _conversation(self, thing: Any, question: str | None) -> Prepared:
        if super()._is_one(thing):
            if not question:
                raise ConfigError("there is no question about the object; give question=..., or messages")
            place = {"path": str(thing)} if isinstance(thing, (str, Path)) else {"points": thing}
            return [about_cloud(question, **place)], [self._cloud(thing)]
        if not isinstance(thing, (list, tuple)) or not thing:
            raise DataError(f"a conversation is a list of messages; this is {thing!r:.80}")
        messages = list(thing)
        for message in messages:
            _check_message(message)
        if messages[-1]["role"] != "user":
            raise DataError("the last message is not the user's, so there is nothing to answer; end with a question")
        parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
        shown = [part for part in parts if part["type"] == "point_cloud"]
        return messages, [self._cloud(part["path"] if "path" in part else part["points"]) for part in shown]


def _check_message(message: Any) -> None:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES or "content" not in message:
        raise DataError(f"a message is a dict with role ({', '.join(ROLES)}) and content; this is {message!r:.80}")
    content = message["content"]
    if not isinstance(content, (str, list, tuple)):
        raise DataError(f"a message's content is a string or a list of parts; this is {content!r:.80}")
    for part in [] if isinstance(content, str) else content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        wanted = {"text": ("text",), "point_cloud": ("path", "points")}.get(str(kind))
        if wanted is None or not any(name in part for name in wanted):
            raise DataError(
                "a part of a message is {'type': 'text', 'text': ...}, or {'type': 'point_cloud'} with path or points; "
                f"this is {part!r:.80}"
            )


@overload
def pipeline(task: Literal["caption"], model: str | Path | None = None, **options: Any) -> CaptionPipeline: ...
@overload
def pipeline(task: Literal["classify"], model: str | Path | None = None, **options: Any) -> ClassifyPipeline: ...
@overload
def pipeline(task: Literal["chat"], model: str | Path | None = None, **options: Any) -> ChatPipeline: ...
def pipeline(
    task: str,
    model: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    batch_size: int = 8,
    up: Literal["y", "z"] | None = None,
    **options: Any,
) -> PointCloudPipeline:
    """Load a model for a task.

    Args:
        task: "caption", "classify" or "chat".
        model: a folder that `save_pretrained` wrote, a training run's folder, a bundled
            model's name or a Hub id; $POINTALIGN_MODEL, else household-135m, when None.
        device: where to compute; the accelerator if there is one, else the CPU, when None.
        dtype: of the language model; bfloat16 where the device multiplies it natively, else float32, when None.
        batch_size: objects that the model answers at a time.
        up: the axis that points up in files; what their format fixes, else y, when None.
        options: of every call: the fields of `Decoding`, and `labels` for "classify".

    Raises:
        PointAlignError: for an unknown task or option, or a model that cannot be loaded.
    """
    kinds = {"caption": CaptionPipeline, "classify": ClassifyPipeline, "chat": ChatPipeline}
    if task not in kinds:
        raise ConfigError(f"there is no task {task!r}; known are {', '.join(kinds)}")
    only = {"labels": options.pop("labels", None)} if task == "classify" else {}
    answerer = load_answerer(model, device, dtype)
    return kinds[task](answerer, batch_size, Reading(up), options, **only)
