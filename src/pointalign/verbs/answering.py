"""Verbs that answer about 3D files: chat, caption, classify, demo, and render, which draws them."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from pointalign.options import (
    AS_THE_FILE_SAYS,
    FROM_ENVIRONMENT,
    GREEDY,
    Decoding,
    ManyFiles,
    ModelChoice,
    Page,
    Reading,
)


@dataclass(kw_only=True)
class _Answers:
    """What every verb that answers takes."""

    choice: Annotated[ModelChoice, tyro.conf.arg(name="")] = FROM_ENVIRONMENT
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = GREEDY
    reading: Annotated[Reading, tyro.conf.arg(name="")] = AS_THE_FILE_SAYS


@dataclass(kw_only=True)
class _AnswersMany(_Answers):
    """What every verb that answers about many files takes."""

    paths: tyro.conf.Positional[list[str]]
    """Files, folders (all 3D files below) and patterns."""
    many: Annotated[ManyFiles, tyro.conf.arg(name="")] = field(default_factory=ManyFiles)

    def answer(self, job: Any) -> dict[str, Any]:
        """Do the job for every file."""
        from pointalign.answering.files import answer_files

        return answer_files(self.paths, job, self.choice, self.reading, self.many)


@dataclass
class Chat(_Answers):
    """Talk about a 3D file: on a terminal with commands (/help), between pipes one question per line."""

    file: tyro.conf.Positional[str]
    """The 3D file."""

    def run(self) -> None:
        from pointalign.answering.loading import load_answerer
        from pointalign.chat import chat

        chat(self.file, load_answerer(**vars(self.choice)), self.decoding, self.reading)


@dataclass
class Caption(_AnswersMany):
    """Caption 3D files: one JSON line for each, with its path and a caption or an error."""

    question: str | None = None
    """What the model is asked; "Caption this 3D model in detail." when not given."""

    def run(self) -> dict[str, Any]:
        from pointalign.answering.jobs import caption_job

        job = caption_job(self.question, self.decoding)
        return self.answer(job)


@dataclass
class Classify(_AnswersMany):
    """Tell how probable each of your labels is for 3D files: one JSON line for each file."""

    labels: str | None = None
    """The labels, separated by commas."""
    labels_file: Path | None = None
    """A file with one label per line."""
    top: int | None = None
    """Only so many of the most probable labels in each line; all when not given."""
    free: bool = False
    """Ask "What is this?" too, for an answer in the model's own words; labels are then optional."""
    question: str | None = None
    """What the labels answer; "Which class of object is this?" when not given."""

    def run(self) -> dict[str, Any]:
        from pointalign.answering.jobs import classify_job, read_labels

        labels = read_labels(self.labels, self.labels_file)
        job = classify_job(labels, self.top, self.free, self.question, self.decoding)
        return self.answer(job)


@dataclass
class Render:
    """Draw a 3D file as a model sees it: its cloud from five sides, as a PNG."""

    file: tyro.conf.Positional[str]
    """The 3D file, or - for standard input."""
    out: Path
    """PNG to write."""
    points: int | None = None
    """Points of the cloud; the model's when not given."""
    model: str | None = None
    """The model whose number of points and missing colour are taken; found as in the other verbs when not given."""
    reading: Annotated[Reading, tyro.conf.arg(name="")] = AS_THE_FILE_SAYS

    def run(self) -> dict[str, Any]:
        from pointalign.models.checkpoint import resolve_model
        from pointalign.rendering import render_file

        result = render_file(self.file, self.out, self.points, resolve_model(self.model), asdict(self.reading))
        for note in result["notes"]:
            print(note, file=sys.stderr)
        return result


@dataclass
class Demo(_Answers):
    """Show a page in the browser: drop a 3D file or pick an object, see its cloud, and talk about it."""

    compare: str | None = None
    """A second model, whose answers stand beside those of the first."""
    page: Annotated[Page, tyro.conf.arg(name="")] = field(default_factory=Page)

    def run(self) -> None:
        from pointalign.demo import serve

        serve(self.choice, self.compare, self.page, self.decoding, self.reading)
