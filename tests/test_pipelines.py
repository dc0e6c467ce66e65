"""`pointalign.pipeline`: one object, lists, iterators; captions, labels, conversations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pointalign
from pointalign.data.files import PointCloud
from pointalign.errors import ConfigError, DataError
from pointalign.options import Decoding
from pointalign.pipelines import CaptionPipeline, ChatPipeline, ClassifyPipeline

SHORT: dict[str, Any] = {"max_new_tokens": 7, "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    return np.random.default_rng(0).random((5, 60, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def caption(tiny_model: Path) -> CaptionPipeline:
    return pointalign.pipeline("caption", tiny_model, **SHORT)


@pytest.fixture(scope="module")
def classify(tiny_model: Path) -> ClassifyPipeline:
    return pointalign.pipeline("classify", tiny_model, labels=["chair", "table"], dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatPipeline:
    return pointalign.pipeline("chat", tiny_model, **SHORT)


def test_every_form_of_an_object_gives_the_same(caption: CaptionPipeline, points: np.ndarray, tmp_path: Path) -> None:
    cloud = points[0]
    np.save(tmp_path / "a.npy", cloud)
    told = caption(cloud)
    assert told.keys() == {"caption"}
    assert caption(torch.from_numpy(cloud)) == told
    assert caption(PointCloud(cloud[:, :3], cloud[:, 3:], "a")) == told
    near = [caption(str(tmp_path / "a.npy")), caption(tmp_path / "a.npy")]  # cut to the model's points by the reader
    assert near[0] == near[1]
    assert (
        caption.answerer.ask([caption.answerer.prepare(cloud)], "Caption this 3D model in detail.", Decoding(7))[0].text
        == (told["caption"])
    )


def test_lists_are_answered_in_batches_as_one_by_one(caption: CaptionPipeline, points: np.ndarray) -> None:
    alone = [caption(cloud) for cloud in points]
    assert caption(list(points)) == alone
    assert caption(tuple(points), batch_size=2) == alone
    assert caption(points) == alone
    assert caption(torch.from_numpy(points), batch_size=5) == alone
    assert caption([]) == []
    assert len({told["caption"] for told in alone}) > 1


def test_an_iterator_is_read_as_far_as_it_is_asked(caption: CaptionPipeline, points: np.ndarray) -> None:
    taken = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal taken
        while True:
            taken += 1
            yield points[taken % 5]

    results = caption(endless(), batch_size=2)
    assert taken == 0
    assert next(results) == caption(points[1])
    assert taken == 2
    assert [next(results) for _ in range(3)] == caption(points[[2, 3, 4]])
    assert taken == 4


def test_options_of_the_pipeline_and_of_a_call(tiny_model: Path, caption: CaptionPipeline, points: np.ndarray) -> None:
    warm = pointalign.pipeline("caption", tiny_model, temperature=1.0, seed=1, **SHORT)
    assert warm(points[0]) == warm(points[0]) == caption(points[0], temperature=1.0, seed=1)
    assert warm(points[0], temperature=0) == caption(points[0])
    assert caption(points[0], question="Colour?") != caption(points[0])
    assert len(caption(points[0], max_new_tokens=1)["caption"]) <= 1
    assert caption.device == torch.device("cpu")
    assert caption.model.dtype == torch.float32


def test_labels_are_scored(classify: ClassifyPipeline, points: np.ndarray) -> None:
    first = classify(points[0])
    assert [entry["label"] for entry in first] in (["chair", "table"], ["table", "chair"])
    assert first[0]["score"] >= first[1]["score"]
    assert sum(entry["score"] for entry in first) == pytest.approx(1)
    batched = classify(points, batch_size=3)
    for entries, cloud in zip(batched, points, strict=True):
        alone = {e["label"]: e["score"] for e in classify(cloud)}
        assert {e["label"]: e["score"] for e in entries} == pytest.approx(alone, abs=1e-5)
    assert classify(points[0], labels="chair, table") == first
    assert len(classify(points[0], labels=["a", "b", "c", "a"])) == 3
    assert classify(points[0], top_k=1) == first[:1]


def test_conversations_are_answered(chat: ChatPipeline, points: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", points[0])
    shown = {"type": "point_cloud", "path": str(tmp_path / "a.npy")}
    asked = {"role": "user", "content": [shown, {"type": "text", "text": "What is this?"}]}
    first = chat([asked])
    assert first["messages"] == [asked, {"role": "assistant", "content": first["answer"]}]
    follow_up = [*first["messages"], {"role": "user", "content": "Why?"}]
    by_points = [
        {"role": "user", "content": [{"type": "point_cloud", "points": points[1]}, {"type": "text", "text": "Hm?"}]}
    ]
    assert chat([follow_up, by_points], batch_size=2) == [chat(follow_up), chat(by_points)]
    assert chat(points[1], question="Hm?")["answer"] == chat(by_points)["answer"]
    assert [told["answer"] for told in chat(list(points[:2]), question="Hm?")][1] == chat(by_points)["answer"]
    # What a call gives can be asked on, whatever the object came as.
    for thing in (points[0], str(tmp_path / "a.npy"), tmp_path / "a.npy"):
        told = chat(thing, question="What is this?")
        assert told["answer"] == first["answer"]
        assert chat([*told["messages"], {"role": "user", "content": "Why?"}])["answer"] == chat(follow_up)["answer"]
    assert "".join(chat.stream(follow_up)) == chat(follow_up)["answer"]
    talk = chat.about(tmp_path / "a.npy")
    assert ["".join(talk.ask(question)) for question in ("What is this?", "Why?")] == [
        first["answer"],
        chat(follow_up)["answer"],
    ]


BAD_INPUTS: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "missing file": ("caption", "missing.ply", {}, "no 3D file at missing.ply"),
    "half a character": ("chat", np.ones((60, 3)), {"question": "caf\udce9"}, r"'caf\?' is not UTF-8 text"),
    "no words": ("chat", np.ones((60, 3)), {"question": 3}, "3 is no text; give a string"),
    "a number as text": (
        "caption",
        np.ones((60, 3)),
        {"max_new_tokens": "4"},
        "max_new_tokens is a whole number; got '4'",
    ),
    "a folder": ("caption", "/", {}, "is a folder; give one 3D file"),
    "no object": ("caption", 7, {}, "int is no kind of object"),
    "a dict": ("caption", {"a": 1}, {}, "dict is no kind of object"),
    "none": ("caption", None, {}, "NoneType is no kind of object"),
    "wrong shape": ("caption", np.zeros((60, 4)), {}, r"has shape \(points, 3\) or \(points, 6\)"),
    "one bad of many": ("caption", [np.ones((60, 3)), np.full((60, 3), np.nan)], {}, "60 of 60 points hold NaN"),
    "unknown option": ("caption", np.ones((60, 3)), {"max_tokens": 3}, "did you mean max_new_tokens"),
    "no batch": ("caption", np.ones((60, 3)), {"batch_size": 0}, "batch_size 0 leaves no object"),
    "no labels": ("classify", np.ones((60, 3)), {"labels": []}, "no label is given"),
    "empty labels": ("classify", np.ones((60, 3)), {"labels": " ,"}, "names no label"),
    "no top": ("classify", np.ones((60, 3)), {"top_k": 0}, "top_k 0 leaves no label"),
    "no question": ("chat", np.ones((60, 3)), {}, "there is no question about the object"),
    "no messages": ("chat", [[]], {}, "a conversation is a list of messages"),
    "no role": ("chat", [{"content": "x"}], {}, "a message is a dict with role"),
    "answered": ("chat", [{"role": "assistant", "content": "x"}], {}, "the last message is not the user's"),
    "no content": (
        "chat",
        [{"role": "user", "content": None}],
        {},
        "a message's content is a string or a list of parts",
    ),
    "unknown part": ("chat", [{"role": "user", "content": [{"type": "image"}]}], {}, "a part of a message is"),
    "part without cloud": ("chat", [{"role": "user", "content": [{"type": "point_cloud"}]}], {}, "with path or points"),
    "too long": ("chat", [{"role": "user", "content": "x" * 600}], {}, "more than the language model's 512"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_clear_error(
    case: str, caption: CaptionPipeline, classify: ClassifyPipeline, chat: ChatPipeline
) -> None:
    task, inputs, options, message = BAD_INPUTS[case]
    pipe: Any = {"caption": caption, "classify": classify, "chat": chat}[task]
    with pytest.raises((DataError, ConfigError), match=message) as raised:
        pipe(inputs, **options)
    assert "\n" not in str(raised.value)


def test_a_bad_pipeline_is_refused_before_anything_is_answered(tiny_model: Path) -> None:
    make: Any = pointalign.pipeline
    with pytest.raises(ConfigError, match="there is no task 'captions'; known are caption, classify, chat"):
        make("captions", tiny_model)
    with pytest.raises(ConfigError, match="no option 'labels'"):
        make("caption", tiny_model, labels=["a"])
    with pytest.raises(ConfigError, match="no option 'beams'"):
        make("chat", tiny_model, beams=2)
    assert callable(pointalign.pipeline)  # the submodule of another name does not take its place
