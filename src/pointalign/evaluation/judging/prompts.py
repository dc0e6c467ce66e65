"""What language models are asked as judges, and how their replies are read: strictly, so that nothing is guessed."""

from __future__ import annotations

import hashlib
import json
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from pointalign.errors import ConfigError
from pointalign.evaluation.judging.label_sets import class_verdict, plain_name, reference_text
from pointalign.evaluation.records import Answer, Task, TaskKind, Verdict
from pointalign.storage import writable

KINDS: tuple[TaskKind, ...] = typing.get_args(TaskKind)
REQUIRED = {
    "closed-set": ("answer",),
    "open-vocabulary": ("answer", "reference"),
    "captioning": ("answer", "reference"),
}
PLACEHOLDER = re.compile(r"\{(answer|reference|labels)\}")
# Models that reason aloud do so before the reply proper; some chat templates write the opening tag themselves.
THINKING = re.compile(r"\A\s*(?:<think>)?.*?</think>", re.DOTALL)
CLASS_REPLY = re.compile(r"\s*(-?\d{1,6})\s*#\s*(\S[^\n]*)")
AROUND_NAMES = "\"'`*. "
SAME_REPLY = re.compile(r"\s*([TF])\s*(?:[#.,:;\n]|\Z)")
SCORE_REPLY = re.compile(r"\s*(\d{1,3}(?:\.\d+)?)\s*(?:%|/\s*100)?\s*(?:#|\n|\Z)")
NO_INDEX = -1
NO_CLASS = "none"
BEST_SCORE = 100
SCORE_STEP = 5


@dataclass(frozen=True)
class JudgePrompts:
    """The prompts of a judge, by task.

    Args:
        texts: with the placeholders {answer}, {reference} and {labels}.
        source: where they come from; None for those of the package.
    """

    texts: dict[TaskKind, str]
    source: str | None = None

    @property
    def fingerprint(self) -> str:
        """Eight digits that change with any of the prompts."""
        return hashlib.sha256(json.dumps(self.texts, sort_keys=True).encode()).hexdigest()[:8]

    def fill(self, task: Task, answer: Answer) -> str:
        """The prompt about one answer.

        Raises:
            ConfigError: when there is no prompt for the task, or it lacks a placeholder.
            DataError: when the answer has no reference and the task needs one.
        """
        text = self._text(task.kind)
        values = {"answer": answer.model_output.strip(), "labels": numbered(task.labels)}
        if task.kind != "closed-set":
            values["reference"] = reference_text(answer)
        filled = PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), text)
        return writable(filled)

    def _text(self, kind: TaskKind) -> str:
        if kind not in self.texts:
            raise ConfigError(f"{self.source} has no {kind}.txt; add that prompt, or leave --judge-prompt out")
        missing = [name for name in REQUIRED[kind] if f"{{{name}}}" not in self.texts[kind]]
        if missing:
            raise ConfigError(
                f"the {kind} prompt of {self.source} lacks {{{missing[0]}}}; write it where the {missing[0]} belongs"
            )
        return self.texts[kind]


def load_prompts(path: str | None = None) -> JudgePrompts:
    """The package's prompts, one file's text for every task, or a folder's TASK.txt.

    Raises:
        ConfigError: when there is no such file, or the folder holds no prompt.
    """
    if path is None:
        folder = resources.files("pointalign") / "assets" / "judge"
        texts = {kind: (folder / f"{kind}.txt").read_text(encoding="utf-8") for kind in KINDS}
        return JudgePrompts({kind: text.removesuffix("\n") for kind, text in texts.items()})
    place = Path(path)
    files: dict[TaskKind, Path] = {kind: place / f"{kind}.txt" if place.is_dir() else place for kind in KINDS}
    try:
        texts: dict[TaskKind, str] = {
            kind: file.read_text(encoding="utf-8").removesuffix("\n")
            for kind, file in files.items()
            if file == place or file.is_file()
        }
    except OSError as error:
        raise ConfigError(f"cannot read the prompt {path}: {error.strerror}; give a text file or a folder") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt {path} is not UTF-8 text ({error}); save it as UTF-8") from error
    if not texts:
        raise ConfigError(f"{path} holds no prompt; name one of them {' or '.join(f'{kind}.txt' for kind in KINDS)}")
    return JudgePrompts(texts, path)


def numbered(labels: tuple[str, ...]) -> str:
    """The classes with their indices, one per line."""
    return "\n".join(f"{index}: {label}" for index, label in enumerate(labels))


def admissible_replies(task: Task) -> tuple[str, ...]:
    """Every reply without a reason that `read_reply` can read; scores in steps of 5."""
    if task.kind == "closed-set":
        return (*(f"{index}#{label}" for index, label in enumerate(task.labels)), f"{NO_INDEX}#{NO_CLASS}")
    if task.kind == "open-vocabulary":
        return ("T", "F")
    return tuple(map(str, range(0, BEST_SCORE + 1, SCORE_STEP)))


def read_reply(task: Task, answer: Answer, text: str) -> Verdict:
    """What a judge's reply says of an answer; invalid when it is not in the form that was asked for.

    Closed set: `index#class#reason`; the class must be the index's, and index -1 says that the answer names none. Open
    vocabulary: `T` or `F`, then `#reason`. Captioning: a number from 0 to 100, then `#reason`. The reason may be missing.

    Source: the forms of PointLLM (arXiv 2308.16911) for its judges.
    """
    return _READERS[task.kind](task, answer, text, THINKING.sub("", text))


def _read_class(task: Task, answer: Answer, text: str, said: str) -> Verdict:
    found = CLASS_REPLY.match(said)
    if found is not None:
        index, rest = int(found[1]), found[2]
        if index == NO_INDEX:
            return class_verdict(task, answer, None, text)
        if 0 <= index < len(task.labels) and _names(rest, task.labels[index]):
            return class_verdict(task, answer, task.labels[index], text)
    return Verdict(answer.object_id, False, reply=text)


def _names(rest: str, label: str) -> bool:
    """Whether a reply behind its index is a class's name, with or without a reason; a name may hold the `#` itself."""
    marks = label.count("#")
    name = "#".join(rest.split("#")[: marks + 1])
    return plain_name(name.strip(AROUND_NAMES)) == plain_name(label.strip(AROUND_NAMES))


def _read_same(task: Task, answer: Answer, text: str, said: str) -> Verdict:
    found = SAME_REPLY.match(said)
    if found is None:
        return Verdict(answer.object_id, False, reply=text)
    return Verdict(answer.object_id, True, correct=found[1] == "T", reply=text)


def _read_score(task: Task, answer: Answer, text: str, said: str) -> Verdict:
    found = SCORE_REPLY.match(said)
    if found is None or float(found[1]) > BEST_SCORE:
        return Verdict(answer.object_id, False, reply=text)
    return Verdict(answer.object_id, True, score=float(found[1]), reply=text)


_READERS: dict[TaskKind, Callable[[Task, Answer, str, str], Verdict]] = {
    "closed-set": _read_class,
    "open-vocabulary": _read_same,
    "captioning": _read_score,
}


def unasked_verdict(task: Task, answer: Answer) -> Verdict:
    """The verdict on an empty answer, for which no judge is needed: no class, not the same kind, no aspect right."""
    if task.kind == "captioning":
        return Verdict(answer.object_id, True, score=0.0)
    return Verdict(answer.object_id, True, correct=False)
