"""Colour names by known colours, and instructions in PointLLM's format."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from pointalign.data.colors import dominant_colors, name_colors, srgb_to_oklab
from pointalign.data.household import HouseholdObject, household_classes, load_household
from pointalign.data.household_phrases import PROPORTIONS
from pointalign.data.household_text import (
    build_captions,
    build_conversations,
    build_instructions,
    describe,
    label_phrases,
    proportions,
    reference_caption,
)


@pytest.fixture(scope="module")
def objects() -> list[HouseholdObject]:
    return load_household()


@pytest.fixture(scope="module")
def instructions(objects: list[HouseholdObject]) -> list[dict]:
    return build_instructions(objects)


@pytest.fixture(scope="module")
def captions(objects: list[HouseholdObject]) -> dict[str, str]:
    return {thing.id: reference_caption(thing) for thing in objects}


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((1, 1, 1), (1, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((1, 0, 0), (0.62796, 0.22486, 0.12585)),
        ((0, 1, 0), (0.86644, -0.23389, 0.17950)),
        ((0, 0, 1), (0.45201, -0.03246, -0.31153)),
    ],
)
def test_oklab_of_known_colors(rgb: tuple[float, ...], lab: tuple[float, ...]) -> None:
    np.testing.assert_allclose(srgb_to_oklab(np.array(rgb)), lab, atol=1e-4)


@pytest.mark.parametrize(
    ("hex_color", "base"),
    [
        ("#ffffff", "white"),
        ("#000000", "black"),
        ("#808080", "gray"),
        ("#c0c0c0", "gray"),
        ("#ff0000", "red"),
        ("#b22222", "red"),
        ("#00ff00", "green"),
        ("#006400", "green"),
        ("#556b2f", "green"),
        ("#3b4a36", "green"),
        ("#46573f", "green"),
        ("#0000ff", "blue"),
        ("#4682b4", "blue"),
        ("#000080", "blue"),
        ("#ffff00", "yellow"),
        ("#ffd700", "yellow"),
        ("#ffa500", "orange"),
        ("#800080", "purple"),
        ("#ffc0cb", "pink"),
        ("#8b4513", "brown"),
        ("#a0522d", "brown"),
        ("#5c4033", "brown"),
        ("#d2b48c", "beige"),
        ("#f5f5dc", "beige"),
        ("#008080", "teal"),
    ],
)
def test_names_of_known_colors(hex_color: str, base: str) -> None:
    rgb = np.array([int(hex_color[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    assert name_colors(rgb)[0][1] == base


@pytest.mark.parametrize(
    ("object_id", "base"),
    [
        ("scopia-cypress", "green"),
        ("scopia-hedge", "green"),
        ("scopia-pine", "green"),
        ("blend-swap-cc-0-oaktable", "brown"),
        ("scopia-wood-bank", "brown"),
        ("kator-legaz-fire-hydrant", "red"),
        ("blend-swap-cc-0-plasticchair", "blue"),
        ("blend-swap-cc-0-potty", "pink"),
        ("scopia-rabbit", "white"),
        ("blend-swap-cc-0-pianoaqueue", "black"),
    ],
)
def test_main_color_of_real_objects(objects: list[HouseholdObject], object_id: str, base: str) -> None:
    thing = next(thing for thing in objects if thing.id == object_id)
    assert dominant_colors(thing.points[:, 3:])[0].base == base


def test_dominant_colors_are_shares() -> None:
    rgb = np.repeat([[1.0, 0, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]], [60, 25, 10, 5], axis=0)
    found = dominant_colors(rgb)
    assert [(color.name, color.share) for color in found] == [("red", 0.6), ("blue", 0.25)]
    shades = np.repeat([[0.0, 0, 1], [0, 0, 0.4], [1, 1, 1]], [30, 30, 40], axis=0)
    assert [color.base for color in dominant_colors(shades)] == ["blue", "white"]
    many = np.eye(3)[np.arange(300) % 3]
    assert len(dominant_colors(np.concatenate([many, np.ones((100, 3))]))) == 3


@pytest.mark.parametrize(
    ("extents", "shape"),
    [
        ((1, 0.05, 1), "flat"),
        ((1, 0.05, 0.2), "flat long"),
        ((1, 1, 0.05), "panel"),
        ((1, 2.2, 0.1), "panel tall"),
        ((0.2, 1, 0.2), "slender"),
        ((0.5, 1, 0.5), "tall"),
        ((1, 0.3, 0.2), "long"),
        ((1, 0.4, 0.6), "low"),
        ((1, 1.1, 0.9), "compact"),
        ((1, 0.8, 0.5), "wide"),
        ((1, 1.3, 0.5), "upright"),
        ((1, 1, 0.5), "shallow"),
    ],
)
def test_proportions(extents: tuple[float, ...], shape: str) -> None:
    assert proportions(extents) == shape
    assert proportions(extents[::-1]) == shape
    assert shape in PROPORTIONS


def test_format(objects: list[HouseholdObject], instructions: list[dict]) -> None:
    kinds = defaultdict(Counter)
    for item in instructions:
        assert set(item) == {"object_id", "conversation_type", "conversations"}
        kinds[item["object_id"]][item["conversation_type"]] += 1
        turns = item["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].startswith("<point>\n")
        assert all("<point>" not in turn["value"] for turn in turns[1:])
        assert (len(turns) > 2) == (item["conversation_type"] == "multi_round")
    expected = {"simple_description": 3, "detailed_description": 1, "single_round": 3, "multi_round": 1}
    assert [kinds[thing.id] for thing in objects] == [expected] * len(objects)
    asked = {item["conversations"][0]["value"] for item in instructions}
    assert {"<point>\nWhat is this?", "<point>\nCaption this 3D model in detail."} <= asked


def test_deterministic(objects: list[HouseholdObject], instructions: list[dict]) -> None:
    assert json.dumps(build_instructions(objects[:40])) == json.dumps(instructions[: 40 * 8])


def test_answers_hold_only_what_the_cloud_shows(
    objects: list[HouseholdObject], instructions: list[dict], captions: dict[str, str]
) -> None:
    answers = [turn["value"] for item in instructions for turn in item["conversations"] if turn["from"] == "gpt"]
    for answer in [*answers, *captions.values()]:
        assert not re.search(r"\d", answer.replace("3D model", "")), answer
        assert not re.search(r"\b(cm|meters?|centimeters?|inch(es)?)\b", answer), answer
        assert re.fullmatch(r"[A-Z].*\.", answer), answer
        assert not re.search(r"\b[Aa] [aeio]|\b[Aa]n [bcdfgjklmnpqrtvwxyz]|  |\{", answer), answer
    moved = replace(objects[0], size_cm=(1.0, 2.0, 3.0), name="x", creator="y")
    assert reference_caption(moved) == reference_caption(objects[0])


def test_answers_name_the_class(objects: list[HouseholdObject], instructions: list[dict]) -> None:
    labels = {thing.id: thing.label for thing in objects}
    for item in instructions:
        if item["conversation_type"] != "single_round":
            assert labels[item["object_id"]] in item["conversations"][1]["value"]
    assert set(label_phrases()) == set(household_classes())


def test_same_caption_only_for_same_facts(
    objects: list[HouseholdObject], instructions: list[dict], captions: dict[str, str]
) -> None:
    facts = {thing.id: describe(thing) for thing in objects}
    by_caption = defaultdict(set)
    for thing in objects:
        by_caption[captions[thing.id]].add(replace(facts[thing.id], upper_color=None, lower_color=None))
    for item in instructions:
        if item["conversation_type"] == "detailed_description":
            by_caption[item["conversations"][1]["value"]].add(
                replace(facts[item["object_id"]], upper_color=None, lower_color=None)
            )
    assert all(len(found) == 1 for found in by_caption.values())


def test_phrasings_vary(instructions: list[dict]) -> None:
    questions = Counter(
        item["conversations"][0]["value"]
        for item in instructions
        if item["conversation_type"] in {"simple_description", "detailed_description"}
    )
    assert len(questions) >= 12
    starts = Counter(" ".join(item["conversations"][1]["value"].split()[:2]) for item in instructions)
    assert len(starts) >= 8


def test_captions_are_written_as_references_are(objects):
    captions = build_captions(objects[:5])
    assert [item["object_id"] for item in captions] == [thing.id for thing in objects[:5]]
    for item, thing in zip(captions, objects, strict=False):
        assert item["conversation_type"] == "caption"
        question, answer = item["conversations"]
        assert question == {"from": "human", "value": "<point>\nCaption this 3D model in detail."}
        assert answer == {"from": "gpt", "value": reference_caption(thing)}
    assert build_conversations(objects[:5]) == [*build_instructions(objects[:5]), *captions]
