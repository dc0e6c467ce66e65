"""Instructions about household and other objects in PointLLM's format, from their nouns and the clouds themselves.

An answer says what the object is, its class, its main colours, and its proportions: only what the normalised cloud can
show, never a size. A hash of the object's id chooses among phrasings, so the same objects give the same text.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np

from pointalign.data.colors import color_indices, count_colors
from pointalign.data.household import LABELS_FILE
from pointalign.data.household_phrases import (
    CATEGORY_QUESTIONS,
    COLOR_ANSWERS,
    COLOR_QUESTIONS,
    DETAILED_QUESTIONS,
    PART_ANSWERS,
    PROPORTION_QUESTIONS,
    PROPORTIONS,
    SIMPLE_QUESTIONS,
    WHAT_ANSWERS,
)

CLASSES_FILE = LABELS_FILE.with_name("classes.csv")


class Named(Protocol):
    """What an object must tell to be written about: as a household object does, but it need not have a label."""

    @property
    def id(self) -> str:
        """A name of its own, which chooses the phrasings."""
        ...

    @property
    def noun(self) -> str:
        """What it is, with its article."""
        ...

    @property
    def label(self) -> str | None:
        """Its class word."""
        ...

    @property
    def points(self) -> np.ndarray:
        """(N, 6) xyz, y up, and rgb in [0, 1]."""
        ...


@dataclass(frozen=True)
class ObjectFacts:
    """What the text may say of an object.

    Attributes:
        noun: what it is, with its article: "a corner sofa".
        label: its class word: "sofa"; None when it has none.
        label_phrase: its class with an article: "a sofa", "a piece of clothing"; the noun when it has none.
        colors: names, largest share first.
        upper_color, lower_color: main colours of the upper and lower third where they differ, else None.
        shape: a key of PROPORTIONS.
    """

    noun: str
    label: str | None
    label_phrase: str
    colors: tuple[str, ...]
    upper_color: str | None
    lower_color: str | None
    shape: str


def describe(thing: Named) -> ObjectFacts:
    """Gather an object's facts from its catalogue entry and its points (y up)."""
    height = thing.points[:, 1]
    low, high = float(height.min()), float(height.max())
    upper, lower = None, None
    named = color_indices(thing.points[:, 3:])
    colors = count_colors(named)
    shape = proportions(np.ptp(thing.points[:, :3], axis=0))
    if len(colors) > 1 and not shape.startswith("flat"):
        top = count_colors(named[height >= high - (high - low) / 3])[0]
        bottom = count_colors(named[height <= low + (high - low) / 3])[0]
        if top.base != bottom.base and {top.name, bottom.name} <= {color.name for color in colors}:
            upper, lower = top.name, bottom.name
    return ObjectFacts(
        noun=thing.noun,
        label=thing.label,
        label_phrase=label_phrases().get(thing.label, f"a {thing.label}") if thing.label else thing.noun,
        colors=tuple(color.name for color in colors),
        upper_color=upper,
        lower_color=lower,
        shape=shape,
    )


def proportions(extents: Sequence[float] | np.ndarray) -> str:
    """Name the shape of a box (width x, height y, depth z) by its ratios; the answer is a key of PROPORTIONS."""
    height = float(extents[1])
    longer, shorter = max(extents[0], extents[2]), min(extents[0], extents[2])
    longer, shorter = max(float(longer), 1e-9), max(float(shorter), 1e-9)
    if height <= 0.12 * longer:
        return "flat long" if longer >= 3 * shorter else "flat"
    if shorter <= 0.16 * max(longer, height) and height >= 0.5 * longer and height < 6 * longer:
        return "panel tall" if height >= 1.6 * longer else "panel"
    if height >= 3 * longer:
        return "slender"
    if height >= 1.5 * longer:
        return "tall"
    if longer >= 3 * shorter:
        return "long"
    if height <= 0.5 * longer:
        return "low"
    if max(height, longer) <= 1.3 * min(height, shorter):
        return "compact"
    if height >= 1.15 * longer:
        return "upright"
    return "wide" if longer >= 1.15 * height else "shallow"


@cache
def label_phrases() -> dict[str, str]:
    """Each class word with its article: {"clothing": "a piece of clothing", ...}."""
    with CLASSES_FILE.open(newline="", encoding="utf-8") as file:
        return {row["label"]: row["phrase"] for row in csv.DictReader(file)}


def reference_caption(thing: Named) -> str:
    """The caption a held-out object's answer is judged against: all its facts in fixed words."""
    return _reference(describe(thing))


def build_instructions(objects: Iterable[Named]) -> list[dict[str, Any]]:
    """Conversations about each object, of all four types of PointLLM's format.

    Returns:
        For each object, in order: three simple_description, one detailed_description, three single_round (two when it
        has no label) and one multi_round conversation, as `{object_id, conversation_type, conversations: [{from,
        value}, ...]}`; the first human turn starts with "<point>" and a newline.

    Source: PointLLM (arXiv 2308.16911), section 3; its released instruction files.
    """
    return [item for thing in objects for item in _instructions(thing.id, describe(thing))]


