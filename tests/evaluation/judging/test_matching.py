"""The match judge on answers written to trip it, and the tables of synonyms it reads."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from pointalign.data.household import LABELS_FILE, household_classes
from pointalign.errors import ConfigError, DataError
from pointalign.evaluation.judging import build_judge, load_task
from pointalign.evaluation.judging.label_sets import NO_CLASS, read_label_set, true_label
from pointalign.evaluation.judging.matching import NameFinder, plural, tokenize
from pointalign.evaluation.records import Answer, Task

# What an answer names among ModelNet40's classes; None where it names none or leaves it open.
MODELNET40 = {
    "plain names, in any form": {
        "chair": "chair",
        "Chair.": "chair",
        "**Chair**": "chair",
        '"chair"': "chair",
        "object: chair": "chair",
        "This is a 3D model of a wooden chair with four legs.": "chair",
        "An object of stairs": "stairs",
        "night_stand": "night stand",
        "TV-stand": "tv stand",
        "XBOX 360": "xbox",
    },
    "plurals": {
        "two chairs": "chair",
        "bookshelves": "bookshelf",
        "glass boxes": "glass box",
        "benches": "bench",
        "people": "person",
        "mantelpieces": "mantel",
        "a flight of stairs": "stairs",
        "a set of stairs": "stairs",
    },
    "synonyms": {
        "An aircraft with propellers": "airplane",
        "a jet fighter": "airplane",
        "a bedside table": "night stand",
        "a couch or sofa": "sofa",
        "TV": "monitor",
        "a chest of drawers": "dresser",
        "a washbasin": "sink",
        "a wash basin": "sink",
        "a coffee mug": "cup",
        "a pot for plants": "flower pot",
        "an extractor hood": "range hood",
        "a fireplace": "mantel",
        "a glass display case": "glass box",
        "an armoire": "wardrobe",
        "a game console": "xbox",
    },
    "the longest name wins": {
        "a tv stand": "tv stand",
        "a stand for a TV": "tv stand",
        "a flower pot": "flower pot",
        "a glass box": "glass box",
        "a sofa bed": "sofa",
        "a toilet bowl": "toilet",
        "a step stool": "stool",
        "a night stand": "night stand",
        "an arm chair": "chair",
    },
    "of names side by side the last is the head": {
        "a desk lamp": "lamp",
        "a desk chair": "chair",
        "a table lamp on a desk": "lamp",
        "a flower vase": "vase",
        "a piano bench": "bench",
        "a laptop keyboard": "keyboard",
        "a bowl sink": "sink",
        "a bed lamp": "lamp",
    },
    "only whole words": {
        "a cardigan": None,
        "a scar": None,
        "a carpet": None,
        "carpentry": None,
        "indoors": None,
        "a bottleneck": None,
        "a toolbox": None,
        "vasectomy": None,
        "a blamp": None,
    },
    "false friends": {
        "a flower bed": None,
        "a flat plane": None,
        "a toilet paper roll": None,
        "an ice cream cone": None,
        "a bench press": None,
        "a snow man": None,
        "a man-made object": None,
        "a heat sink": None,
        "a radio tower": None,
        "an Xbox controller": None,
        "a power plant": None,
        "a folding screen": None,
    },
    "likeness and parts are not the thing": {
        "a cone-shaped lamp": "lamp",
        "a bowl-shaped sink": "sink",
        "a chair-like object": None,
        "a human-shaped robot": None,
        "an object shaped like a chair": "chair",
        "a chair shaped like an egg": "chair",
        "a chair leg": None,
        "the leg of a chair": None,
        "the chair's leg": None,
        "a car seat": None,
        "a rectangular table top": None,
        "a statue of a person": None,
        "a monitor stand": None,
        "a model of an airplane": "airplane",
        "in the shape of a car": "car",
    },
    "what is beside, in or on the object is not the object": {
        "a plant in a flower pot": "plant",
        "a flower pot with a plant in it": "flower pot",
        "a vase with flowers": "vase",
        "a nightstand with a lamp on it": "night stand",
        "a man sitting on a bench": "person",
        "a cat on a chair": None,
        "a cabinet with two doors": None,
        "a box made of glass": None,
        "a laptop with a keyboard and a screen": "laptop",
        "an object with a keyboard, likely a laptop": "laptop",
        "With four legs and a flat top, this is a table": "table",
        "In the image, a chair stands": "chair",
        "In fact a chair": "chair",
        "a cup of coffee": "cup",
        "a bottle without a cap": "bottle",
    },
    "negation": {
        "This is not a chair.": None,
        "a non-chair": None,
        "It is not-a chair": None,
        "a non-functional guitar": "guitar",
        "a not-so-small chair": "chair",
        "a never-before-seen guitar": "guitar",
        "a no-frills chair": "chair",
        "It isn't a chair, it's a stool": "stool",
        "It isn\u2019t a chair": None,
        "not a chair but a stool": "stool",
        "Not a chair, a table.": "table",
        "not a chair, table or lamp": None,
        "not a plant, a vase or a cup, but a lamp": "lamp",
        "neither a chair nor a table": None,
        "rather than a chair, this is a table": "table",
        "instead of a table, a desk": "desk",
        "Unlike a chair, it is a stool": "stool",
        "I don't think it's a chair": None,
        "I cannot tell whether this is a chair or a stool": None,
        "I am not sure what it is, but it looks like a chair": "chair",
        "It has no legs and is a sofa": "sofa",
        "The chair is not white.": "chair",
        "This object is a chair. It is not a table.": "chair",
        "It is not only a chair": "chair",
        "This is not a typical chair": "chair",
        "There is no doubt that this is a chair": "chair",
        "without a doubt a guitar": "guitar",
    },
    "two classes": {
        "a chair or a table": None,
        "a chair or a small wooden table": None,
        "a chair or an armchair": "chair",
        "It could be a chair, or maybe a table": "chair",
        "a chair and a table": "chair",
        "a chair. Behind it a table.": "chair",
        "a table, perhaps a desk": "table",
    },
    "nothing": {"": None, "...": None, "Something abstract.": None, "\u6905\u5b50": None},
}
CASES = [(kind, text, label) for kind, texts in MODELNET40.items() for text, label in texts.items()]

HOUSEHOLD = {
    "This is a tool: a pair of scissors.": "tool",
    "a light switch": "wall plate",
    "an iron bed": "bed",
    "a stone lantern": "lamp",
    "a toy car": "toy",
    "a sedan": "vehicle",
    "a scale model of a car": "vehicle",
    "a music keyboard": "music equipment",
    "a computer keyboard": "electronics",
    "a vase": "decoration",
    "a vase of flowers": "plant",
    "a glass dining table": "table",
    "a three-seat sofa": "sofa",
    "This structure appears to be a table.": "table",
    "a table tennis bat": "sports equipment",
    "a kitchen cabinet with a sink": "cabinet",
    "a license plate": None,
    "a wall plate": "wall plate",
    "a loaf of bread": "food",
    "two knives": "kitchenware",
}


@pytest.fixture(scope="module")
def modelnet40() -> NameFinder:
    return NameFinder(*read_label_set("modelnet40"))


@pytest.mark.parametrize(("kind", "text", "label"), CASES, ids=[text for _, text, _ in CASES])
def test_modelnet40(kind: str, text: str, label: str | None, modelnet40: NameFinder) -> None:
    assert modelnet40.find(text) == label, kind


@pytest.mark.parametrize("text", HOUSEHOLD)
def test_household(text: str) -> None:
    assert NameFinder(*read_label_set("household")).find(text) == HOUSEHOLD[text]


def test_most_of_the_households_nouns_are_known() -> None:
    """The table was written with these nouns in sight, so this shows that nothing fell out, not how well it does."""
    finder = NameFinder(*read_label_set("household"))
    with LABELS_FILE.open(newline="", encoding="utf-8") as file:
        rows = {(row["noun"], row["label"]) for row in csv.DictReader(file)}
    found = [(finder.find(f"This is {noun}."), label) for noun, label in rows]
    assert sum(guess == label for guess, label in found) >= 0.99 * len(rows)
    assert all(finder.find(f"This is a {label}: {noun}.") == label for noun, label in rows)


@pytest.mark.parametrize(("name", "count"), [("modelnet40", 40), ("household", 30)])
def test_the_tables_hold_what_they_should(name: str, count: int) -> None:
    labels, synonyms = read_label_set(name)
    assert len(labels) == count
    assert set(synonyms) == {*labels, NO_CLASS}
    finder = NameFinder(labels, synonyms)
    for label in labels:
        for other in (label, *synonyms[label]):
            assert finder.find(f"a {other}") == label, other
    alone = NameFinder(labels, {label: synonyms[label] for label in labels})
    for phrase in synonyms[NO_CLASS]:
        assert finder.find(f"a {phrase}") is None, phrase
        words = tokenize(phrase)
        assert any(tuple(words[i:j]) in alone.names for i in range(len(words)) for j in range(i + 1, len(words) + 1)), (
            f"{phrase!r} holds no name, so it guards against nothing"
        )


def test_modelnet40_has_its_indices_and_household_its_classes() -> None:
    labels, _ = read_label_set("modelnet40")
    assert [labels[index] for index in (0, 8, 15, 23, 39)] == ["airplane", "chair", "flower pot", "night stand", "xbox"]
    assert list(labels) == sorted(labels)
    assert list(read_label_set("household")[0]) == household_classes()


def test_names_that_begin_with_a_negation() -> None:
    finder = NameFinder(["no-parking sign", "non stick pan", "stop sign", "pan"], {})
    for text, label in {
        "a no-parking sign": "no-parking sign",
        "a no parking sign": "no-parking sign",
        "non-stick pans": "non stick pan",
        "a nonstick pan": "non stick pan",
        "no pan": None,
        "not a stop sign": None,
    }.items():
        assert finder.find(text) == label, text


def test_plurals() -> None:
    words = {"box": "boxes", "bench": "benches", "toy": "toys", "body": "bodies", "knife": "knives", "piano": "pianos"}
    assert {word: plural(word) for word in words} == words


@pytest.mark.parametrize("labels", [["glass", "glasses"], ["glasses", "glass"]])
def test_a_name_that_is_given_counts_before_a_plural_that_is_made(labels: list[str]) -> None:
    finder = NameFinder(labels, {})
    assert finder.find("a pair of glasses") == "glasses"
    assert finder.find("a glass") == "glass"


def test_a_users_own_labels(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("label,synonyms\nHex bolt,bolt; machine screw\nWasher\n,washer fluid\n", encoding="utf-8-sig")
    task = load_task("closed-set", path)
    assert task.labels == ("hex bolt", "washer")
    answers = [Answer("a", 0, "A machine screw"), Answer("b", "Washer", "washer fluid"), Answer("c", 1, "two washers")]
    assert [verdict.predicted for verdict in build_judge("match")(task, answers)] == ["hex bolt", None, "washer"]


def test_labels_with_capitals_and_no_synonyms_of_their_own() -> None:
    task = Task("closed-set", ("Night Stand", "TV/monitor"))
    answers = [Answer("a", "Night Stand", "a night-stand"), Answer("b", 1, "a TV/monitor"), Answer("c", 1, "a tv")]
    assert [verdict.correct for verdict in build_judge("match")(task, answers)] == [True, True, False]


def test_a_task_without_synonyms_gets_those_of_the_set_with_its_classes() -> None:
    task = Task("closed-set", tuple(household_classes()))
    [verdict] = build_judge("match")(task, [Answer("a", "sofa", "a couch")])
    assert (verdict.predicted, verdict.correct, verdict.valid) == ("sofa", True, True)
    [verdict] = build_judge("match")(Task("closed-set", task.labels, {}), [Answer("a", "sofa", "a couch")])
    assert (verdict.predicted, verdict.correct, verdict.valid) == (None, False, True)


BAD_LABELS = {
    "name,other\nchair,x\n": "has the columns name, other; its first line must be label,synonyms",
    "": r"has the columns \(none\); its first line must be label,synonyms",
    "label\n": "has no labels",
    "label,synonyms\nchair,seat\ntable,seat\n": "gives 'seat' twice",
    "label,synonyms\nchair,\nchair,\n": "gives 'chair' twice",
}


@pytest.mark.parametrize("text", BAD_LABELS)
def test_bad_tables_of_labels(text: str, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=BAD_LABELS[text]):
        load_task("closed-set", tmp_path / "labels.csv")


def test_labels_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give modelnet40 or household, or a CSV file of label,synonyms"):
        load_task("closed-set", tmp_path / "nothing.csv")
    (tmp_path / "latin.csv").write_bytes("label\ncaf\u00e9\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8 text"):
        load_task("closed-set", tmp_path / "latin.csv")


def test_the_truth_is_an_index_or_a_name() -> None:
    task = load_task("closed-set")
    assert true_label(task, Answer("a", 23, "", None)) == "night stand"
    assert true_label(task, Answer("a", "23", "", None)) == "night stand"
    assert true_label(task, Answer("a", "Night Stand", "", None)) == "night stand"
    assert true_label(task, Answer("a", "a description", "", "night_stand")) == "night stand"
    for answer in (
        Answer("a", 40, ""),
        Answer("a", "nothing", ""),
        Answer("a", 0, "", "nothing"),
        Answer("a", None, ""),
    ):
        with pytest.raises(DataError, match="is not one of the 40 classes airplane to xbox; give the right --labels"):
            true_label(task, answer)
    with pytest.raises(DataError, match="'chair' by its label_name and 'car' by its ground_truth"):
        true_label(task, Answer("a", 7, "", "chair"))


def test_other_tasks_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not judge captioning; use --judge embedding, llm or hf"):
        build_judge("match")(Task("captioning"), [])
    with pytest.raises(ConfigError, match="does not judge open-vocabulary; use --judge llm or hf"):
        build_judge("match")(Task("open-vocabulary"), [])
