"""`pointalign demo`: load the models, open the page, and leave nothing behind when it ends."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pointalign.answering.loading import load_answerer
from pointalign.answering.reading import TimedReader
from pointalign.data.files.source import MEBIBYTE
from pointalign.demo.uploads import Gate, Uploads
from pointalign.demo.visit import Desk
from pointalign.errors import ConfigError, MissingDependencyError
from pointalign.models.checkpoint import resolve_model
from pointalign.options import Decoding, ModelChoice, Page, Reading
from pointalign.progress import say

EXIT_TERMINATED = 128 + signal.SIGTERM


def serve(choice: ModelChoice, compare: str | None, page: Page, decoding: Decoding, reading: Reading) -> None:
    """Open the page and serve it until Ctrl-C.

    Args:
        choice: the model, and what both models compute on.
        compare: a second model, or None.
        page: where, and limits.
        decoding: how answers are written.
        reading: how files become clouds.

    Raises:
        PointAlignError: when Gradio is not installed, a model cannot be loaded, or the port is taken.
        KeyboardInterrupt: at the end, after everything was cleaned up.
    """
    if find_spec("gradio") is None:
        raise MissingDependencyError('the page needs gradio; run `pip install "pointalign[demo]"`')
    names = [resolve_model(name) for name in ([choice.model] if compare is None else [choice.model, compare])]
    with tempfile.TemporaryDirectory(prefix="pointalign-", ignore_cleanup_errors=True) as folder, _ended_by_sigterm():
        _quiet_gradio(Path(folder))
        uploads = Uploads(Path(folder), page.max_upload_mb * MEBIBYTE)
        answerers = [load_answerer(name, choice.device, choice.dtype) for name in names]
        with (
            closing(TimedReader(Path(folder), page.reading_seconds)) as reader,
            _opened(Desk(answerers, uploads, reader, page, decoding, reading)) as address,
        ):
            say(f"the page is at {address} (Ctrl-C ends it)")
            threading.Event().wait()


@contextmanager
def _opened(desk: Desk) -> Iterator[str]:
    """Start the server in threads of its own; gives the page's address."""
    from starlette.middleware import Middleware

    from pointalign.demo.page import MOST_VISITS, PageBuilder, appearance

    blocks = PageBuilder(desk).blocks
    gate: Any = Middleware(Gate, uploads=desk.uploads)
    try:
        _, address, _ = blocks.launch(
            server_name=desk.page.host,
            server_port=desk.page.port,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            share=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            state_session_capacity=MOST_VISITS,
            app_kwargs={"middleware": [gate], "docs_url": None, "redoc_url": None, "openapi_url": None},
            **appearance(),
        )
    except OSError as error:
        raise ConfigError(f"cannot listen at {desk.page.host}: {error}; name another --port or --host") from error
    try:
        yield address
    finally:
        desk.close()
        # Open pages hold a connection each, which would be waited for, and whose end would be told as an error.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        blocks.server.config.timeout_graceful_shutdown = 1
        blocks.close(verbose=False)


def _quiet_gradio(folder: Path) -> None:
    """Keep Gradio from talking to its makers, and what it writes in a folder that is deleted at the end."""
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False",
        GRADIO_TEMP_DIR=str(folder / "gradio"),
        GRADIO_EXAMPLES_CACHE=str(folder / "examples"),
        HF_HUB_DISABLE_TELEMETRY="1",
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let a request to end clean up as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