def build_captions(objects: Iterable[Named]) -> list[dict[str, Any]]:
    """One conversation of type `caption` about each object: the field's prompt, answered by its reference caption.

    So are the field's own data: PointLLM's brief descriptions are the captions that held-out objects are judged against, and
    a model is trained to write as they do.

    Source: PointLLM (arXiv 2308.16911), section 3: brief descriptions are Cap3D's captions.
    """
    return [_caption(thing.id, describe(thing)) for thing in objects]


def build_conversations(objects: Iterable[Named]) -> list[dict[str, Any]]:
    """`build_instructions` and then `build_captions`, each object's facts gathered once."""
    gathered = [(thing.id, describe(thing)) for thing in objects]
    instructions = [item for object_id, facts in gathered for item in _instructions(object_id, facts)]
    return [*instructions, *(_caption(object_id, facts) for object_id, facts in gathered)]


def _instructions(object_id: str, facts: ObjectFacts) -> Iterator[dict[str, Any]]:
    for k, questions in enumerate(SIMPLE_QUESTIONS):
        question = _pick(questions, object_id, f"simple question {k}")
        yield _conversation(object_id, "simple_description", [(question, _brief(facts, object_id, k))])
    question = _pick(DETAILED_QUESTIONS, object_id, "detailed question")
    yield _conversation(object_id, "detailed_description", [(question, _detailed(facts, object_id))])
    rounds = _rounds(facts, object_id)
    for turn in rounds[1:]:
        yield _conversation(object_id, "single_round", [turn])
    yield _conversation(object_id, "multi_round", rounds)


def _caption(object_id: str, facts: ObjectFacts) -> dict[str, Any]:
    return _conversation(object_id, "caption", [(DETAILED_QUESTIONS[0], _reference(facts))])


def _reference(facts: ObjectFacts) -> str:
    return f"{_what(facts, 0)} {_colors(facts, 0)} {PROPORTIONS[facts.shape][0]}"


def _brief(facts: ObjectFacts, seed: str, k: int) -> str:
    """One sentence on what it is; the first and third also on its colours."""
    what = _what(facts, _choice(len(WHAT_ANSWERS), seed, f"what {k}"))
    if k == 1:
        return what
    return f"{what} {_colors(facts, _choice(len(COLOR_ANSWERS[0]), seed, f'colors {k}'))}"


def _detailed(facts: ObjectFacts, seed: str) -> str:
    """What it is, its colours and where they lie, its proportions."""
    parts = [
        _what(facts, _choice(len(WHAT_ANSWERS), seed, "what detailed")),
        _colors(facts, _choice(len(COLOR_ANSWERS[0]), seed, "colors detailed")),
    ]
    if facts.upper_color and facts.lower_color:
        phrase = _pick(PART_ANSWERS, seed, "parts")
        parts.append(phrase.format(upper=facts.upper_color, lower=facts.lower_color))
    parts.append(_pick(PROPORTIONS[facts.shape], seed, "shape detailed"))
    return " ".join(parts)


def _rounds(facts: ObjectFacts, seed: str) -> list[tuple[str, str]]:
    """Questions and answers on what it is, its class, its colours and its proportions."""
    what = _what(facts, _choice(len(WHAT_ANSWERS), seed, "what round"))
    colors = _colors(facts, _choice(len(COLOR_ANSWERS[0]), seed, "colors round"))
    shape = _pick(PROPORTIONS[facts.shape], seed, "shape round")
    label = _pick(("It is {0}.", "It belongs to the class: {1}.", "This is {0}."), seed, "label round")
    asked = [(_pick(CATEGORY_QUESTIONS, seed, "round class"), label.format(facts.label_phrase, facts.label))]
    return [
        (_pick(SIMPLE_QUESTIONS[1], seed, "round what"), what),
        *(asked if facts.label else []),
        (_pick(COLOR_QUESTIONS, seed, "round colors"), colors),
        (_pick(PROPORTION_QUESTIONS, seed, "round shape"), shape),
    ]


def _what(facts: ObjectFacts, index: int) -> str:
    """What it is: class word and noun, or the class word alone where the noun says no more."""
    if facts.noun == facts.label_phrase:
        return f"This is {facts.label_phrase}."
    return WHAT_ANSWERS[index].format(label=facts.label_phrase, noun=facts.noun)


def _colors(facts: ObjectFacts, index: int) -> str:
    """Its colours, in the phrasing of that index."""
    if len(facts.colors) == 1:
        return COLOR_ANSWERS[0][index].format(colors=facts.colors[0])
    listed = f"{', '.join(facts.colors[:-1])} and {facts.colors[-1]}"
    return COLOR_ANSWERS[1][index].format(colors=listed)


def _conversation(object_id: str, kind: str, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    said: list[dict[str, str]] = []
    for k, (question, answer) in enumerate(turns):
        said.append({"from": "human", "value": question if k else f"<point>\n{question}"})
        said.append({"from": "gpt", "value": answer})
    return {"object_id": object_id, "conversation_type": kind, "conversations": said}


def _pick(options: Sequence[str], seed: str, slot: str) -> str:
    return options[_choice(len(options), seed, slot)]


def _choice(count: int, seed: str, slot: str) -> int:
    """An index below count that depends on nothing but the seed and the slot."""
    return int.from_bytes(hashlib.sha256(f"{seed} {slot}".encode()).digest()[:8], "big") % count
