"""A small endpoint on loopback that can be told to fail in every way, and files of answers to judge."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pointalign.evaluation.judging import endpoint

PEER = [
    ("0", 0, "airplane", "This is a 3D model of a jet plane."),
    ("1", 8, "chair", "A wooden chair."),
    ("2", 23, "night_stand", "A bedside table with two drawers."),
    ("3", 26, "plant", "It shows a car."),
    ("4", 33, "table", "Something abstract."),
]


class Endpoint:
    """An OpenAI-compatible endpoint. `plan` says what the n-th request with a prompt gets; "ok" is a real completion.

    Attributes:
        reply: from a prompt to the judge's words.
        delay: seconds that a prompt waits for whatever it gets.
        prompts: every prompt that was asked, in order.
        answered: how often each prompt got a whole completion.
        headers: of the latest request.
        bodies: of all requests.
        times: when each came.
        most_at_once: requests that were under way together.
    """

    def __init__(self) -> None:
        self.plan: Callable[[str, int], str] = lambda prompt, attempt: "ok"
        self.reply: Callable[[str], str] = lambda prompt: "T#same"
        self.delay: Callable[[str], float] = lambda prompt: 0.0
        self.prompts: list[str] = []
        self.answered: Counter[str] = Counter()
        self.headers: dict[str, str] = {}
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.under_way = self.most_at_once = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        """The address up to /v1."""
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def close(self) -> None:
        """Let hanging requests go and stop."""
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def completion(self, prompt: str) -> bytes:
        """A whole completion."""
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": self.reply(prompt)}}
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": 3, "total_tokens": 0}
        return json.dumps({"id": "x", "model": "served", "choices": [choice], "usage": usage}).encode()

    def handler(self) -> type[BaseHTTPRequestHandler]:
        """A request handler of this endpoint."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                prompt = body["messages"][0]["content"]
                with outer.lock:
                    outer.prompts.append(prompt)
                    outer.bodies.append(body)
                    outer.times.append(time.monotonic())
                    outer.headers = {name.lower(): value for name, value in self.headers.items()}
                    attempt = outer.prompts.count(prompt)
                    outer.under_way += 1
                    outer.most_at_once = max(outer.most_at_once, outer.under_way)
                try:
                    outer.closing.wait(outer.delay(prompt))
                    self.act(outer.plan(prompt, attempt), prompt)
                except OSError:  # the client has gone
                    self.close_connection = True
                finally:
                    with outer.lock:
                        outer.under_way -= 1

            def act(self, action: str, prompt: str) -> None:
                whole = outer.completion(prompt)
                if action == "ok":
                    self.send(200, whole)
                    with outer.lock:
                        outer.answered[prompt] += 1
                elif action == "hang":
                    outer.closing.wait()
                elif action == "drip":
                    self.send(200, b"", promise=1000)
                    while not outer.closing.wait(0.05):
                        self.wfile.write(b" ")
                        self.wfile.flush()
                elif action == "drop":
                    self.close_connection = True
                elif action == "short body":
                    self.send(200, whole[:60], promise=len(whole))
                    self.close_connection = True
                elif action == "cut JSON":
                    self.send(200, whole[:60])
                elif action == "no choices":
                    self.send(200, b'{"choices": []}')
                elif action == "no message":
                    self.send(200, b'{"choices": [{"index": 0}]}')
                elif action == "no JSON object":
                    self.send(200, b"[1]")
                elif action == "HTML":
                    self.send(200, b"<html>hello</html>", kind="text/html")
                else:
                    self.fail(*action.split(maxsplit=2))

            def fail(self, status: str, header: str = "", message: str = "") -> None:
                """For instance "429 retry-after=1 too many requests"; `_` is a blank, a message `code:x y` gives a code."""
                error: dict[str, Any] = {"message": message}
                if message.startswith("code:"):
                    code, _, text = message.removeprefix("code:").partition(" ")
                    error = {"message": text, "code": code}
                self.send(int(status), json.dumps({"error": error}).encode(), header=header)

            def send(
                self,
                status: int,
                body: bytes,
                promise: int | None = None,
                kind: str = "application/json",
                header: str = "",
            ) -> None:
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body) if promise is None else promise))
                if "=" in header:
                    self.send_header(*header.replace("_", " ").split("=", 1))
                self.end_headers()
                self.wfile.write(body)
                self.wfile.flush()

        return Handler


@pytest.fixture
def server() -> Iterator[Endpoint]:
    """An endpoint that answers everything well until it is told otherwise."""
    made = Endpoint()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and an environment without judges, and no long waits between attempts."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("POINTALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def write_answers(tmp_path: Path) -> Callable[..., Path]:
    """Writes entries as a file in the field's format."""

    def write(name: str, entries: list[dict[str, Any]], prompt: str = "What is this?") -> Path:
        (tmp_path / name).write_text(json.dumps({"prompt": prompt, "results": entries}))
        return tmp_path / name

    return write


@pytest.fixture
def peer_file(write_answers: Callable[..., Path]) -> Path:
    """Five answers about ModelNet40 clouds, written as the released peers write them."""
    entries = [
        {"object_id": object_id, "ground_truth": index, "model_output": output, "label_name": label}
        for object_id, index, label, output in PEER
    ]
    return write_answers("peer.json", entries)


@pytest.fixture
def captions_file(write_answers: Callable[..., Path]) -> Path:
    """Twelve captions, two of them the same about the same reference, one of them empty."""
    entries = [
        {"object_id": f"c{n}", "ground_truth": f"A chair number {n}.", "model_output": f"chair {n}"} for n in range(10)
    ]
    entries.append({"object_id": "again", "ground_truth": "A chair number 3.", "model_output": "chair 3"})
    entries.append({"object_id": "empty", "ground_truth": "A lamp.", "model_output": " \n"})
    return write_answers("captions.json", entries, "Caption this 3D model in detail.")
