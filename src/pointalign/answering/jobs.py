"""The jobs of the verbs for many files: captions, and classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import Tensor

from pointalign.answering.answerer import CAPTION_QUESTION, CLASS_QUESTION, FREE_QUESTION, Answerer
from pointalign.answering.files import Job
from pointalign.answering.lines import Row
from pointalign.errors import ConfigError
from pointalign.options import GREEDY, Decoding
from pointalign.progress import say

BAR_WIDTH = 24


def caption_job(question: str | None = None, decoding: Decoding = GREEDY) -> Job:
    """A caption for each object, in rows with `caption`.

    Args:
        question: what the model is asked instead of "Caption this 3D model in detail.".
        decoding: how the words are chosen.
    """
    asked = question or CAPTION_QUESTION

    def rows(answerer: Answerer, clouds: Sequence[Tensor], number: int) -> list[Row]:
        return [{"caption": said.text} for said in answerer.ask(clouds, asked, decoding, number)]

    def check(answerer: Answerer) -> None:
        answerer.check_question(asked, decoding.max_new_tokens)

    return Job("captions", {"question": asked, **chosen_by(decoding)}, rows, check, drawn_caption, decoding.samples)


def classify_job(
    labels: Sequence[str],
    top: int | None = None,
    free: bool = False,
    question: str | None = None,
    decoding: Decoding = GREEDY,
) -> Job:
    """Labels with their probabilities for each object, most probable first, and what the model says of its own accord.

    Args:
        labels: among which the probabilities sum to 1; may be empty when `free`.
        top: only so many labels in each row; all when None.
        free: ask "What is this?" too, or alone, for rows with `answer`.
        question: what the labels answer, instead of "Which class of object is this?".
        decoding: how the words of a free answer are chosen.

    Raises:
        ConfigError: when neither labels nor a free answer are wanted, or `top` is below 1.
    """
    if not labels and not free:
        raise ConfigError("no label is given; name some with --labels or --labels-file, or ask for --free")
    if top is not None and top < 1:
        raise ConfigError(f"top {top} leaves no label; give 1 or more")
    asked = question or CLASS_QUESTION

    def rows(answerer: Answerer, clouds: Sequence[Tensor], number: int) -> list[Row]:
        found: list[Row] = [{} for _ in clouds]
        if labels:
            for row, probabilities in zip(found, answerer.probabilities(clouds, labels, asked), strict=True):
                row["labels"] = ranked(labels, probabilities)[:top]
        if free:
            for row, said in zip(found, answerer.ask(clouds, FREE_QUESTION, decoding, number), strict=True):
                row["answer"] = said.text
        return found

    def check(answerer: Answerer) -> None:
        if free:
            answerer.check_question(FREE_QUESTION, decoding.max_new_tokens)
        if labels:
            answerer.check_labels(labels, asked)

    settings: dict[str, Any] = {"labels": list(labels), "top": top, "question": asked, "free": free}
    settings |= chosen_by(decoding) if free else {}
    return Job("classified", settings, rows, check, drawn_classes, free and decoding.samples)


def chosen_by(decoding: Decoding) -> dict[str, Any]:
    """What words depend on: all of the settings where they are drawn, else the longest length alone."""
    return asdict(decoding) if decoding.samples else {"max_new_tokens": decoding.max_new_tokens}


def ranked(labels: Sequence[str], probabilities: Tensor) -> list[dict[str, Any]]:
    """Labels with their probabilities, most probable first; equal ones in the order given."""
    scores = probabilities.tolist()
    order = sorted(range(len(labels)), key=lambda index: -scores[index])
    return [{"label": labels[index], "score": scores[index]} for index in order]


def read_labels(text: str | None, file: Path | None) -> list[str]:
    """The labels that an option and a file name, each once, in their order.

    Args:
        text: separated by commas.
        file: one per line; empty lines do not count.

    Raises:
        ConfigError: when the file cannot be read, or what is given names no label.
    """
    named = text.split(",") if text is not None else []
    if file is not None:
        try:
            named += file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            told = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(f"cannot read {file}: {told}; give a text file with one label per line") from error
    cleaned = [label.strip() for label in named if label.strip()]
    labels = list(dict.fromkeys(cleaned))
    if not labels and (text is not None or file is not None):
        raise ConfigError(f"{file or '--labels'} names no label; give at least one")
    if len(labels) < len(cleaned):
        say(f"{len(cleaned) - len(labels)} labels are named twice and count once")
    return labels


def drawn_caption(row: Row) -> Text:
    """A row as a line of text, for a terminal."""
    return Text.assemble((f"{row['path']}: ", "bold"), (row["error"], "red") if "error" in row else row["caption"])


def drawn_classes(row: Row) -> Table:
    """A row as a small table with bars, for a terminal."""
    table = Table(title=Text(row["path"]), title_justify="left", show_header=False, box=None, padding=(0, 1))
    for entry in row.get("labels", []):
        bar = "█" * round(BAR_WIDTH * entry["score"])
        table.add_row(Text(entry["label"]), Text(bar.ljust(BAR_WIDTH), style="cyan"), f"{entry['score']:.1%}")
    for name in ("answer", "error"):
        if name in row:
            table.add_row(Text(name, style="bold"), Text(row[name]))
    return table
