"""A page served by the real command over two tiny models, and what asks it as a browser does."""

from __future__ import annotations

import json
import shutil
import signal
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from commands import Command

SECONDS = 120
NEW_TOKENS = 24


@dataclass
class Served:
    """A running `pointalign demo`."""

    process: Command
    address: str
    temporary: Path
    log: Path

    def end(self, how: signal.Signals) -> int:
        """Ask it to end; gives its exit status."""
        self.process.send_signal(how)
        return self.process.wait(timeout=30)


def start_page(folder: Path, model: Path, *options: str) -> Served:
    """Start the command and wait until it says where the page is."""
    temporary, log = folder / "temporary", folder / "log.txt"
    temporary.mkdir(parents=True)
    process = Command(
        *("demo", "--model", str(model), "--device", "cpu", *options),
        environment={"TMPDIR": str(temporary)},
        folder=folder,
        log=log,
    )
    process.until(lambda: log.is_file() and "the page is at " in log.read_text(), SECONDS)
    address = log.read_text().partition("the page is at ")[2].split()[0].rstrip("/")
    return Served(process, address, temporary, log)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Served]:
    """A page over two tiny models: "tiny" and "second"."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(tiny_model, folder / "second" / "model")
    page = start_page(
        folder / "cwd",
        tiny_model,
        *("--compare", str(folder / "second"), "--dtype", "float32", "--max-new-tokens", str(NEW_TOKENS)),
        *("--max-upload-mb", "1", "--reading-seconds", "20"),
    )
    yield page
    if page.process.poll() is None:
        page.process.kill()


class Client:
    """One visitor, who speaks to the queue as the page's own script does.

    Args:
        address: of the page.
    """

    def __init__(self, address: str) -> None:
        self.http = httpx.Client(base_url=address, timeout=SECONDS, trust_env=False)
        self.session = uuid.uuid4().hex[:12]
        config = self.http.get("/config").json()
        elements = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
        self.events = {
            (elements.get(target), event): dependency["id"]
            for dependency in config["dependencies"]
            if not dependency["cancels"]
            for target, event in dependency["targets"]
        }

    def do(self, element: str | None, event: str, data: list[Any], told: Mapping[str, Any] | None = None) -> list[Any]:
        """Trigger an event; gives every message of the queue until it is done."""
        body = {"data": data, "fn_index": self.events[element, event], "session_hash": self.session, "event_data": told}
        self.http.post("/gradio_api/queue/join", json=body).raise_for_status()
        messages = []
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    messages.append(json.loads(line[5:]))
                    if messages[-1]["msg"] in ("process_completed", "close_stream"):
                        break
        return messages

    def upload(self, name: str, data: bytes, **headers: str) -> httpx.Response:
        """Send a file as the page does."""
        return self.http.post("/pointalign/upload", params={"name": name}, content=data, headers=headers)

    def drop(self, name: str, data: bytes) -> list[Any]:
        """Drop a file; gives what the page shows afterwards."""
        word = self.upload(name, data).raise_for_status().text
        return self.do("drop", "upload", [], {"word": word})[-1]["output"]["data"]
