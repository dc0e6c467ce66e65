"""The `match` judge: which class an answer names, by rules. Names and synonyms are data; docs/judging.md tells the rules."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import NamedTuple

import yaml

from pointalign.evaluation.judging.label_sets import NO_CLASS, class_verdict, plain_name, refuse_task, synonyms_of
from pointalign.evaluation.records import Answer, Task, Verdict

TOKEN = re.compile(
    r"-(?:like|shaped|style|styled|sized|inspired|themed)\b|[^\W_]+(?:'[^\W_]+)*|(?<=\s)-(?=\s)|[^\w\s'\"*`_-]"
)
NEGATIONS = ("non", "no", "not", "never")
NEGATED_WORD = re.compile(rf"\b(?:{'|'.join(NEGATIONS)})(?!-an?\b)(?:-[^\W_]+)+")
IRREGULAR_PLURALS = {
    "bookshelf": "bookshelves",
    "child": "children",
    "knife": "knives",
    "loaf": "loaves",
    "man": "men",
    "mouse": "mice",
    "person": "people",
    "scarf": "scarves",
    "shelf": "shelves",
    "woman": "women",
}
# A comma ends a clause too, but for negations, which may go on over a list.
STOPS = frozenset({*".;:!?()-", "\u2013", "\u2014", "but", "however", "although", "though"})
CLAUSE_ENDS = STOPS | {","}
NEGATING_PAIRS = frozenset((("rather", "than"), ("instead", "of"), ("other", "than")))
# How many tokens before a name a preposition may stand that governs it.
RELATION_REACH = 5
OF_REACH = 4


def _read_words() -> dict[str, frozenset[str]]:
    file = resources.files("pointalign") / "assets" / "judge" / "english.yaml"
    return {name: frozenset(words.split()) for name, words in yaml.safe_load(file.read_text(encoding="utf-8")).items()}


WORDS = _read_words()


class Mention(NamedTuple):
    """A class's name in a text: tokens `start` to `end` (exclusive)."""

    start: int
    end: int
    label: str


class NameFinder:
    """Reads the class out of free text.

    Args:
        labels: the closed set.
        synonyms: further names by class; under `NO_CLASS` phrases that hold a name and mean something else.
    """

    def __init__(self, labels: Sequence[str], synonyms: Mapping[str, Sequence[str]]) -> None:
        told = [
            (words, label)
            for label in (NO_CLASS, *labels)
            for name in (*synonyms.get(plain_name(label), ()), label)
            for words in _spellings(name)
        ]
        # A name that is given counts before a plural that is made: "glasses" beside "glass".
        self.names = {(*words[:-1], plural(words[-1])): label for words, label in told} | dict(told)
        self.longest = max(map(len, self.names))

    def find(self, text: str) -> str | None:
        """The class that the text names; None when it names none, or leaves open which of two."""
        tokens = tokenize(text)
        mentions = self._mentions(tokens)
        spoken = [mention for mention in mentions if _is_said_of_the_object(tokens, mention, mentions)]
        if not spoken:
            return None
        first, *others = spoken
        if any(other.label != first.label and _is_alternative(tokens, first, other) for other in others):
            return None
        return first.label

    def _mentions(self, tokens: Sequence[str]) -> list[Mention]:
        """Names from left to right, the longest first; of names side by side the last, which is the head: a desk lamp."""
        found: list[Mention] = []
        position = 0
        while position < len(tokens):
            end = self._longest_name(tokens, position)
            if end is None:
                position += 1
                continue
            if found and found[-1].end == position:
                found.pop()
            found.append(Mention(position, end, self.names[tuple(tokens[position:end])]))
            position = end
        return [mention for mention in found if mention.label != NO_CLASS]

    def _longest_name(self, tokens: Sequence[str], start: int) -> int | None:
        for end in range(min(len(tokens), start + self.longest), start, -1):
            if tuple(tokens[start:end]) in self.names:
                return end
        return None


def plural(word: str) -> str:
    """A noun's plural."""
    if word in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[word]
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        return word[:-1] + "ies"
    return word + "s"


def tokenize(text: str) -> list[str]:
    """Words and punctuation in lower case; hyphens and underscores part words, but for endings such as "-shaped" and what
    begins with a negation, such as "non-stick", which says nothing against the thing behind it."""
    return TOKEN.findall(NEGATED_WORD.sub(lambda found: found[0].replace("-", ""), _plain(text)))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'").replace("\n", " . ").replace("_", " ")


