"""What evaluation passes from hand to hand: answers in the field's file format, what a judge is asked, what it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pointalign.errors import DataError
from pointalign.storage import write_text

TaskKind = Literal["closed-set", "open-vocabulary", "captioning"]


@dataclass(frozen=True)
class Answer:
    """What a model said about one object.

    Args:
        object_id: which object.
        ground_truth: the reference: a caption, or in the closed set the class's index or name as the file has it.
        model_output: the answer, verbatim.
        label_name: the class's name, in the closed set.
    """

    object_id: str
    ground_truth: Any
    model_output: str
    label_name: str | None = None


@dataclass(frozen=True)
class AnswersFile:
    """All answers to one question, as the field's evaluators read and write them.

    Args:
        prompt: the question.
        results: one answer per object.

    Source: PointLLM (arXiv 2308.16911), released answer files.
    """

    prompt: str
    results: tuple[Answer, ...]

    def to_json(self) -> dict[str, Any]:
        """The field's layout: `{"prompt", "results": [{"object_id", "ground_truth", "model_output", "label_name"}]}`."""
        entries = []
        for answer in self.results:
            entry = {
                "object_id": answer.object_id,
                "ground_truth": answer.ground_truth,
                "model_output": answer.model_output,
            }
            entries.append(entry if answer.label_name is None else {**entry, "label_name": answer.label_name})
        return {"prompt": self.prompt, "results": entries}

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        write_text(Path(path), json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n")


def read_answers(path: str | Path) -> AnswersFile:
    """Read an answers file, ours or a peer's.

    Raises:
        DataError: when it is missing, is not JSON, or is not in the field's layout.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give an answers file") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); give an answers file") from error
    try:
        results = [
            Answer(str(entry["object_id"]), entry["ground_truth"], entry["model_output"], entry.get("label_name"))
            for entry in values["results"]
        ]
        prompt = str(values["prompt"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not an answers file ({type(error).__name__}: {error}); it needs prompt, and results with object_id, "
            "ground_truth and model_output"
        ) from error
    for answer in results:
        if not isinstance(answer.model_output, str):
            raise DataError(f"{path}: the model_output of {answer.object_id} is {answer.model_output!r}, not text")
    if not results:
        raise DataError(f"{path} holds no answers; answer first")
    return AnswersFile(prompt, tuple(results))


@dataclass(frozen=True)
class Task:
    """What is to be judged.

    Args:
        kind: "closed-set" (which of the labels is meant), "open-vocabulary" (same kind of object as the reference, or not)
            or "captioning" (0 to 100).
        labels: the classes' names of the closed set, by index.
        synonyms: further names of a class, by its name; under the empty name the phrases that name none of the classes.
    """

    kind: TaskKind
    labels: tuple[str, ...] = ()
    synonyms: dict[str, tuple[str, ...]] | None = None


@dataclass(frozen=True)
class Verdict:
    """What a judge makes of one answer.

    Args:
        object_id: which object.
        valid: whether the judge gave a verdict that can be read.
        correct: whether the answer is right; None for captions and for invalid verdicts.
        score: 0 to 100 for captions; None elsewhere.
        predicted: the class that the judge read out of the answer, in the closed set.
        reply: the judge's reply, verbatim; None for judges without words.
    """

    object_id: str
    valid: bool
    correct: bool | None = None
    score: float | None = None
    predicted: str | None = None
    reply: str | None = None


class Judge(Protocol):
    """Scores answers; one interface for rules, embeddings and language models."""

    @property
    def name(self) -> str:
        """Names judge and model in reports; rows of different names are never compared."""
        ...

    def __call__(
        self, task: Task, answers: Sequence[Answer], advance: Callable[[int], None] = lambda count: None
    ) -> list[Verdict]:
        """One verdict per answer, in order.

        Args:
            task: what is to be judged.
            answers: by a model.
            advance: called with the number of answers done.

        Raises:
            PointAlignError: when the judge cannot be reached or the task does not suit it.
        """
        ...
