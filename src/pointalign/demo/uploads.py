"""Dropped files on their way from a browser to the reader, and the gate that lets a page's requests in and no others."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse

from pointalign.data.files.source import FORMATS, readable
from pointalign.errors import DataError

ADDRESS = "/pointalign/upload"
FORMATS_TAKEN = ",".join(f".{name}" for name in FORMATS)
# Seconds for a file to arrive, and for it to be asked for afterwards.
ARRIVAL_SECONDS = 300
KEPT_SECONDS = 300
MOST_AT_A_TIME = 32
LONGEST_NAME = 200  # bytes; file systems take 255
# Of any other request: a question and labels have 2,000 letters each.
MOST_REQUEST_BYTES = 64 * 1024
# What the page of ours asks for. Gradio can do more: serve files, fetch addresses, take recordings, edit its own code.
OPEN = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(?:assets|static)/(?!.*\.\.)[\w./@-]+"
    r"|/gradio_api/(?:app_id|startup-events|info|queue/(?:join|data)|heartbeat/\w+|cancel|reset)/?"
)


@dataclass(frozen=True)
class _Waiting:
    folder: Path
    name: str
    arrived: float


class Uploads:
    """Files that arrived and were not read yet; each is read once and then deleted, an old one unread when another arrives.

    Args:
        folder: where they lie meanwhile.
        most_bytes: of one file.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder = folder
        self.most_bytes = most_bytes
        self._arriving = 0
        self._waiting: dict[str, _Waiting] = {}

    async def receive(self, request: Request) -> PlainTextResponse:
        """Take a file that a browser sends; the answer is a word under which it can be asked for once.

        Anything else is answered with one line for people and a status that says so.
        """
        name = spoken_name(request.query_params.get("name", ""))
        if request.method != "POST" or not _same_site(request):
            return PlainTextResponse("files come from the page itself", 403)
        self._forget_old()
        if self._arriving + len(self._waiting) >= MOST_AT_A_TIME:
            return PlainTextResponse("too many files are on their way; try again in a minute", 503)
        word = secrets.token_urlsafe(16)
        self._arriving += 1
        try:
            async with asyncio.timeout(ARRIVAL_SECONDS):
                await self._write(request, self.folder / word / name)
        except DataError as error:
            shutil.rmtree(self.folder / word, ignore_errors=True)
            return PlainTextResponse(str(error), 413)
        except (OSError, ClientDisconnect, TimeoutError):
            shutil.rmtree(self.folder / word, ignore_errors=True)
            return PlainTextResponse(f"{name} did not arrive; try again", 500)
        finally:
            self._arriving -= 1
        self._waiting[word] = _Waiting(self.folder / word, name, time.monotonic())
        return PlainTextResponse(word)

    async def _write(self, request: Request, path: Path) -> None:
        announced = request.headers.get("content-length", "")
        path.parent.mkdir(parents=True)
        size = int(announced) if announced.isdecimal() else 0
        with path.open("wb") as file:
            if size <= self.most_bytes:
                size = 0
                async for piece in request.stream():
                    size += len(piece)
                    if size > self.most_bytes:
                        break
                    file.write(piece)
        if size > self.most_bytes:
            raise DataError(
                f"{path.name} is larger than the {readable(self.most_bytes)} that are taken; make it smaller"
            )

    @contextmanager
    def taken(self, word: str) -> Iterator[tuple[str, str]]:
        """A file's path from the folder on, and its name as people know it; the file is gone when the block ends.

        Raises:
            DataError: when there is no such file, or it was asked for before.
        """
        waiting = self._waiting.pop(word, None)
        if waiting is None:
            raise DataError("the file is not there any more; drop it again")
        try:
            yield f"{waiting.folder.name}/{waiting.name}", waiting.name
        finally:
            shutil.rmtree(waiting.folder, ignore_errors=True)

    def _forget_old(self) -> None:
        oldest = time.monotonic() - KEPT_SECONDS
        for word, waiting in list(self._waiting.items()):
            if waiting.arrived < oldest and self._waiting.pop(word, None):
                shutil.rmtree(waiting.folder, ignore_errors=True)


def spoken_name(name: str) -> str:
    """What a file is called by those who sent it, without folders and what a file system or a screen would choke on."""
    last = name.replace("\\", "/").rpartition("/")[2]
    kept = "".join(letter for letter in last if letter.isprintable() and letter not in ':*?"<>|').strip(". ")
    stem, dot, ending = kept.rpartition(".")
    if not stem or len(ending) >= 10:
        return _cut(kept, LONGEST_NAME) or "file"
    return _cut(stem, LONGEST_NAME - len(f"{dot}{ending}".encode())) + dot + ending


def _cut(text: str, most_bytes: int) -> str:
    return text.encode()[:most_bytes].decode(errors="ignore")


def _same_site(request: Request) -> bool:
    """Whether a request comes from a page of this server, not from one that the visitor has open beside it."""
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")


class Gate:
    """ASGI middleware: takes uploads, lets through what the page needs, and refuses everything else that Gradio offers.

    Args:
        app: what is behind it.
        uploads: where files go.
    """

    def __init__(self, app: Any, uploads: Uploads) -> None:
        self.app = app
        self.uploads = uploads

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http" and OPEN.fullmatch(scope["path"]):
            await self._ask(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == ADDRESS:
            await (await self.uploads.receive(Request(scope, receive)))(scope, receive, send)
        elif scope["type"] == "http":
            await PlainTextResponse("not here", 404)(scope, receive, send)

    async def _ask(self, scope: Any, receive: Any, send: Any) -> None:
        """Hand a request on, unless it is larger than any of the page's, or names a file or address for Gradio to fetch."""
        body, more = b"", scope["method"] not in ("GET", "HEAD")
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > MOST_REQUEST_BYTES:
                await PlainTextResponse("the request is too large", 413)(scope, receive, send)
                return
        if body and not _is_plain(body):
            await PlainTextResponse("not here", 400)(scope, receive, send)
            return
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Any:
            return unread.pop() if unread else await receive()

        await self.app(scope, replayed, send)


def _is_plain(body: bytes) -> bool:
    """Whether a request's `data` are words and numbers; what Gradio takes for a file, it fetches."""
    try:
        asked = json.loads(body)
        return isinstance(asked, dict) and not _holds_mapping(asked.get("data"))
    except (ValueError, RecursionError):
        return False


def _holds_mapping(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_holds_mapping, value)))