def _spellings(name: str) -> list[tuple[str, ...]]:
    """A name's words; of "no-parking sign" also those that an answer with the hyphen has."""
    words = tuple(TOKEN.findall(_plain(name)))
    if len(words) > 1 and words[0] in NEGATIONS:
        return [words, (words[0] + words[1], *words[2:])]
    return [words] if words else []


def _is_said_of_the_object(tokens: Sequence[str], mention: Mention, mentions: Sequence[Mention]) -> bool:
    following, then = (*tokens[mention.end : mention.end + 2], "", "")[:2]
    if following in WORDS["parts"] or (following in WORDS["likeness"] and then != "like"):
        return False
    return not (
        _is_negated(tokens, mention)
        or _is_beside_the_object(tokens, mention, mentions)
        or _is_part_of(tokens, mention.start)
    )


def _clause_start(tokens: Sequence[str], position: int, stops: frozenset[str]) -> int:
    return next((index + 1 for index in range(position - 1, -1, -1) if tokens[index] in stops), 0)


def _is_negated(tokens: Sequence[str], mention: Mention) -> bool:
    start = _clause_start(tokens, mention.start, STOPS)
    for position in range(mention.start - 1, start - 1, -1):
        pair = tuple(tokens[position : position + 2])
        if tokens[position] in WORDS["negators"] or tokens[position].endswith("n't") or pair in NEGATING_PAIRS:
            return _negation_reaches(tokens, position + (2 if pair in NEGATING_PAIRS else 1), mention)
    return False


def _negation_reaches(tokens: Sequence[str], after: int, mention: Mention) -> bool:
    between = tokens[after : mention.start]
    if WORDS["unnegated"] & set(between[:3]):
        return False
    if WORDS["opinions"] & set(between):
        return "," not in between
    if WORDS["statements"] & set(between):
        return False
    if "," not in between:
        return True
    # "not a chair, a table or a lamp" goes on; "not a chair, a table" does not.
    end = next((index for index in range(after, len(tokens)) if tokens[index] in STOPS), len(tokens))
    return bool({"or", "nor"} & set(tokens[after:end]))


def _is_beside_the_object(tokens: Sequence[str], mention: Mention, mentions: Sequence[Mention]) -> bool:
    freeing = WORDS["statements"] | WORDS["comparisons"] | WORDS["idioms"] | {"of"}
    start = max(_clause_start(tokens, mention.start, CLAUSE_ENDS), mention.start - RELATION_REACH)
    for position in range(mention.start - 1, start - 1, -1):
        if tokens[position] in freeing:
            return False
        if tokens[position] in WORDS["relations"]:
            return not any(other.start <= position < other.end for other in mentions)
    return False


def _is_part_of(tokens: Sequence[str], position: int) -> bool:
    start = max(_clause_start(tokens, position, CLAUSE_ENDS), position - OF_REACH)
    for index in range(position - 1, start - 1, -1):
        if tokens[index] in WORDS["statements"] | WORDS["comparisons"]:
            return False
        if tokens[index] == "of" and index > 0:
            return tokens[index - 1] not in WORDS["wholes"]
    return False


def _is_alternative(tokens: Sequence[str], first: Mention, other: Mention) -> bool:
    """Whether the text leaves open which of the two it is: "a chair or a small table"."""
    between = tokens[first.end : other.start]
    return (
        between[:1] == ["or"]
        and len(between) <= RELATION_REACH
        and not set(between) & (CLAUSE_ENDS | WORDS["relations"])
    )


class MatchJudge:
    """Finds the class that an answer names; for the closed set alone."""

    name = "match"

    def __call__(
        self, task: Task, answers: Sequence[Answer], advance: Callable[[int], None] = lambda count: None
    ) -> list[Verdict]:
        """One verdict per answer; naming no class, or leaving open which of two, is a wrong answer without a class.

        Raises:
            ConfigError: for a task without classes.
            DataError: when an answer's truth is not one of the classes.
        """
        if task.kind != "closed-set":
            suited = "llm or hf" if task.kind == "open-vocabulary" else "embedding, llm or hf"
            raise refuse_task(self.name, task, suited)
        finder = NameFinder(task.labels, synonyms_of(task))
        verdicts = []
        for answer in answers:
            verdicts.append(class_verdict(task, answer, finder.find(answer.model_output)))
            advance(1)
        return verdicts
