"""Dropped files: taken up to a size, named as their senders name them, read once, then gone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from pointalign.demo import uploads
from pointalign.demo.uploads import ADDRESS, OPEN, Gate, Uploads, spoken_name
from pointalign.errors import DataError


@pytest.fixture
def taken(tmp_path: Path) -> Uploads:
    return Uploads(tmp_path, 1000)


@pytest.fixture
def client(taken: Uploads) -> TestClient:
    return TestClient(Starlette(middleware=[Middleware(Gate, uploads=taken)]))


def send(client: TestClient, data: bytes = b"abc", name: str = "a.ply", **headers: str):
    return client.post(ADDRESS, params={"name": name}, content=data, headers=headers)


def test_a_file_is_there_once_and_then_gone(client: TestClient, taken: Uploads, tmp_path: Path) -> None:
    word = send(client, name="my chair.glb").text
    with taken.taken(word) as (path, name):
        assert name == "my chair.glb"
        assert (tmp_path / path).read_bytes() == b"abc"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="drop it again"), taken.taken(word):
        pass


def test_two_of_one_name_and_content_are_two_files(client: TestClient, taken: Uploads, tmp_path: Path) -> None:
    first, second = send(client).text, send(client).text
    with taken.taken(first):
        pass
    with taken.taken(second) as (path, _):
        assert (tmp_path / path).read_bytes() == b"abc"


@pytest.mark.parametrize("announced", [True, False])
def test_a_file_that_is_too_large_leaves_nothing(client: TestClient, tmp_path: Path, announced: bool) -> None:
    data = b"x" * 1001
    answer = client.post(ADDRESS, params={"name": "big.ply"}, content=data if announced else iter([data[:600], data]))
    assert answer.status_code == 413
    assert answer.text == "big.ply is larger than the 1000 bytes that are taken; make it smaller"
    assert list(tmp_path.iterdir()) == []
    assert send(client, b"x" * 1000).status_code == 200


def test_other_sites_send_nothing(client: TestClient, tmp_path: Path) -> None:
    assert send(client, origin="http://elsewhere.example").status_code == 403
    assert client.get(ADDRESS).status_code == 403
    assert list(tmp_path.iterdir()) == []
    assert send(client, origin="http://testserver").status_code == 200


def test_files_that_nobody_asks_for_are_deleted_and_many_refused(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MOST_AT_A_TIME", 2)
    assert [send(client).status_code for _ in range(3)] == [200, 200, 503]
    monkeypatch.setattr(uploads, "KEPT_SECONDS", -1)
    assert send(client).status_code == 200
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("chair.glb", "chair.glb"),
        ("Stuhl (rot) 椅子.ply", "Stuhl (rot) 椅子.ply"),
        ("../../etc/passwd", "passwd"),
        ("C:\\things\\lamp.obj", "lamp.obj"),
        ("..", "file"),
        ("", "file"),
        ("a\x1b[31m\n\x00.ply", "a[31m.ply"),
        ("x" * 300 + ".ply", "x" * 196 + ".ply"),
        ("x" * 300, "x" * 200),
        ("椅" * 100 + ".ply", "椅" * 65 + ".ply"),
    ],
)
def test_names(given: str, kept: str) -> None:
    assert spoken_name(given) == kept


JOIN = "/gradio_api/queue/join"
ADDRESS_TO_FETCH = {"path": "http://a.example/big.bin", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (
            json.dumps({"data": ["What is this?", None, 3, ["a", "b"]], "fn_index": 1, "event_data": {"value": "x"}}),
            200,
        ),
        (json.dumps({"event_id": "abc", "session_hash": "d"}), 200),
        (json.dumps({"data": [ADDRESS_TO_FETCH, None]}), 400),
        (json.dumps({"data": [["a", [ADDRESS_TO_FETCH]]]}), 400),
        (json.dumps({"data": ADDRESS_TO_FETCH}), 400),
        (json.dumps({"data": [ADDRESS_TO_FETCH]}).replace("data", "d\\u0061ta"), 400),
        (json.dumps([ADDRESS_TO_FETCH]), 400),
        ("no JSON", 400),
        ("[" * 60_000, 400),
        (json.dumps({"data": ["x" * 70_000]}), 413),
    ],
    ids=["words", "cancel", "an address", "deeper", "alone", "spelt otherwise", "a list", "no JSON", "deep", "large"],
)
def test_requests_are_words_and_not_large(taken: Uploads, body: str, status: int) -> None:
    async def echo(request: Request) -> Response:
        return Response(await request.body())

    routes = [Route(JOIN, echo, methods=["POST"])]
    client = TestClient(Starlette(routes=routes, middleware=[Middleware(Gate, uploads=taken)]))
    for sent in (body.encode(), iter([body[:40].encode(), body[40:].encode()])):
        answer = client.post(JOIN, content=sent, headers={"content-type": "application/json"})
        assert answer.status_code == status
        assert status != 200 or answer.text == body


def test_the_gate_opens_for_the_page_and_nothing_else() -> None:
    page = ["/", "/config", "/theme.css", "/assets/index-a1.js", "/static/fonts/a/b.woff2", "/gradio_api/queue/join"]
    page += [
        "/gradio_api/queue/data",
        "/gradio_api/heartbeat/abc123",
        "/gradio_api/cancel",
        "/gradio_api/startup-events",
    ]
    shut = [
        "/file=/etc/passwd",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file/x",
        "/gradio_api/upload",
        "/llms.txt",
    ]
    shut += ["/gradio_api/proxy=http://a.example", "/gradio_api/vibe-edit", "/assets/../../secret", "/static/a/../../b"]
    shut += ["/gradio_api/run/predict", "/gradio_api/call/x", "/gradio_api/process_recording", "/monitoring", "/login"]
    assert [path for path in page if not OPEN.fullmatch(path)] == []
    assert [path for path in shut if OPEN.fullmatch(path)] == []
