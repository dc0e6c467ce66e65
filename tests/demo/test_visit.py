"""What visitors do, with tiny models and without a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pointalign.answering.answerer import Answerer
from pointalign.answering.conversation import Conversation
from pointalign.answering.reading import TimedReader
from pointalign.chat import harmless
from pointalign.data.files import PointCloud
from pointalign.demo import visit as visiting
from pointalign.demo.objects import about_html, bundled_cloud, choices, shelf, shelf_html, viewer_value
from pointalign.demo.uploads import Uploads, _Waiting
from pointalign.demo.visit import Desk, Visit
from pointalign.errors import ConfigError, DataError
from pointalign.options import AS_THE_FILE_SAYS, Decoding, Page

SHORT = Decoding(max_new_tokens=8)


def cloud(seed: int = 0, colors: bool = True) -> PointCloud:
    numbers = np.random.default_rng(seed).random((60, 6)).astype(np.float32)
    return PointCloud(numbers[:, :3], numbers[:, 3:] if colors else None, "thing.ply", ("read well",))


class NoReader:
    def read(self, path: str, options: Any) -> Any:
        raise AssertionError


def make_desk(models: list[Any], processor: Any, reader: Any = None, folder: Path = Path(), **page: Any) -> Desk:
    answerers = [Answerer(model, processor, f"model-{number}") for number, model in enumerate(models)]
    uploads = Uploads(folder, 1000)
    return Desk(answerers, uploads, reader or NoReader(), Page(**page), SHORT, AS_THE_FILE_SAYS)


@pytest.fixture
def models(build_model: Callable[..., Any]) -> list[Any]:
    return [build_model(seed=0), build_model(seed=1)]


@pytest.fixture
def desk(models: list[Any], processor: Any) -> Desk:
    return make_desk(models, processor)


def said(visit: Visit) -> list[list[str]]:
    return [[message["content"] for message in talk.messages] for talk in visit.talks]


def test_both_models_answer_as_in_a_conversation_of_their_own(desk: Desk) -> None:
    visit = desk.visit(cloud())
    questions = ["What is this?", "And its color?"]
    for question in questions:
        assert all(told == "" for told in desk.ask(visit, question))
    expected = []
    for answerer in desk.answerers:
        conversation = Conversation(answerer, cloud(), SHORT)
        expected.append([t for q in questions for t in (q, harmless("".join(conversation.ask(q))) or "(no words)")])
    assert said(visit) == expected
    assert expected[0] != expected[1]
    desk.clear(visit)
    assert said(visit) == [[], []]
    list(desk.ask(visit, questions[0]))
    assert said(visit) == [row[:2] for row in expected]


def test_a_question_that_is_too_long_asks_nobody(desk: Desk) -> None:
    visit = desk.visit(cloud())
    for question in ("x" * 600, "x" * 3000):
        with pytest.raises(DataError, match="question"):
            list(desk.ask(visit, question))
    assert said(visit) == [[], []]


def test_a_question_that_spells_the_point_token_asks_nobody(desk: Desk) -> None:
    visit = desk.visit(cloud())
    with pytest.raises(DataError, match="a text holds <point>"):
        list(desk.ask(visit, "what is <point>?"))
    assert said(visit) == [[], []]


def test_who_stops_keeps_what_was_said(models: list[Any], processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visiting, "SECONDS_BETWEEN_PIECES", -1.0)
    desk = make_desk(models, processor)
    visit = desk.visit(cloud())
    pieces = desk.ask(visit, "What is this?")
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    first = visit.talks[0]
    assert first.conversation is not None
    assert len(first.conversation.turns) == 1
    assert first.messages[-1]["content"]
    assert not desk._computing.locked()
    list(desk.ask(visit, "Go on"))
    assert [len(talk.messages) for talk in visit.talks] == [4, 3]


def test_an_answer_that_takes_too_long_is_cut(models: list[Any], processor: Any) -> None:
    desk = make_desk(models[:1], processor, answer_seconds=1e-9)
    visit = desk.visit(cloud())
    list(desk.ask(visit, "What is this?"))
    assert "(stopped after 1e-09 seconds)" in said(visit)[0][1]


def test_closing_stops_answers(desk: Desk) -> None:
    visit = desk.visit(cloud())
    desk.close()
    list(desk.ask(visit, "What is this?"))
    assert said(visit) == [["What is this?", ""]] * 2
    assert not desk._computing.locked()


def test_only_some_conversations_stay_warm(models: list[Any], processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visiting, "WARM_CONVERSATIONS", 2)
    desk = make_desk(models[:1], processor)
    visits = [desk.visit(cloud(seed)) for seed in range(3)]
    for visit in visits:
        list(desk.ask(visit, "What is this?"))
    warm = [visit.talks[0].conversation._cache is not None for visit in visits]  # type: ignore[union-attr]
    assert warm == [False, True, True]
    alone = Conversation(desk.answerers[0], cloud(0), SHORT)
    expected = [harmless("".join(alone.ask(question))) or "(no words)" for question in ("What is this?", "Again?")]
    list(desk.ask(visits[0], "Again?"))
    assert said(visits[0])[0][1::2] == expected


def test_labels(desk: Desk) -> None:
    visit = desk.visit(cloud())
    rows = desk.score(visit, "chair, table\nlamp, chair")
    assert [list(row) for row in rows] == [["chair", "table", "lamp"]] * 2
    expected = desk.answerers[1].probabilities([desk.answerers[1].prepare(cloud())], ["chair", "table", "lamp"])[0]
    assert list(rows[1].values()) == pytest.approx(expected.tolist())
    for text, match in (
        (" , ", "no label"),
        ("x" * 2001, "2,001 letters"),
        (",".join(map(str, range(61))), "61 labels"),
    ):
        with pytest.raises(ConfigError, match=match):
            desk.score(visit, text)


def test_turning_stands_z_up(desk: Desk) -> None:
    visit = desk.visit(cloud(colors=False))
    turned = desk.turned(visit)
    x, y, z = visit.cloud.points.T
    np.testing.assert_array_equal(turned.cloud.points, np.stack([x, z, -y], axis=1))
    assert visit.cloud.notes[-1].startswith("no colour: filled with")
    assert turned.cloud.notes == (*visit.cloud.notes, "turned by hand: z was up")


def test_models_are_called_by_name_not_by_path(models: list[Any], processor: Any, tmp_path: Path) -> None:
    desk = make_desk(models, processor)
    assert desk.names == ["model-0", "model-1"]
    (tmp_path / "baseline" / "model").mkdir(parents=True)
    desk.answerers[0].name = str(tmp_path / "baseline" / "model")
    desk.answerers[1].name = "someone/big"
    assert desk.names == ["baseline", "someone/big"]
    desk.answerers[1].name = str(tmp_path / "baseline")
    assert desk.names == ["A: baseline", "B: baseline"]


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[TimedReader]:
    with closing(TimedReader(tmp_path, 20)) as reader:
        yield reader


def test_a_file_is_read_told_by_its_name_and_deleted(
    models: list[Any], processor: Any, reader: TimedReader, tmp_path: Path
) -> None:
    desk = make_desk(models, processor, reader, tmp_path)

    def drop(name: str, data: bytes) -> str:
        (tmp_path / "word").mkdir()
        (tmp_path / "word" / name).write_bytes(data)
        desk.uploads._waiting["word"] = _Waiting(tmp_path / "word", name, 0)
        return "word"

    good = "\n".join(f"{x} {y} {x * y}" for x in range(8) for y in range(8)).encode()
    found = desk.read(drop("my cloud.xyz", good))
    assert (found.source, len(found)) == ("my cloud.xyz", 48)
    for name, data in (("empty.ply", b""), ("broken.glb", b"glTF but no more"), ("what.txt", b"no numbers at all")):
        with pytest.raises(DataError) as told:
            desk.read(drop(name, data))
        assert name in str(told.value)
        assert "word" not in str(told.value)
        assert str(tmp_path) not in str(told.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match=r"small\.ply.*at least"):
        desk.visit(PointCloud(np.zeros((3, 3), np.float32), None, "small.ply"))


# What is shown of clouds


def test_the_viewer_gets_the_cloud_in_the_unit_ball() -> None:
    import base64
    import json

    points = np.array([[10, 0, 0], [14, 0, 0], [12, 1, 0]], np.float32)
    value = json.loads(viewer_value(PointCloud(points, np.eye(3, dtype=np.float32), "a")))
    xyz = np.frombuffer(base64.b64decode(value["xyz"]), "<i2").reshape(-1, 3) / 32767
    rgb = np.frombuffer(base64.b64decode(value["rgb"]), np.uint8).reshape(-1, 3)
    radius = np.hypot(2, 0.5)
    np.testing.assert_allclose(xyz, (points - [12, 0.5, 0]) / radius, atol=2e-5)
    np.testing.assert_array_equal(rgb, 255 * np.eye(3))
    one = json.loads(viewer_value(PointCloud(points[:1], None, "a")))
    assert (one["spacing"], base64.b64decode(one["rgb"])) == (0.0, bytes([153] * 3))


def test_bundled_objects_are_the_held_out_ones_and_name_their_makers() -> None:
    ids = [object_id for _, object_id in choices()]
    assert len(ids) == len(set(ids)) == 100
    assert len({name for name, _ in choices()}) == 100
    assert set(shelf()) <= set(ids)
    assert "Scopia (CC-BY-3.0)" in bundled_cloud("scopia-dog").notes[0]
    with pytest.raises(DataError, match="no such bundled object"):
        bundled_cloud("nothing")
    assert shelf_html().count("data:image/png;base64,") == len(shelf()) == 10


def test_names_of_files_are_not_obeyed_by_the_page() -> None:
    html = about_html(PointCloud(np.zeros((1, 3), np.float32), None, "<img src=x onerror=alert(1)>", ("<b>",)))
    assert "<img" not in html
    assert "<li>&lt;b&gt;</li>" in html
