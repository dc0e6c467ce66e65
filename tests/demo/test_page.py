"""`pointalign demo` as a whole, asked over its queue: what it answers, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from demo.conftest import NEW_TOKENS, Client, Served, start_page
from pointalign.answering.conversation import Conversation
from pointalign.answering.loading import load_answerer
from pointalign.chat import harmless
from pointalign.cli import main
from pointalign.demo.objects import bundled_cloud, shelf
from pointalign.errors import ConfigError
from pointalign.options import Decoding, Page

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytest.importorskip("gradio", reason="gradio is not installed: pip install 'pointalign[demo]'")


def words(messages: list[dict[str, Any]]) -> list[str]:
    """The texts of a chat, however the page wraps them."""
    return [
        message["content"] if isinstance(message["content"], str) else message["content"][0]["text"]
        for message in messages
    ]


def ask(client: Client, question: str) -> list[Any]:
    return client.do("ask", "click", [question, None])


def test_eight_visitors_at_once_get_their_own_answers(served: Served, tiny_model: Path) -> None:
    clients = [Client(served.address) for _ in range(8)]
    ids = shelf()[:8]

    def visit(client: Client, object_id: str) -> tuple[list[Any], int]:
        client.do("list", "input", [object_id])
        messages = ask(client, "What is this?")
        ranks = [message["rank"] for message in messages if message["msg"] == "estimation" and message["rank"]]
        done = messages[-1]
        assert done["success"], done
        return done["output"]["data"], max(ranks, default=0)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(visit, clients, ids))
    assert max(rank for _, rank in found) >= 1, "nobody waited"
    answerer = load_answerer(tiny_model, "cpu", "float32")
    for object_id, (data, _) in zip(ids, found, strict=True):
        conversation = Conversation(answerer, bundled_cloud(object_id), Decoding(max_new_tokens=NEW_TOKENS))
        expected = harmless("".join(conversation.ask("What is this?"))) or "(no words)"
        assert words(data[2]) == words(data[3]) == ["What is this?", expected]


def test_an_answer_comes_in_pieces(served: Served) -> None:
    client = Client(served.address)
    client.do(None, "load", [])
    kinds = [message["msg"] for message in ask(client, "What is this?")]
    assert kinds.count("process_generating") >= 2


def test_files_are_told_by_name_and_gone_after_reading(served: Served) -> None:
    client = Client(served.address)
    shown = client.drop("my chair.glb", (EXAMPLES / "chair.glb").read_bytes())
    assert '"name": "my chair.glb"' in shown[1]
    kept = client.drop("notes.ply", b"these are no points")
    assert "notes.ply" in kept[3]
    assert 'role="alert"' in kept[3]
    assert str(served.temporary) not in str([shown, kept])
    assert [path for path in served.temporary.rglob("*") if path.is_file()] == []
    assert client.upload("big.ply", b"x" * (2**20 + 1)).status_code == 413


def test_without_an_object_there_is_one_line(served: Served) -> None:
    done = ask(Client(served.address), "What is this?")[-1]
    assert "drop a file or pick one" in done["output"]["data"][1]


@pytest.mark.parametrize("prefix", ["", "/gradio_api"])
def test_no_file_of_the_server_is_served(served: Served, prefix: str, tiny_model: Path) -> None:
    client = Client(served.address)
    here = [
        __file__,
        sys.executable,
        str(tiny_model / "config.json"),
        str(served.log),
        "/etc/passwd",
        "../../etc/passwd",
    ]
    for path in [*here, "http://127.0.0.1/", "pointalign.toml"]:
        for address in (f"{prefix}/file={path}", f"{prefix}/file/{path}", f"{prefix}/proxy={path}"):
            assert client.http.get(address).status_code in (403, 404), address
    assert client.http.post("/gradio_api/upload", files={"files": b"x"}).status_code in (403, 404)
    folders = {str(Path(path).parent) for path in here[:4]} | {str(Path.home()) + "/"}
    for page in ("/", "/config", "/gradio_api/info"):
        assert not [folder for folder in folders if folder in client.http.get(page).text], page


@pytest.mark.parametrize(("how", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_ends_cleanly(tiny_model: Path, tmp_path: Path, how: signal.Signals, status: int) -> None:
    page = start_page(tmp_path / "cwd", tiny_model)
    client = Client(page.address)
    client.upload("left.ply", b"waiting to be read").raise_for_status()
    assert [path.name for path in page.temporary.rglob("*.ply")] == ["left.ply"]
    with client.http.stream(
        "GET", f"/gradio_api/heartbeat/{client.session}"
    ):  # as an open page, which must not hold it up
        assert page.end(how) == status
    assert "Traceback" not in page.log.read_text()
    assert list(page.temporary.iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "cwd").iterdir()) == ["log.txt", "temporary"]
    if how is signal.SIGINT:
        assert page.log.read_text().endswith("pointalign: interrupted\n")


def test_a_port_that_is_taken_is_one_line(served: Served, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = served.address.rpartition(":")[2]
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--model", str(tiny_model), "--device", "cpu", "--port", port])
    assert ended.value.code == 1
    assert "cannot listen at 127.0.0.1" in capsys.readouterr().err.splitlines()[-1]


def test_without_gradio_the_install_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pointalign.demo.serving.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--model", "anything"])
    assert ended.value.code == 1
    assert 'pip install "pointalign[demo]"' in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"port": 0}, {"port": 70000}, {"max_upload_mb": 0}, {"answer_seconds": -1}])
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Page(**wrong)
